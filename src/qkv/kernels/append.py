"""New tokens of a cache, written by the kernel, and rounded to int8."""

import torch
from torch import Tensor

from qkv.kernels.binding import loaded
from qkv.kernels.structs import DTYPES, QUANTIZATION, scales, view

_WORTH_THREADS = 1 << 14
"""Numbers to copy or round from which on several threads are faster than one."""


def quantize(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Writes rows of ``x (B, heads, L, width)`` in int8, and the scale ``(B, heads, L)`` of each: for plain tensors."""
    packed = QUANTIZATION.pack(DTYPES[x.dtype], *x.shape, *view(x), *view(codes), *scales(scale), _threads_for(x))
    loaded().quantize(packed)


def append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, start: int
) -> bool:
    """Writes new tokens at ``start`` in their buffers, for tensors that `can_bypass_dispatcher`.

    Args:
        k, v: ``(B, Hkv, L, width)``.
        keys, values: ``(B, Hkv, room, width)``, in the dtype of the tokens or in int8.
        k_scale, v_scale: float32 ``(B, Hkv, room)``, where keys and values are int8.

    Returns:
        False, with nothing written, where they do not fit together or need a longer way.
    """
    write = loaded().append
    return write is not None and write(k, v, keys, values, k_scale, v_scale, start, _threads_for(k)) == 0


def _threads_for(x: Tensor) -> int:
    """Threads that copy or round its numbers."""
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1
