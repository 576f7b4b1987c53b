"""Packed projections: the rows of queries, keys and values in one tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PACKED = {
    "in_proj_weight": "weight",
    "in_proj_bias": "bias",
    **{f"{name}.{part}": part for name in ("qkv_proj", "Wqkv") for part in ("weight", "bias")},
}
"""Names of tensors that hold the rows of all queries, then all keys, then all values: those of
``nn.MultiheadAttention``; qkv_proj of Phi-3 and vLLM; Wqkv of flash-attn, MPT, DBRX and ModernBERT."""

RENAMED = {
    **{f"{letter}_proj_weight": f"{letter}_proj.weight" for letter in "qkv"},
    **{f"o_proj.{part}": f"out_proj.{part}" for part in ("weight", "bias")},
}
"""Other names of single projections: those of ``nn.MultiheadAttention`` with kdim, and of Llama."""


def unpack_state(layer: Any, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Replaces packed and renamed projections in a state dict by those of `Attention`.

    Not taken, since their rows are in different orders in different models: ``c_attn`` (GPT-2, GPT-BigCode, nanoGPT),
    ``query_key_value`` (GPT-NeoX, Falcon, ChatGLM), and ``qkv_proj`` with an ``out_proj`` (CodeGen, MiniMax), not an
    ``o_proj``. `Attention.from_transformers` knows the order of those classes that it reads.

    Args:
        layer: the `Attention` that loads it.
        state_dict: changed in place, as hooks of ``load_state_dict`` do: torch passes a copy.
        prefix: of the layer's names in it.
        errors: messages for what cannot be loaded, to which those of packed tensors of another size are added.
    """
    keys, values = layer.num_kv_heads * layer.head_dim, layer.num_kv_heads * layer.value_dim
    sizes = [layer.num_heads * layer.head_dim, keys, values]
    for name, part in PACKED.items():
        names = [f"{prefix}{letter}_proj.{part}" for letter in "qkv"]
        packed = state_dict.get(prefix + name)
        if packed is None or any(given in state_dict for given in names):
            continue
        if name.startswith("qkv_proj") and f"{prefix}o_proj.weight" not in state_dict:
            continue
        if packed.shape[0] != sum(sizes):
            errors.append(
                f"{prefix}{name} must have {sum(sizes)} rows, {sizes[0]} of queries, {keys} of keys and {values} of "
                f"values; got shape {tuple(packed.shape)}."
            )
            continue
        del state_dict[prefix + name]
        # Copies: with assign=True, parameters must not share memory.
        state_dict.update(zip(names, [rows.clone() for rows in packed.split(sizes)], strict=True))
    for name, own in RENAMED.items():
        if prefix + name in state_dict and prefix + own not in state_dict:
            state_dict[prefix + own] = state_dict.pop(prefix + name)


def split_by_kind(packed: Tensor, num_heads: int, head_dim: int) -> Sequence[Tensor]:
    """The rows of all queries, all keys and all values, from packed rows in this order."""
    queries = num_heads * head_dim
    keys = (packed.shape[0] - queries) // 2
    return torch.split(packed, [queries, keys, keys])


def split_by_group(packed: Tensor, num_heads: int, head_dim: int) -> Sequence[Tensor]:
    """As `split_by_kind`, from packed rows of each group: its queries, its key and its value (GPT-NeoX, Falcon)."""
    kv_heads = (packed.shape[0] // head_dim - num_heads) // 2
    groups = packed.unflatten(0, (kv_heads, num_heads // kv_heads + 2, head_dim))
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
