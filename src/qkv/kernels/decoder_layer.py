"""A decoder layer's call with few tokens, from its input to its output, by the kernel."""

import ctypes
from typing import Any

from qkv.kernels.binding import loaded
from qkv.kernels.gated_mlp import ACTIVATIONS
from qkv.kernels.rms_norm import Gain
from qkv.kernels.structs import BlockTensors, StepNumbers, StepTensors, pack_step

_StepObjects: Any = ctypes.py_object * len(StepTensors._fields)
_BlockObjects: Any = ctypes.py_object * len(BlockTensors._fields)


def decoder_layer(
    tensors: StepTensors, numbers: StepNumbers, block: BlockTensors, activation: str, gain: Gain, eps: float
) -> bool:
    """Writes keys, values and ``out`` of new tokens: those of `layer_step` amid norms, an MLP and their residuals.

    ``out = y + after_mlp(mlp(before_mlp(y)))``, where ``y = x + after_attention(attention(before_attention(x)))``. All
    is rounded as by `layer_step`, `fast_rms_norm`, `fast_gated_mlp` and sums of torch.

    Args:
        tensors: of the attention, with x and out of the layer.
        numbers: of the attention.
        block: norms and MLP.
        activation: one of `ACTIVATIONS`.
        gain: what the gains of the block's norms do.
        eps: of these norms.

    Returns:
        As `layer_step` (native/src/abi/fast_decoder_layer.cpp).

    Raises:
        MemoryError: if scratch memory cannot be allocated.
    """
    call = loaded().decoder_layer
    if call is None:
        return False
    objects = _StepObjects(*tensors), pack_step(numbers), _BlockObjects(*block)
    status = call(*objects, ACTIVATIONS[activation], gain, eps)
    if status == 1:
        raise MemoryError(f"qkv's kernel: not enough scratch memory for {tuple(tensors.x.shape)} tokens; pass fewer.")
    return status == 0
