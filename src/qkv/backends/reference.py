"""The specification: the formula of attention, one line per step, in full precision and with all scores in memory."""

import torch
from torch import Tensor

from qkv.backends.dropout import kept_weights
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
    if clean.scores.draw is not None:
        weights = weights * kept_weights(clean, weights.dtype)
    elif clean.scores.dropout:
        weights = torch.dropout(weights, clean.scores.dropout, train=True)
    values = clean.v.to(weights.dtype).repeat_interleave(clean.group, dim=1)
    out = _product(weights, values).to(clean.q.dtype)
    return add_visible_nonfinite(Result(out, lse if clean.wants_lse else None), nonfinite)


def weights_and_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax weights (B, H, Lq, Lk) before dropout, in the accumulation dtype, and the lse (B, H, Lq)."""
    scores, sink_logits = _scores(problem), problem.scores.sink_logits
    # If every score is -inf, subtract 0 instead of -inf: exp then gives 0 instead of NaN.
    row_max = scores.detach().amax(dim=-1, keepdim=True) if problem.lk else scores.new_zeros(*scores.shape[:-1], 1)
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype)[:, None, None]
        row_max = torch.maximum(row_max, sink.detach())
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    terms = (scores - row_max).exp()
    row_sum = terms.sum(dim=-1, keepdim=True)
    if sink_logits is not None:
        row_sum = row_sum + (sink - row_max).exp()
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    lse = (row_max + row_sum.log()).masked_fill(empty, -torch.inf)
    return terms / row_sum, lse.squeeze(-1)


def _scores(problem: Problem) -> Tensor:
    """Masked scores (B, H, Lq, Lk), in the accumulation dtype."""
    scale, softcap = problem.scores.scale, problem.scores.softcap
    bias, alibi = problem.scores.bias, problem.scores.alibi
    dtype = accumulation_dtype(problem.q.dtype)
    keys = problem.k.to(dtype).repeat_interleave(problem.group, dim=1)
    scores = scale * _product(problem.q.to(dtype), keys.transpose(2, 3))  # mT is not in ONNX
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if alibi is not None:
        scores = scores - alibi.to(dtype)[:, None, None] * problem.distance().to(dtype)
    if not problem.mask.is_full:
        scores = scores.masked_fill(~problem.visible(), -torch.inf)
    return scores


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of both. Under torch.autocast, inputs have been rounded before, and are not once more."""
    if a.is_meta or not torch.is_autocast_enabled(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
