"""What torch itself computes for a problem, in the same dtype: the measure of how much error is allowed."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor


class Peer(NamedTuple):
    out: Tensor
    lse: Tensor


@cache
def visible(case: Case) -> Tensor:
    """The rule as a dense mask (B, H, Lq, Lk)."""
    rule = case.rule()
    seen = torch.zeros(case.batch, case.heads, case.lq, case.lk, dtype=torch.bool)
    per_head = rule.allow is not None and rule.allow.shape[1] > 1
    for b in range(case.batch):
        for h in range(case.heads if per_head else 1):
            for i in range(case.lq):
                seen[b, h if per_head else slice(None), i] = rule.sees(b, h, i, case.lk, case.offset_of(b))
    return seen


def compute(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Torch's fused kernel where it can express the case, else the formula in torch operations, all in one dtype."""
    if case.softcap is not None:
        return formula(case, inputs)[0]
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask = q.new_zeros(case.batch, case.heads, case.lq, case.lk)
    mask = (mask + _additive(case, inputs)).masked_fill(~visible(case).to(q.device), -torch.inf)
    if case.sinks:
        # A key of zeros scores 0; the mask lifts it to the sink logit, and its value of zeros adds nothing.
        sinks = inputs["sink_logits"][None, :, None, None].expand(case.batch, -1, case.lq, 1)
        k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), torch.cat([mask, sinks], dim=-1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=case.scale, enable_gqa=case.heads != case.kv_heads
    )


@cache
def peer(case: Case, dtype: torch.dtype) -> Peer:
    """What torch makes of the inputs as rounded to ``dtype``."""
    inputs = case.inputs(dtype)
    return Peer(compute(case, inputs), formula(case, inputs)[1])


def _additive(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    added = inputs["q"].new_zeros(1, 1, 1, 1)
    if "bias" in inputs:
        added = added + inputs["bias"]
    if "alibi" in inputs:
        added = added - inputs["alibi"][:, None, None] * case.distance().to(added.device)
    return added


def formula(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) in torch operations in the dtype of the inputs; in fp64 it is the oracle of gradients."""
    q, group = inputs["q"], case.heads // case.kv_heads
    k, v = inputs["k"].repeat_interleave(group, 1), inputs["v"].repeat_interleave(group, 1)
    scale = case.width**-0.5 if case.scale is None else case.scale
    scores = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = (scores + _additive(case, inputs)).masked_fill(~visible(case).to(q.device), -torch.inf)
    if case.sinks:
        sinks = inputs["sink_logits"][None, :, None, None].expand(case.batch, -1, case.lq, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    lse = scores.masked_fill(hidden, 0).logsumexp(-1).masked_fill(hidden.squeeze(-1), -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", weights[..., : case.lk], v), lse


def gradient_terms(case: Case, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The sum of the absolute terms behind each gradient, in fp64.

    The rounding error of a sum is bounded by its terms, not by its value: they may cancel. With weights P, outputs O
    and upstream dO, the terms of dV are ``P dO``, those of the scores ``P (|dO| |V| + rowsum(|dO| |O|))``.
    """
    wide = {name: tensor.detach().double() for name, tensor in inputs.items()}
    group = case.heads // case.kv_heads
    q, k, v = wide["q"].abs(), wide["k"].abs().repeat_interleave(group, 1), wide["v"].abs().repeat_interleave(group, 1)
    out, lse = formula(case, wide)
    ones = {**wide, "v": torch.eye(case.lk, dtype=torch.float64).expand(case.batch, case.kv_heads, -1, -1)}
    weights = formula(case, ones)[0]
    d_out = upstream.double().abs()
    row = (d_out * out.abs()).sum(-1, keepdim=True)
    d_scores = weights * (d_out @ v.mT + row)
    scale = abs(case.width**-0.5 if case.scale is None else case.scale)

    def per_kv_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (case.kv_heads, group)).sum(2)

    terms = {
        "q": scale * d_scores @ k,
        "k": per_kv_head(scale * d_scores.mT @ q),
        "v": per_kv_head(weights.mT @ d_out),
    }
    if "bias" in wide:
        terms["bias"] = d_scores.sum_to_size(wide["bias"][(None,) * (4 - wide["bias"].dim())].shape)
        terms["bias"] = terms["bias"].view(wide["bias"].shape)
    if "alibi" in wide:
        terms["alibi"] = (d_scores * case.distance()).sum((0, 2, 3))
    if case.sinks:
        share = (wide["sink_logits"][:, None] - lse).exp()
        terms["sink_logits"] = (share[..., None] * row).sum((0, 2, 3))
    return terms
