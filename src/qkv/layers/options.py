"""The options of layers as typed keywords: `Attention`'s constructor, `options`, the named layers and conversions."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Required

from qkv.layers.rotary import RotaryEmbedding
from qkv.masks import Mask


class HeadOptions(TypedDict, total=False):
    """The options of a layer whose numbers of heads are fixed. Documented in `Attention`."""

    head_dim: int | None
    value_dim: int | None
    context_dim: int | None
    mask: Mask | None
    rotary: RotaryEmbedding | None
    position_bias: nn.Module | None
    qk_norm: bool
    qk_norm_eps: float
    gate: bool
    bias: bool
    out_bias: bool | None
    scale: float | None
    softcap: float | None
    sink_logits: bool
    alibi: Tensor | Sequence[float] | None
    dropout: float
    backend: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class LayerOptions(HeadOptions, total=False):
    """The options of `Attention`."""

    num_kv_heads: int | None


class ConversionOptions(LayerOptions, total=False):
    """The options of `from_torch` and `from_transformers`: those of every named layer."""

    window: int
    causal: bool
    sink_tokens: int
    dilation: int


class Arguments(LayerOptions, total=False):
    """All arguments of `Attention`."""

    embed_dim: Required[int]
    num_heads: Required[int]
