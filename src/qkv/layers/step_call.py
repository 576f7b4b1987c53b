"""The kernel's call for a step, of our layer or of a module that computes the same, and for decoder layers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import kernels
from qkv.cache import Keys
from qkv.kernels import BlockTensors, DecoderLayer, Gain, StepNumbers, StepTensors
from qkv.layers.gated_forward import Mlp
from qkv.layers.normed_forward import Norm
from qkv.masks import Mask
from qkv.rotation import Rotation


class Block(NamedTuple):
    """What a decoder layer computes around its attention, with a residual around each half."""

    norms: tuple[Norm | None, ...]
    """before and after attention, before and after the MLP; with the same eps and use of gains, and at least one"""
    mlp: Mlp


class Computed(NamedTuple):
    """What a step computes, of which tokens and keys ever."""

    weights: dict[str, Any]
    """and biases, by their names in `StepTensors`; without those of keys and values, no slot is new"""
    mask: Mask
    """over the slots: an interval, prefixes, chunks and padding"""
    scale: float
    """of scores, as softcap (0 for none), alibi and sink_logits"""
    q_norm: Norm | None = None
    """of the heads of queries, as k_norm of keys; with the same eps and use of gains"""
    k_norm: Norm | None = None
    rotation: Rotation | None = None
    """by frequencies and a position or positions ``(B or 1, L)``; or by cos and sin with ``halves``"""
    softcap: float = 0.0
    alibi: Tensor | None = None
    sink_logits: Tensor | None = None


def step_call(x: Tensor, keys: Keys, computed: Computed) -> Tensor | None:
    """The output for tokens ``x (B, L, width)`` over keys whose last slots are theirs, and are written.

    Args:
        x: exactly a tensor, as all others: they must satisfy `kernels.can_bypass_dispatcher`.
        keys: as `Cache.claim` returns them.

    Returns:
        ``(B, L, width)``; None, with nothing written, for tensors that the kernel does not take.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    return out if kernels.layer_step(*arguments(x, out, keys, computed)) else None


def arguments(x: Tensor, out: Tensor, keys: Keys, computed: Computed) -> tuple[StepTensors, StepNumbers]:
    """What `kernels.layer_step` takes for the arguments of `step_call`, with x as the kernel reads it."""
    weights, mask, scale, q_norm, k_norm, rotation, softcap, alibi, sink_logits = computed
    norm, rotation = q_norm or k_norm or Norm(None, 0.0, Gain.WIDENED), rotation or Rotation()
    offset, offsets = (0, keys.offset) if isinstance(keys.offset, Tensor) else (keys.offset or 0, None)
    pages = keys.pages
    given: Any = (  # by position, which takes a quarter of the time
        x,
        *map(weights.get, _WEIGHTS),
        None if q_norm is None else q_norm.gains,
        None if k_norm is None else k_norm.gains,
        rotation.frequencies,
        rotation.cos,
        rotation.sin,
        keys.k,
        keys.v,
        keys.k_scale,
        keys.v_scale,
        None if pages is None else pages.table,
        offsets,
        _int64(rotation.offsets if rotation.positions is None else rotation.positions),
        mask.keep,
        _int64(mask.lengths),
        _int64(mask.prefix_lengths),
        None if alibi is None else alibi.float(),
        None if sink_logits is None else sink_logits.float(),
        out,
    )
    numbers = StepNumbers(
        (keys.key_count or 0) if pages is None else pages.length,
        offset,
        rotation.offset,
        mask.left,
        mask.right,
        mask.sink_tokens,
        mask.prefix_tokens,
        mask.dilation,
        mask.chunk or 0,
        mask.chunk_start,
        rotation.interleaved,
        rotation.position_scale,
        rotation.attention_factor,
        norm.gain,
        norm.eps,
        scale,
        softcap,
    )
    return StepTensors._make(given), numbers


_WEIGHTS = StepTensors._fields[1:11]


def decoder_layer(tensors: StepTensors, numbers: StepNumbers, block: Block) -> DecoderLayer:
    """A decoder layer with the `arguments` of its attention, whose x and out are those of the layer."""
    before_attention, after_attention, before_mlp, after_mlp = (norm and norm.gains for norm in block.norms)
    (gate_weight, gate_bias), up, (down_weight, down_bias), activation = block.mlp
    up_weight, up_bias = up or (None, None)
    of_norms = before_attention, after_attention, before_mlp, after_mlp
    given = BlockTensors(*of_norms, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias)
    norm = next(norm for norm in block.norms if norm is not None)
    return DecoderLayer(tensors, numbers, given, activation, norm.gain, norm.eps)


def _int64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int64)
