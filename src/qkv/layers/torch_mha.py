"""Conversion of ``nn.MultiheadAttention`` to the options and weights of `Attention`, and back."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkv.layers.projection import linear_projections
from qkv.masks import FULL, Mask


class Layer(Protocol):
    """What `build` reads of an `Attention`, an ``nn.Module``."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    context_dim: int | None
    mask: Mask
    scale: float | None
    softcap: float | None
    dropout: float
    training: bool
    rotary: Any
    position_bias: Any
    q_norm: Any
    sink_logits: Tensor | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    gate_proj: nn.Linear | None

    @property
    def alibi(self) -> Tensor | None: ...


def options(module: nn.MultiheadAttention) -> dict[str, Any]:
    """The arguments with which `Attention` computes what the module does.

    Raises:
        ValueError: for modules that `Attention` cannot express.
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"from_torch: module must be an nn.MultiheadAttention; got {type(module).__name__}.")
    if module.kdim != module.vdim:
        raise ValueError(
            f"from_torch: kdim and vdim must be equal, since keys and values come from one context; "
            f"got kdim={module.kdim} and vdim={module.vdim}."
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            "from_torch: add_bias_kv and add_zero_attn must be False, since layers add no keys; "
            f"got add_bias_kv={module.bias_k is not None}, add_zero_attn={module.add_zero_attn}."
        )
    like = module.out_proj.weight
    arguments: dict[str, Any] = {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "bias": module.in_proj_bias is not None,
        "dropout": module.dropout,
        "device": like.device,
        "dtype": like.dtype,
    }
    if module.kdim != module.embed_dim:
        arguments["context_dim"] = module.kdim
    return arguments


def state(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The state dict of `Attention` from the weights of the module."""
    state_dict = {"out_proj.weight": module.out_proj.weight}
    if module.out_proj.bias is not None:
        state_dict["out_proj.bias"] = module.out_proj.bias
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    for name, weight in zip("qkv", weights, strict=True):
        state_dict[f"{name}_proj.weight"] = weight
    if module.in_proj_bias is not None:
        for name, bias in zip("qkv", module.in_proj_bias.chunk(3), strict=True):
            state_dict[f"{name}_proj.bias"] = bias
    return state_dict


def build(layer: Layer) -> nn.MultiheadAttention:
    """The batch-first module that computes what the layer does.

    Raises:
        TypeError: for a projection that is not a plain ``nn.Linear``.
        ValueError: for a layer that the module cannot express, listing every reason.
    """
    linear_projections("to_torch", layer)
    unsupported = _unsupported(layer)
    if unsupported:
        raise ValueError(f"to_torch: nn.MultiheadAttention has no {', '.join(unsupported)}.")
    like = layer.out_proj.weight
    module = nn.MultiheadAttention(
        layer.embed_dim,
        layer.num_heads,
        dropout=layer.dropout,
        bias=layer.q_proj.bias is not None,
        kdim=layer.context_dim,
        vdim=layer.context_dim,
        batch_first=True,
        device=like.device,
        dtype=like.dtype,
    )
    module.load_state_dict(_packed(layer, module))
    return module.train(layer.training)


def _packed(layer: Layer, module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The state dict of the module from the weights of the layer."""

    def repeated(projection: Tensor) -> Tensor:
        heads: Tensor = projection.unflatten(0, (layer.num_kv_heads, -1))
        return heads.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=0).flatten(0, 1)

    packed = {"out_proj.weight": layer.out_proj.weight}
    if layer.out_proj.bias is not None:
        packed["out_proj.bias"] = layer.out_proj.bias
    weights = (layer.q_proj.weight, repeated(layer.k_proj.weight), repeated(layer.v_proj.weight))
    if module.in_proj_weight is not None:
        packed["in_proj_weight"] = torch.cat(weights)
    else:
        for name, weight in zip("qkv", weights, strict=True):
            packed[f"{name}_proj_weight"] = weight
    if layer.q_proj.bias is not None:
        packed["in_proj_bias"] = torch.cat(
            [layer.q_proj.bias, repeated(layer.k_proj.bias), repeated(layer.v_proj.bias)]
        )
    return packed


def _unsupported(layer: Layer) -> list[str]:
    """Options of the layer that ``nn.MultiheadAttention`` does not have."""
    unsupported: list[str] = []
    if layer.mask != FULL:
        unsupported.append(f"mask of its own ({layer.mask!r}; it takes one per call)")
    if layer.num_heads * layer.head_dim != layer.embed_dim or layer.value_dim != layer.head_dim:
        unsupported.append(
            f"head widths other than embed_dim / num_heads (head_dim={layer.head_dim}, value_dim={layer.value_dim})"
        )
    if (layer.q_proj.bias is None) != (layer.out_proj.bias is None):
        unsupported.append("bias for some of the projections")
    if layer.q_norm is not None:
        unsupported.append("qk_norm")
    if layer.gate_proj is not None:
        unsupported.append("gate")
    names = ("rotary", "position_bias", "scale", "softcap", "sink_logits", "alibi")
    return unsupported + [name for name in names if getattr(layer, name) is not None]
