"""Keys and values that are not finite: without influence on queries that may not see them, NaN or inf for the others.

Kernels that multiply a masked weight of 0 with a value of NaN get NaN, and so do their gradients. `shield` therefore
computes on finite stand-ins, and `restore` gives each query the non-finite values that it really sees.

On a GPU, looking for them waits and restoring them takes many times as long as attention itself. There, keys that
padding hides from all become zeros, whatever they held; among the others, a NaN spreads as it does in torch's kernels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.backends.result import Result, accumulation_dtype
from qkv.problem import Problem


class Poison(NamedTuple):
    """What the visible non-finite keys and values add to a result: 0, inf, -inf or NaN."""

    out: Tensor
    """(B, H, Lq, Dv)"""
    lse: Tensor
    """(B, H, Lq)"""


def shield(problem: Problem) -> tuple[Problem, Poison | None]:
    """The problem with finite keys and values, and what `restore` has to add; None for nothing."""
    if problem.mask.is_full:
        return problem, None  # Nothing is hidden: whatever the kernel propagates is seen.
    if not problem.k.is_cpu:
        return _without_padding(problem), None
    if _can_read(problem.k) and _all_finite(problem.k) and _all_finite(problem.v):
        return problem, None
    clean = problem._replace(
        k=torch.nan_to_num(problem.k, nan=0.0, posinf=0.0, neginf=0.0),
        v=torch.nan_to_num(problem.v, nan=0.0, posinf=0.0, neginf=0.0),
    )
    with torch.no_grad():
        return clean, _poison(problem)


def restore(result: Result, poison: Poison | None) -> Result:
    """The result with the non-finite keys and values that its rows see."""
    if poison is None:
        return result
    return Result(result.out + poison.out, None if result.lse is None else result.lse + poison.lse)


def _can_read(tensor: Tensor) -> bool:
    """Whether looking at values is possible: not while tracing or batching."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _without_padding(problem: Problem) -> Problem:
    keep = problem.mask.keep_keys(problem.lk)
    if keep is None:
        return problem
    hidden = ~keep[:, None, :, None]
    return problem._replace(k=problem.k.masked_fill(hidden, 0), v=problem.v.masked_fill(hidden, 0))


def _all_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all its terms are, and costs a seventh of isfinite().all(). Where it overflows, the
    # answer is a false alarm: correct, only slower.
    total = tensor.sum() if tensor.dtype is not torch.float16 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def _poison(problem: Problem) -> Poison:
    bad_key = ~problem.k.isfinite().all(dim=-1, keepdim=True)
    nan = problem.v.isnan() | bad_key
    flags = torch.cat([nan | (problem.v == torch.inf), nan | (problem.v == -torch.inf), bad_key], dim=-1)
    seen = _any_visible(problem, flags)
    if seen.shape[1] != problem.num_heads:
        seen = seen.repeat_interleave(problem.group, dim=1)
    width = problem.v.shape[3]
    up, down, key = seen.split([width, width, 1], dim=-1)
    infinity = torch.where(up, torch.inf, problem.v.new_zeros(()))
    lse_dtype = accumulation_dtype(problem.q.dtype)
    return Poison(
        out=infinity - torch.where(down, torch.inf, problem.v.new_zeros(())),
        lse=torch.where(key.squeeze(-1), torch.nan, torch.zeros((), dtype=lse_dtype, device=key.device)),
    )


def _any_visible(problem: Problem, flags: Tensor) -> Tensor:
    """For flags (B, Hkv, Lk, C) of the keys: whether each query sees a flagged one, (B, Hkv or H, Lq, C)."""
    mask, lk = problem.mask, problem.lk
    if mask.document_ids is not None or mask.allow is not None:
        visible = problem.visible().float()
        if visible.shape[1] != 1:
            flags = flags.repeat_interleave(problem.group, dim=1)
        return visible @ flags.float() > 0
    # What an interval shows is a difference of two running counts: linear in the length, without a dense mask.
    keep = mask.keep_keys(lk)
    if keep is not None:
        flags = flags & keep[:, None, :, None]
    count = F.pad(flags.cumsum(dim=2, dtype=torch.int32), (0, 0, 1, 0))
    position = torch.arange(problem.lq, device=flags.device) + problem.offset
    stop = torch.full_like(position, lk) if mask.right is None else (position + mask.right + 1).clamp(0, lk)
    start = torch.zeros_like(position) if mask.left is None else (position - mask.left).clamp(min=0)
    start = torch.minimum(start, stop)
    before = count[:, :, start.clamp(max=mask.sink_tokens)]
    return count[:, :, stop] - count[:, :, start] + before > 0
