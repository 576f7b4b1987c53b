"""Cache appends by the kernel, and rounding to int8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.kernels.binding import loaded
from qkv.kernels.structs import DTYPES, QUANTIZATION, scales, view

_MIN_PARALLEL = 1 << 14
"""Number of elements from which several threads copy or round faster than one."""


def quantize(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Writes ``x (B, heads, L, width)`` as int8 codes and a scale per row ``(B, heads, L)``.

    All tensors must satisfy `can_bypass_dispatcher`.

    Raises:
        ValueError: for codes and scales of other shapes, which the kernel would write beyond.
    """
    if codes.shape != x.shape or scale.shape != x.shape[:3]:
        raise ValueError(
            f"qkv's kernel: codes and scale must be {tuple(x.shape)} and {tuple(x.shape[:3])}; got "
            f"{tuple(codes.shape)} and {tuple(scale.shape)}."
        )
    packed = QUANTIZATION.pack(DTYPES[x.dtype], *x.shape, *view(x), *view(codes), *scales(scale), _threads_for(x))
    loaded().quantize(packed)


def append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, start: int
) -> bool:
    """Writes new tokens into buffers, from slot ``start`` on. All tensors must satisfy `can_bypass_dispatcher`.

    Args:
        k, v: ``(B, Hkv, L, width)``.
        keys, values: ``(B, Hkv, capacity, width)``, in the dtype of the tokens or in int8.
        k_scale, v_scale: float32 ``(B, Hkv, capacity)``, if keys and values are int8.

    Returns:
        True if written. False, with nothing written, for tensors that do not fit together or are not supported.
    """
    write = loaded().append
    return write is not None and write(k, v, keys, values, k_scale, v_scale, start, _threads_for(k)) == 0


def append_pages(
    k: Tensor, v: Tensor, parts: Sequence[Tensor], table: Tensor, starts: Tensor | None, start: int
) -> bool:
    """Writes new tokens into pages. All tensors must satisfy `can_bypass_dispatcher`.

    Args:
        k, v: ``(B, Hkv, L, width)``.
        parts: keys and values ``(pages, Hkv, page_size, width)``, in the dtype of the tokens; or in int8, with float32
            scales of both ``(pages, Hkv, page_size)``.
        table: int64 ``(B, entries)``, the pages of each row of the batch in order.
        starts: int64 ``(B,)``, where in its pages the first token of each row goes; ``start`` in all if None.

    Returns:
        As `append`.
    """
    write, memory = loaded().append_pages, (*parts, None, None)[:4]
    return write is not None and write(k, v, *memory, table, starts, start, _threads_for(k)) == 0


def _threads_for(x: Tensor) -> int:
    """Number of threads with which to copy or round ``x``."""
    return torch.get_num_threads() if x.numel() >= _MIN_PARALLEL else 1
