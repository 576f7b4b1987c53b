"""`Result`: what a backend returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.problem import Problem


class Result(NamedTuple):
    """Attention, and on request the log of its normaliser."""

    out: Tensor
    """(B, H, Lq, Dv) in the dtype of q"""
    lse: Tensor | None
    """(B, H, Lq), log of the softmax normaliser, fp32 (fp64 for fp64); None where the problem did not ask for it"""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and lse for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def see_nothing(problem: Problem) -> Result:
    """The result of a problem without keys, or without queries: 0, and in the normaliser the sink logit alone.

    For backends whose kernels take no empty tensors. It depends on all tensors of the problem, so that they get a
    gradient of 0 rather than None.
    """
    q, v, sinks = problem.q, problem.v, problem.scores.sink_logits
    zero = sum(tensor.flatten()[:0].sum() for tensor in (q, problem.k, v, *problem.scores.tensors()))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype)) + zero
    if sinks is not None:
        lse = torch.where(sinks[:, None] == -torch.inf, lse, sinks.to(lse.dtype)[:, None])
    return Result(q.new_zeros(*q.shape[:3], v.shape[3]) + zero, lse if problem.wants_lse else None)
