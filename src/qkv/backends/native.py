"""The compiled CPU kernel."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkv import kernels
from qkv.backends.result import Result
from qkv.masks import FULL, Mask
from qkv.problem import Problem
from qkv.scores import ScoreOptions, only_scale

NAME = "native"

LARGEST_POSITION = 1 << 30
"""Positions are 32 bits wide in the kernel."""


def fast_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: Mask,
    offset: int | None,
    scores: ScoreOptions,
) -> Tensor | None:
    """`attention` without validation, which would take longer than attention over a few tokens.

    Eligible are plain tensors without gradients, a mask of an interval and padding, and scores that are only scaled.
    What C can see for itself, shapes, dtypes and strides, is checked there.

    Returns:
        None for a call that is not eligible, or wrong: the caller then validates it, for a message that says why.
    """
    if not only_scale(scores) or not kernels.can_bypass_dispatcher(q, k, v) or torch.is_autocast_enabled("cpu"):
        return None
    if not q.dim() == k.dim() == v.dim() == 4:
        return None
    if mask is not FULL and (type(mask) is not Mask or mask.is_pairwise):
        return None
    for extra in (k_scale, v_scale, mask.keep, mask.lengths):
        if extra is not None and (type(extra) is not Tensor or extra.requires_grad or extra.is_neg()):
            return None
    if offset is None:
        if mask is not FULL and mask.is_positional and q.shape[2] != k.shape[2]:
            return None
        offset = 0
    elif type(offset) is not int or not -LARGEST_POSITION < offset < LARGEST_POSITION:
        return None
    scale = scores.get("scale")
    if scale is None:
        scale = (q.shape[3] or 1) ** -0.5
    elif type(scale) is not float or not -math.inf < scale < math.inf:
        return None
    tensors = (q, k, v, k_scale, v_scale, mask.keep, mask.lengths)
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
        reasons.append("ONNX does not know the kernel")
    elif torch.compiler.is_compiling():
        pass
    elif torch._C._are_functorch_transforms_active() or not all(map(kernels.is_plain, (q, k, v))):
        reasons.append("the kernel takes plain tensors, outside of functorch")
    if forward_ad._current_level >= 0:
        reasons.append("the kernel has no forward-mode derivatives")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        reasons.append("the last dimension of q, k and v must be contiguous for the kernel")
    if q.shape[3] == 0 or v.shape[3] == 0:
        reasons.append("the kernel takes no heads of width 0")
    if problem.k_scale is not None and problem.needs_grad:
        reasons.append("the kernel has no gradients over int8 keys and values")
    if not -LARGEST_POSITION < problem.offset < LARGEST_POSITION:
        reasons.append("the kernel counts positions in 32 bits")
    return reasons


def why_rather_not(problem: Problem) -> list[str]:
    return []  # Measured: benchmarks/grid.py. Where torch's kernels win, the way to them costs more than it gains.


def run(problem: Problem) -> Result:
    return Result(*kernels.forward(call_of(problem), wants_lse=problem.wants_lse, needs_grad=problem.needs_grad))


def call_of(problem: Problem) -> kernels.Call:
    """The call of the kernel that solves the problem."""
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,)) if problem.scores.dropout else None
    q, k, v, k_scale, v_scale, mask, offset, scores, _ = problem
    arguments: list[Any] = [q, k, v, k_scale, v_scale, offset, *mask.values(), *scores, seed]
    return kernels.Call(*arguments)
