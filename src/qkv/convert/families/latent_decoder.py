"""Llama, Mistral and Qwen2 with latent attention: how they are made of grouped heads, and how they look themselves."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.layout import LayerParts, Layout, find_layers
from qkv.convert.families.llama import SELF_ATTENTION
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec
from qkv.convert.heads.latents import LatentFactors, LatentWidths, factorise
from qkv.integrations.transformers.latent_decoders import CLASS_PREFIX, MODEL_TYPES, TYPE_PREFIX

LAYOUT = Layout()
"""Of the models that are converted."""


def latent_outputs(
    where: str, family: Family, tensors: Mapping[str, TensorSpec], heads: Heads, widths: LatentWidths
) -> dict[str, Output]:
    """The tensors of the result, by name: projections of each layer are factorised, all others copied.

    Raises:
        CheckpointError: for dtypes other than `TORCH_DTYPES`.
    """
    outputs = {name: Output(name, spec, (name,)) for name, spec in tensors.items()}
    for layer in find_layers(LAYOUT, family.split_name, tensors):
        factoriser = _Factoriser(layer, heads, widths)
        for source in factoriser.sources:
            if tensors[source].dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{where}: tensor {source!r} must have dtype {', '.join(TORCH_DTYPES)} to be converted; "
                    f"got {tensors[source]}."
                )
        for name in layer.parts.values():
            if not name.startswith(f"{layer.prefix}{LAYOUT.out}."):
                del outputs[name]
        outputs |= {output.name: output for output in factoriser.outputs(tensors)}
    return outputs


def configure(config: dict[str, Any], heads: Heads, widths: LatentWidths) -> dict[str, Any]:
    """The configuration of our model type."""
    classes = [CLASS_PREFIX + name for name in config.get("architectures") or []]
    return {
        **config,
        "model_type": TYPE_PREFIX + config["model_type"],
        "architectures": classes or None,
        "head_dim": heads.head_dim,
        "num_key_value_heads": heads.num_heads,
        "kv_lora_rank": widths.rank,
        "qk_nope_head_dim": widths.nope_dim,
        "qk_rope_head_dim": widths.rope_dim,
        "v_head_dim": widths.value_dim,
    }


class _Factoriser:
    """Factorises a layer when the first of its tensors is computed, and keeps the factors until the last one is."""

    def __init__(self, layer: LayerParts, heads: Heads, widths: LatentWidths) -> None:
        self._layer = layer
        self._heads = heads
        self._widths = widths
        self._factors: LatentFactors | None = None
        self._missing: set[str] = set()
        """names of tensors that are still to be computed from the factors"""
        self.sources = (*layer.parts.values(), f"{layer.parent}{LAYOUT.norm}.weight")

    def outputs(self, tensors: Mapping[str, TensorSpec]) -> Iterator[Output]:
        """The layer's new tensors."""
        query, widths, heads = tensors[self._layer.parts["q_proj.weight"]], self._widths, self._heads.num_heads
        rows = {
            "q_proj": heads * (widths.nope_dim + widths.rope_dim),
            "kv_a_proj_with_mqa": widths.rank + widths.rope_dim,
        }
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (count, query.shape[1]) for name, count in rows.items()}
        if "q_proj.bias" in self._layer.parts:
            shapes |= {f"{name}.bias": (count,) for name, count in rows.items()}
        shapes["kv_b_proj.weight"] = (heads * (widths.nope_dim + widths.value_dim), widths.rank)
        for name, shape in shapes.items():
            spec = query._replace(shape=shape)
            compute = self._computing(name, frozenset(shapes), TORCH_DTYPES[spec.dtype])
            yield Output(self._layer.prefix + name, spec, self.sources, compute)

    def _computing(self, name: str, names: frozenset[str], dtype: torch.dtype) -> Callable[..., Tensor]:
        """A function of the sources that computes the tensor ``name``, one of ``names``."""

        def compute(*values: Tensor) -> Tensor:
            if self._factors is None or name not in self._missing:
                self._factors, self._missing = self._factorise(values), set(names)
            factors = self._factors
            self._missing.remove(name)
            if not self._missing:
                self._factors = None
            projection, _, kind = name.partition(".")
            if projection == "kv_b_proj":
                return factors.up.flatten(0, 1).to(dtype)
            rows, columns = factors.q.flatten(0, 1) if projection == "q_proj" else factors.down, len(values[-1])
            return (rows[:, columns] if kind == "bias" else rows[:, :columns]).to(dtype).contiguous()

        return compute

    def _factorise(self, values: tuple[Tensor, ...]) -> LatentFactors:
        """Factors of q, k and v. ``values``: tensors of ``sources``, the gain of the norm last, which weighs errors."""
        q, k, v, _ = LAYOUT.read(dict(zip(self._layer.parts, values[:-1], strict=True)), self._heads)
        q, k, v = (rows.double().view(-1, self._heads.head_dim, rows.shape[1]) for rows in (q, k, v))
        weights = torch.ones(q.shape[2], dtype=torch.float64)
        weights[: len(values[-1])] = values[-1].double().abs().clamp_min(torch.finfo(torch.float32).tiny)
        pairs = torch.arange(self._widths.rotary_dim).view(2, -1).T
        return factorise(q, k, v, pairs, weights, self._widths)


def _convert(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    return [Output(name, spec, (name,))]


def _configure(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    return config


LATENT = Family(SELF_ATTENTION, re.compile(r"kv_[ab]_proj(_with_mqa)?\.(weight|bias)"), False, _convert, _configure)
LATENT_DECODERS = {TYPE_PREFIX + model_type: LATENT for model_type in MODEL_TYPES}
"""Families of results, by ``model_type``. They have no KV heads to pool, which `plan_conversion` refuses."""
