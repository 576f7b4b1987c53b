"""Calls of decoder layers with few tokens, one after another, from the input of the first to the output of the last."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from qkv.kernels.binding import loaded
from qkv.kernels.gated_mlp import ACTIVATIONS
from qkv.kernels.rms_norm import Gain
from qkv.kernels.structs import BLOCK_NUMBERS, BlockTensors, StepNumbers, StepTensors, pack_step


class DecoderLayer(NamedTuple):
    """What the kernel needs of a decoder layer.

    ``out = y + after_mlp(mlp(before_mlp(y)))``, where ``y = x + after_attention(attention(before_attention(x)))``. All
    is rounded as by `layer_step`, `fast_rms_norm`, `fast_gated_mlp` and sums of torch.
    """

    tensors: StepTensors
    """of the attention, with x and out of the layer"""
    numbers: StepNumbers
    """of the attention"""
    block: BlockTensors
    """norms and MLP"""
    activation: str
    """one of `ACTIVATIONS`"""
    gain: Gain
    """what the gains of the block's norms do"""
    eps: float
    """of these norms"""


def decoder_layers(layers: Sequence[DecoderLayer]) -> int:
    """Writes keys, values and ``out`` of new tokens, layer after layer: one may read what an earlier one has written.

    Returns:
        The number of first layers that are written: fewer than all if the next one's tensors do not fit together or
        are not supported, as `layer_step` has it (native/src/abi/fast_decoder_layer.cpp).

    Raises:
        MemoryError: if scratch memory cannot be allocated.
    """
    call = loaded().decoder_layers
    if call is None:
        return 0
    objects: Any = [tensor for layer in layers for tensors in (layer.tensors, layer.block) for tensor in tensors]
    packed = functools.cache(_packed)  # those of all layers are mostly the same
    numbers = [packed(layer.numbers, layer.activation, layer.gain, layer.eps) for layer in layers]
    written = call(*objects, b"".join(numbers))
    if written < 0:
        raise MemoryError(
            f"qkv's kernel: not enough scratch memory for {tuple(layers[0].tensors.x.shape)} tokens; pass fewer."
        )
    return written


def _packed(numbers: StepNumbers, activation: str, gain: Gain, eps: float) -> bytes:
    return pack_step(numbers) + BLOCK_NUMBERS.pack(ACTIVATIONS[activation], gain, eps)
