"""`fast_linear` and the operator ``qkv::linear``: few rows with the weight of a linear layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from qkv.kernels.binding import absence, loaded
from qkv.kernels.structs import DTYPES, PROJECTION, address
from qkv.tracing import is_exact_tensor

MOST_ROWS = 16
"""Rows that the kernel takes at a time, as in native/src/abi/projection.h."""

_TAKES_ANY_ROWS = {("avx2", torch.bfloat16), ("avx2", torch.float16)}
"""Instruction sets and dtypes in which torch is slower whatever the rows (docs/log.md, step 111)."""


_NEVER = 1 << 62


class _Crossovers(NamedTuple):
    """By dtype: from which size of a weight on the kernel is faster than torch, by the largest number of rows."""

    f32: dict[int, int]
    bf16: dict[int, int]
    f16: dict[int, int]


_AVX2 = _Crossovers(
    f32={1: 1 << 17, 8: 1 << 18, MOST_ROWS: 1 << 20},
    bf16={1: 1 << 18, 4: 1 << 14, MOST_ROWS: 1 << 12},
    f16={1: 1 << 19, 2: 1 << 16, 4: 1 << 14, MOST_ROWS: 1 << 12},
)
"""docs/log.md, steps 109 and 110"""
_AVX512 = _Crossovers(
    f32={4: 1 << 20, MOST_ROWS: _NEVER},
    bf16={8: 1 << 18, MOST_ROWS: _NEVER},
    f16={8: 1 << 19, MOST_ROWS: _NEVER},
)
"""Not measured: guesses on the safe side (docs/log.md, step 109)."""
_LARGE = 1 << 20
"""Numbers of a weight whose product with a row takes longer than what Python saves."""
_FEW_COLUMNS = 256
"""With fewer, torch is faster in fp32."""


def _by_rows(crossovers: dict[int, int]) -> tuple[int, ...]:
    """The crossover for 0 to `MOST_ROWS` rows."""
    return (_NEVER, *(crossovers[min(most for most in crossovers if rows <= most)] for rows in range(1, MOST_ROWS + 1)))


_FEWEST = {
    (isa, dtype): _by_rows(fewest)
    for isa, crossovers in {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": _AVX512, "amx": _AVX512}.items()
    for dtype, fewest in zip((torch.float32, torch.bfloat16, torch.float16), crossovers, strict=True)
}

_LEAST = {key: min(fewest) for key, fewest in _FEWEST.items()}


def has_few_rows(x: Tensor) -> bool:
    """Whether ``x (..., in_features)`` is exactly a Tensor on a CPU, with 1 to `MOST_ROWS` rows.

    Where torch has no fast product of the dtype, any number of rows counts as few.
    """
    if not is_exact_tensor(x) or not x.is_cpu or x.dim() == 0 or not x.numel() or absence() is not None:
        return False
    return x.numel() <= MOST_ROWS * x.shape[-1] or (loaded().isa, x.dtype) in _TAKES_ANY_ROWS


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes ``F.linear(x, weight)`` faster than torch, if it can compute it."""
    if absence() is not None or not is_exact_tensor(weight) or not is_exact_tensor(x):
        return False
    isa, dtype, size = loaded().isa, x.dtype, weight.numel()
    if size < _LEAST.get((isa, dtype), _NEVER) or not has_few_rows(x):  # small weights first: they are in a hurry
        return False
    if _is_as_fast_by_torch(x):
        return False
    numbers, columns = x.numel(), x.shape[-1]
    rows = min(numbers // columns, MOST_ROWS)
    return size >= _FEWEST[isa, dtype][rows] and (columns >= _FEW_COLUMNS or dtype is not torch.float32)


def _is_as_fast_by_torch(x: Tensor) -> bool:
    """Whether torch reads a large weight at the speed of memory: for one row in fp32, with one thread."""
    return x.numel() == x.shape[-1] and x.dtype is torch.float32 and torch.get_num_threads() == 1


def gains_from_rows(x: Tensor) -> bool:
    """Whether the kernel multiplies so many rows with some weight faster than torch: the first thing to ask of a call,
    before its modules are looked at.
    """
    if not has_few_rows(x):
        return False
    rows, fewest = x.numel() // x.shape[-1], _FEWEST.get((loaded().isa, x.dtype))
    return fewest is not None and rows <= MOST_ROWS and fewest[rows] != _NEVER


def gains_from_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a call of the kernel that takes the place of several products with such weights is faster than torch.

    It also saves what Python takes between them, so for 1 to `MOST_ROWS` rows it is where `is_faster` holds for some
    weight; not where torch reads large weights at the speed of memory.
    """
    return gains_from_rows(x) and (weight.numel() < _LARGE or not _is_as_fast_by_torch(x))


def is_faster_in_programs(x: Tensor, weight: Tensor) -> bool:
    """`is_faster`, with one answer for all numbers of rows and threads, so that one program serves them.

    In fp32 it is of large weights alone, which torch reads as fast with one thread and slower with more.
    """
    if not is_exact_tensor(weight) or not has_few_rows(x):
        return False
    fewest = _FEWEST.get((loaded().isa, x.dtype))
    if fewest is None:
        return False
    most = sum(least != _NEVER for least in fewest)
    least = max(fewest[1], _LARGE) if x.dtype is torch.float32 else fewest[1]
    return x.numel() <= most * x.shape[-1] and weight.numel() >= least


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``F.linear`` in one call of C, which reads tensors through DLPack. They must satisfy `can_bypass_dispatcher`.

    Args:
        x: ``(..., in_features)``, computed `MOST_ROWS` rows at a time.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.

    Returns:
        ``(..., out_features)``; None for tensors that do not fit together or are not supported. Shapes, dtypes and
        strides are checked in C (native/src/abi/fast_project.cpp).
    """
    call = loaded().fast_project
    if call is None:
        return None
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return None if call(x, weight, bias, out, torch.get_num_threads()) else out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``qkv::linear`` on a CPU: by the kernel if it takes the product, else by torch."""
    if not _fits(x, weight, bias):
        return _on_any_device(x, weight, bias)
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty((*x.shape[:-1], out_features))
    dtype = DTYPES[x.dtype]
    packed = PROJECTION.pack(
        *(dtype, dtype, rows.shape[0], in_features, out_features),
        *(rows.data_ptr(), rows.stride(0), weight.data_ptr(), weight.stride(0)),
        *(address(bias), out.data_ptr(), out_features),
    )
    if loaded().project(packed, 1, torch.get_num_threads()):
        raise MemoryError(f"qkv's kernel: not enough scratch memory for x {tuple(x.shape)}.")
    return out


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes the product."""
    return (
        absence() is None
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.dim() == 2
        and weight.stride(1) == 1
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and weight.data_ptr() != 0
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.stride(0) == 1))
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, by products of torch."""
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    return (
        d_out @ weight if wants_x else None,
        d_rows.mT @ rows if wants_weight else None,
        d_rows.sum(0) if wants_bias else None,
    )


def _on_any_device(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _on_any_device, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("linear", F.linear, _key)
library.register_fake("qkv::linear", _on_any_device, lib=_LIBRARY)
library.register_autograd("qkv::linear", _differentiate, setup_context=_save, lib=_LIBRARY)
