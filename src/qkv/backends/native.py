"""The compiled CPU kernel as a backend, and the fast path to it."""

import math
from typing import Any

import torch
from torch import Tensor

from qkv import kernels
from qkv.backends.result import Result
from qkv.masks import FULL, Mask
from qkv.pages import Pages
from qkv.problem import Problem
from qkv.scores import Draw, new_seed
from qkv.torch_internals import forward_mode_is_active, transforms_are_active

NAME = "native"

MAX_POSITION = 1 << 30
"""Bound of offsets, since the kernel has positions of 32 bits."""


def fast_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: Mask,
    offset: int | Tensor | None,
    scale: float | None,
    pages: Pages | None = None,
) -> Tensor | None:
    """`attention` without validation, which costs more than attention over a few tokens.

    Eligible are exact tensors without gradients, a mask of an interval and padding, and no score option but scale.
    Shapes, dtypes and strides are checked in C.

    Returns:
        None for a call that is not eligible, or invalid; the caller then validates it, which says what is wrong.
    """
    if not kernels.can_bypass_dispatcher(q, k, v) or torch.is_autocast_enabled("cpu"):
        return None
    if not q.dim() == k.dim() == v.dim() == 4:
        return None
    if mask is not FULL and (type(mask) is not Mask or mask.is_pairwise or mask.chunk or mask.prefix_tokens):
        return None
    if pages is not None and not (type(pages) is Pages and type(pages.table) is Tensor and type(pages.length) is int):
        return None
    offsets = offset if isinstance(offset, Tensor) else None
    for extra in (k_scale, v_scale, offsets, mask.keep, mask.lengths):
        if extra is not None and (type(extra) is not Tensor or extra.requires_grad or extra.is_neg()):
            return None
    if offsets is not None:
        offset = 0
    elif offset is None:
        if mask is not FULL and mask.is_positional and q.shape[2] != (k.shape[2] if pages is None else pages.length):
            return None
        offset = 0
    elif type(offset) is not int or not -MAX_POSITION < offset < MAX_POSITION:
        return None
    if scale is None:
        scale = (q.shape[3] or 1) ** -0.5
    elif type(scale) is not float or not -math.inf < scale < math.inf:
        return None
    tensors = (q, k, v, k_scale, v_scale, pages, offsets, mask.keep, mask.lengths)
    return kernels.fast_forward(*tensors, mask.left, mask.right, mask.sink_tokens, offset, scale)


def why_not(problem: Problem) -> list[str]:
    q, k, v = problem.q, problem.k, problem.v
    absent = kernels.absence()
    if absent is not None:
        return [absent]
    reasons: list[str] = []
    if not q.is_cpu:
        reasons.append("the kernel runs on CPU")
    if q.dtype is torch.float64:
        reasons.append("the kernel has no fp64")
    if kernels.is_tracing() and torch.onnx.is_in_onnx_export():
        reasons.append("ONNX has no operator for the kernel")
    elif torch.compiler.is_compiling():
        pass
    elif transforms_are_active() or not all(map(kernels.is_exact_tensor, (q, k, v))):
        reasons.append("the kernel takes neither tensor subclasses nor functorch transforms")
    if forward_mode_is_active():
        reasons.append("the kernel has no forward-mode derivatives")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        reasons.append("the last dimension of q, k and v must be contiguous for the kernel")
    if q.shape[3] == 0 or v.shape[3] == 0:
        reasons.append("the kernel takes no heads of width 0")
    if problem.k_scale is not None and problem.needs_grad:
        reasons.append("the kernel has no gradients over int8 keys and values")
    if not isinstance(problem.offset, Tensor) and not -MAX_POSITION < problem.offset < MAX_POSITION:
        reasons.append("the kernel counts positions in 32 bits")
    return reasons


def why_rather_not(problem: Problem) -> list[str]:
    return []  # Where torch's kernels are faster, reaching them costs more than it saves (benchmarks/grid.py).


def run(problem: Problem) -> Result:
    return Result(*kernels.forward(call_of(problem), wants_lse=problem.wants_lse, needs_grad=problem.needs_grad))


def call_of(problem: Problem) -> kernels.Call:
    """The arguments of the kernel for the problem."""
    q, k, v, k_scale, v_scale, mask, offset, (*scores, draw), _, pages = problem
    if draw is None:
        draw = Draw(new_seed() if problem.scores.dropout else None)
    by_row = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    of_keys: list[Any] = [k_scale, v_scale, *(pages or (None, 0))]
    arguments: list[Any] = [q, k, v, *of_keys, *by_row, *mask.values(), *scores, *draw]
    return kernels.Call(*arguments)
