"""`fast_rms_norm`: rows divided by their root mean square."""

import enum

import torch
from torch import Tensor

from qkv.kernels.binding import loaded

_MIN_PARALLEL = 1 << 14
"""Numbers from which on several threads are faster than one."""


class Gain(enum.IntEnum):
    """How a row in fp32 becomes the result, as in native/src/abi/rms_norm.h."""

    ROUNDED = 0
    """rounded to the dtype, times the gains: Llama"""
    WIDENED = 1
    """times the gains in fp32, rounded once: ``nn.RMSNorm``, OLMo, gpt-oss"""
    ONE_MORE = 2
    """times 1 + the gains in fp32, rounded once: Gemma"""


def fast_rms_norm(x: Tensor, gains: Tensor | None, eps: float, gain: Gain) -> Tensor | None:
    """``x * rsqrt(mean(x^2) + eps) * gains`` over the last dimension, in one call of C.

    Tensors must satisfy `can_bypass_dispatcher`. All is rounded as by torch's operators in fp32, apart from the sum of
    squares, whose order depends on the width alone.

    Args:
        x: ``(..., width)`` in fp32, bf16 or fp16.
        gains: ``(width,)`` in the dtype of x; None for ones.
        eps: added to the mean square.
        gain: what is rounded before the product with the gains.

    Returns:
        A contiguous tensor like x; None for tensors that do not fit together or are not supported. Shapes, dtypes and
        strides are checked in C (native/src/abi/fast_rms_norm.cpp).
    """
    call = loaded().fast_rms_norm
    if call is None:
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    threads = torch.get_num_threads() if x.numel() >= _MIN_PARALLEL else 1
    return None if call(x, gains, out, eps, gain, threads) else out
