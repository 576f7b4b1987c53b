"""The compiled CPU kernel."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkv import kernels
from qkv.backends.result import Result
from qkv.masks import FULL, Mask
from qkv.problem import Problem

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
    scale: float | None,
) -> Tensor | None:
    """Solves the plainest of calls before a problem is posed, which takes longer than a few tokens of attention do.

    None for a call that is not plain, or wrong: posing it says what is the matter.
    """
    if not kernels.can_bypass_dispatcher(q, k, v) or torch.is_autocast_enabled("cpu"):
        return None
    if not q.dim() == k.dim() == v.dim() == 4:
        return None
    if mask is not FULL and (type(mask) is not Mask or mask.document_ids is not None or mask.allow is not None):
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
    mask = problem.mask
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,)) if problem.dropout else None
    call = kernels.Call(
        problem.q,
        problem.k,
        problem.v,
        problem.k_scale,
        problem.v_scale,
        mask.keep,
        mask.lengths,
        mask.document_ids,
        mask.allow,
        problem.bias,
        problem.alibi,
        problem.sink_logits,
        seed,
        mask.left,
        mask.right,
        mask.sink_tokens,
        problem.offset,
        problem.scale,
        problem.softcap or 0.0,
        problem.dropout,
    )
    watched = kernels.is_tracing()
    if watched or problem.needs_grad:
        out, lse = torch.ops.qkv.forward(*call) if watched else kernels.forward_with_gradients(call)
        return Result(out, lse if problem.wants_lse else None)
    return Result(*kernels.forward(call, wants_lse=problem.wants_lse))
