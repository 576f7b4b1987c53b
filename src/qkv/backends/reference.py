"""The specification: attention as its formula, one line a step, in full precision and with all scores in memory."""

import torch
from torch import Tensor

from qkv.backends.nonfinite import add_visible_nonfinite, zero_nonfinite
from qkv.backends.result import Result, accumulation_dtype
from qkv.problem import Problem, trim

NAME = "reference"


def why_not(problem: Problem) -> list[str]:
    return []


def why_rather_not(problem: Problem) -> list[str]:
    return []


def run(problem: Problem) -> Result:
    clean, nonfinite = zero_nonfinite(trim(problem).dequantized())
    weights, lse = weights_and_lse(clean)
    if clean.scores.dropout:
        weights = torch.dropout(weights, clean.scores.dropout, train=True)
    values = clean.v.to(weights.dtype).repeat_interleave(clean.group, dim=1)
    out = (weights @ values).to(clean.q.dtype)
    return add_visible_nonfinite(Result(out, lse if clean.wants_lse else None), nonfinite)


def weights_and_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """The weights (B, H, Lq, Lk), in the accumulation dtype and before dropout, and the lse (B, H, Lq)."""
    scores, sink_logits = _scores(problem), problem.scores.sink_logits
    # Where every score is -inf, subtract 0 instead of -inf: exp then gives the zeros that the row should have.
    top = scores.detach().amax(dim=-1, keepdim=True) if problem.lk else scores.new_zeros(*scores.shape[:-1], 1)
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    terms = (scores - top).exp()
    total = terms.sum(dim=-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    return terms / total, lse.squeeze(-1)


def _scores(problem: Problem) -> Tensor:
    scale, softcap, bias, alibi, *_ = problem.scores
    dtype = accumulation_dtype(problem.q.dtype)
    keys = problem.k.to(dtype).repeat_interleave(problem.group, dim=1)
    scores = scale * (problem.q.to(dtype) @ keys.transpose(2, 3))  # mT is not in ONNX
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if alibi is not None:
        scores = scores - alibi.to(dtype)[:, None, None] * problem.distance().to(dtype)
    if not problem.mask.is_full:
        scores = scores.masked_fill(~problem.visible(), -torch.inf)
    return scores
