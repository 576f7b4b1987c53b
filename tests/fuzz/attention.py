"""Random calls of attention, forward and backward, against the formula in fp64, on every backend and instruction set.

    PYTHONPATH=tests python -m fuzz.attention [--forward N] [--backward N] [--seed S]

A draw of the generator is one problem; each solver's answer to it, and in the forward pass each of its answers with and
without the lse, is one case. Every number of a result is compared with
a bound of its rounding errors, and with the table of non-finite numbers in DESIGN.md. A draw that fails is printed
with its seed, which reproduces it; seeds that have failed are kept in `SEEDS` of test_fuzz.py.
"""

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from solver import SOLVERS, Solver
from torch import Tensor

import qkv
from qkv import Mask
from qkv.problem import make_problem

DTYPES = (*[torch.float32] * 4, *[torch.bfloat16] * 2, *[torch.float16] * 2, torch.float64)
LENGTHS = (1, 1, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64, 65, 97, 131)
LONG = (193, 257, 481, 577)
WIDTHS = (1, 3, 8, 13, 16, 24, 32, 33, 64, 64, 80, 128)
WHOLE_ROWS = ("contiguous", "contiguous", "tokens first", "slice")
WIDTHS_APART = ("every other", "transposed", "three in one")
NOT_FINITE = (math.nan, math.inf, -math.inf)
EXAMPLES = 3
"""Of each kind of fault that are printed."""


@dataclass
class Draw:
    """One problem: the arguments, and the pairs that its mask shows as a dense tensor."""

    seed: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    visible: Tensor
    """(B, H, Lq, Lk)"""
    offset: int | Tensor | None
    first: Tensor
    """The position of the first query of each row of the batch: the offset, given or implied."""
    scale: float | None
    softcap: float | None
    threads: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """bias, alibi and sink_logits, where there are any"""

    @property
    def options(self) -> dict[str, Any]:
        return {
            "mask": self.mask,
            "offset": self.offset,
            "scale": self.scale,
            "softcap": self.softcap,
            **self.tensors,
        }

    @property
    def distance(self) -> Tensor:
        """How far each query is from each key, (B, 1, Lq, Lk)."""
        position = self.first[:, None] + torch.arange(self.q.shape[2])
        return (position[:, None, :, None] - torch.arange(self.k.shape[2])).abs()

    @property
    def factor(self) -> float:
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}/{tuple(x.stride())}" for name, x in self._named())
        numbers = f"offset={self.offset}, scale={self.scale}, softcap={self.softcap}, threads={self.threads}"
        return f"seed {self.seed}: {self.q.dtype}, {shapes}, {self.mask!r}, {numbers}"

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("q", self.q), ("k", self.k), ("v", self.v), *self.tensors.items())


def draw(seed: int) -> Draw:
    """The problem of a seed."""
    chance = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    dtype = chance.choice(DTYPES)
    kv_heads, group = chance.choice((1, 1, 2, 3)), chance.choice((1, 1, 2, 3, 4, 5, 7, 9))
    batch, heads = chance.choice((1, 1, 2, 3)), kv_heads * group
    lq, lk = chance.choice(LENGTHS), chance.choice(LENGTHS)
    if chance.random() < 0.04:
        lk = chance.choice(LONG)
        heads, batch = kv_heads * min(group, 2), 1
    if chance.random() < 0.3:
        lk = lq
    width = chance.choice(WIDTHS)
    value_width = width if chance.random() < 0.7 else chance.choice(WIDTHS)
    size = chance.choice((1.0, 1.0, 1.0, 3.0, 0.1, 30.0))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64)

    q, k = (
        normal(batch, kv_heads * group if name == "q" else kv_heads, n, width) * size
        for name, n in (("q", lq), ("k", lk))
    )
    q = q[:, :heads]
    v = normal(batch, kv_heads, lk, value_width)
    mask, visible, offset, first = _mask(
        chance, random.Random(~seed), random.Random(f"{seed}"), numbers, batch, heads, lq, lk
    )
    found = Draw(
        *(seed, q.to(dtype), k.to(dtype), v.to(dtype), mask, visible, offset, first),
        scale=chance.choice((None, None, None, 0.3, 1.0, 0.0, -0.2)),
        softcap=chance.choice((None, None, None, 1.5, 30.0)),
        threads=chance.choice((1, 2)),
    )
    if chance.random() < 0.2:
        found.tensors["bias"] = _bias(chance, normal, batch, heads, lq, lk).to(dtype)
    if chance.random() < 0.15 and (offset is not None or lq == lk):
        found.tensors["alibi"] = (torch.rand(heads, generator=numbers, dtype=torch.float64) / 4).to(dtype)
    if chance.random() < 0.2:
        sinks = normal(heads)
        if chance.random() < 0.3:
            sinks[chance.randrange(heads)] = -math.inf
        found.tensors["sink_logits"] = sinks.to(dtype)
    _poison(chance, found)
    # The kernel takes whole rows alone, so that the other layouts may not be in each second draw.
    layouts = (*WHOLE_ROWS, *WIDTHS_APART) if chance.random() < 0.2 else WHOLE_ROWS
    found.q, found.k, found.v = (_laid_out(chance.choice(layouts), x) for x in (found.q, found.k, found.v))
    return found


def _mask(
    chance: random.Random,
    by_row: random.Random,
    more: random.Random,
    numbers: torch.Generator,
    batch: int,
    heads: int,
    lq: int,
    lk: int,
) -> tuple[Mask, Tensor, int | Tensor | None, Tensor]:
    """A mask, what it shows, the offset to give and the one of each row that it means.

    ``by_row`` and ``more`` draw the kinds that were added later, so that old seeds draw all else as before.
    """
    visible = torch.ones(batch, heads, lq, lk, dtype=torch.bool)
    mask = Mask.full()
    kinds = {kind for kind in ("interval", "keep", "lengths", "documents", "dense") if chance.random() < 0.2}
    if chance.random() < 0.3:
        kinds.add("interval")
    if "documents" in kinds and lq > lk:
        kinds.remove("documents")
    if "documents" in kinds:
        position = chance.randint(0, lk - lq)
    else:
        position = chance.choice((0, lk - lq, lk - lq, chance.randint(-5, lk + 3)))
    first = torch.full((batch,), position)
    has_rows = by_row.random() < 0.2
    if has_rows:
        least, most = (0, lk - lq) if "documents" in kinds else (-5, lk + 3)
        first = torch.tensor([by_row.randint(least, most) for _ in range(batch)])
    i, j = (first[:, None] + torch.arange(lq))[:, None, :, None], torch.arange(lk)
    if "interval" in kinds:
        left, right = chance.choice((None, None, 0, 1, 5, 30, 70)), chance.choice((None, 0, 0, 0, 1, 5, 70))
        sinks = chance.choice((0, 0, 1, 4)) if left is not None else 0
        mask = mask & Mask.band(left, right, sinks)
        if right is not None:
            visible = visible & (j <= i + right)
        if left is not None:
            visible = visible & ((j >= i - left) | (j < sinks))
    mask, visible = _positions(more, mask, visible, first)
    rows = chance.choice((1, batch))
    if "keep" in kinds:
        keep = torch.rand(rows, lk, generator=numbers) < chance.choice((0.3, 0.8))
        if chance.random() < 0.5:  # without holes
            start, stop = sorted((chance.randint(0, lk), chance.randint(0, lk)))
            keep = ((j >= start) & (j < stop)).expand(rows, lk).clone()
        mask, visible = mask & Mask.padding(keep), visible & keep[:, None, None]
    if "lengths" in kinds:
        lengths = torch.randint(0, lk + 1, (rows,), generator=numbers)
        mask, visible = mask & Mask.padding(lengths), visible & (j < lengths[:, None])[:, None, None]
    if "documents" in kinds:
        ids = torch.randint(0, 4, (rows, lk), generator=numbers)
        if chance.random() < 0.7:
            ids = ids.sort(dim=1).values
        mask = mask & Mask.documents(ids)
        visible = visible & (ids.expand(batch, -1).gather(1, i.flatten(1))[..., None] == ids[:, None])[:, None]
    if "dense" in kinds:
        shape = (chance.choice((1, batch)), chance.choice((1, heads)), chance.choice((1, lq)), lk)
        allow = torch.rand(shape, generator=numbers) < chance.choice((0.2, 0.6))
        mask, visible = mask & Mask.dense(allow), visible & allow
    implied = lq == lk and position == 0 and chance.random() < 0.5
    return mask, visible, first if has_rows else None if implied else position, first


def _positions(more: random.Random, mask: Mask, visible: Tensor, first: Tensor) -> tuple[Mask, Tensor]:
    """A mask of an interval, perhaps with chunks, a prefix, dilation and global tokens."""
    batch, _, lq, lk = visible.shape
    i, j = (first[:, None] + torch.arange(lq))[:, None, :, None], torch.arange(lk)
    if mask.sink_tokens == 0 and more.random() < 0.15:
        size, start = more.choice((1, 5, 12, 40, 100)), more.randint(-9, 50)
        mask = mask & Mask.chunked(size, start)
        visible = visible & (
            (i - start).div(size, rounding_mode="floor") == (j - start).div(size, rounding_mode="floor")
        )
    if mask.sink_tokens == 0 and more.random() < 0.15:
        step = more.choice((2, 3, 16, 70))
        mask, visible = mask & Mask.band(None, None, dilation=step), visible & ((i - j) % step == 0)
    if mask.right is None and more.random() < 0.3:
        lengths = torch.tensor([more.randint(0, lk + 2) for _ in range(more.choice((1, batch)))])
        mask = mask & Mask.prefix(lengths if len(lengths) > 1 or more.random() < 0.5 else int(lengths))
        visible = visible & ((j <= i) | (j < lengths[:, None, None, None]))
    if int(first.min()) >= 0 and int(first.max()) <= lk - lq and more.random() < 0.15:
        rarity = more.choice((2, 20, 100))
        flags = torch.tensor([[more.randrange(rarity) == 0 for _ in range(lk)] for _ in range(more.choice((1, batch)))])
        mask = mask | Mask.global_tokens(flags)
        visible = visible | flags[:, None, None] | flags.expand(batch, -1).gather(1, i.flatten(1))[:, None, :, None]
    return mask, visible


def _bias(chance: random.Random, normal: Any, batch: int, heads: int, lq: int, lk: int) -> Tensor:
    shape = [chance.choice((1, n)) for n in (batch, heads, lq, lk)]
    bias: Tensor = normal(*shape)
    if chance.random() < 0.3:
        bias[..., :: chance.choice((1, 2, 3))] = -math.inf
    return bias


def _poison(chance: random.Random, found: Draw) -> None:
    """Writes non-finite numbers: mostly to hidden keys, sometimes to visible ones."""
    hidden = ~found.visible.unflatten(1, (found.k.shape[1], -1)).any(dim=(2, 3))  # (B, Hkv, Lk)
    if chance.random() < 0.4:
        for tensor in (found.k, found.v):
            tensor[hidden] = chance.choice((*NOT_FINITE, 0.0))
    if chance.random() < 0.1:
        for tensor in chance.sample((found.q, found.k, found.v), 1):
            place = [chance.randrange(n) for n in tensor.shape]
            tensor[tuple(place)] = chance.choice(NOT_FINITE)


def _laid_out(kind: str, tensor: Tensor) -> Tensor:
    """The same numbers in another layout, with NaN all around."""
    batch, heads, length, width = tensor.shape
    if kind == "contiguous":
        return tensor
    if kind == "tokens first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "slice":
        buffer = tensor.new_full((batch + 1, length + 3, heads + 1, width + 5), math.nan)
        view = buffer[1:, 2 : 2 + length, 1:, 3 : 3 + width].transpose(1, 2)
    elif kind == "every other":
        view = tensor.new_full((batch, heads, length, 2 * width), math.nan)[..., ::2]
    else:
        view = tensor.new_full((batch, length, heads, width, 3), math.nan)[..., 1].transpose(1, 2)
    view.copy_(tensor)
    return view


@dataclass
class Want:
    """The answer in fp64, how far a result may be from it, and where it is NaN by law or left open."""

    out: Tensor
    out_bound: Tensor
    lse: Tensor
    lse_bound: Tensor
    broken: Tensor
    """Rows (B, H, Lq) that must be NaN."""
    open: Tensor
    """Numbers of out (B, H, Lq, Dv) that see a value which is not finite: they must not be finite either."""
    weights: Tensor
    error: Tensor
    """Relative error that each weight may have."""
    scores: Tensor
    """After scale and softcap; (B, H, Lq, Lk), as all of these."""


def _per_query_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0)


def _units(dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of one operation, and of one rounding to the dtype of the tensors."""
    inner = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return inner, torch.finfo(dtype).eps


def answer(case: Draw) -> Want:
    """The formula, in fp64, over finite stand-ins; with the law on row_max."""
    inner, outer = _units(case.q.dtype)
    heads, width = case.q.shape[1], case.q.shape[3]
    q, k, v = case.q.double(), _per_query_head(case.k.double(), heads), _per_query_head(case.v.double(), heads)
    bad_q, bad_k = ~q.isfinite().all(-1), ~k.isfinite().all(-1)
    fq, fk, fv = _finite(q), _finite(k), _finite(v)
    scores = case.factor * fq @ fk.mT
    error = inner * ((width + 4) * abs(case.factor) * fq.abs() @ fk.abs().mT)
    broken = case.visible & (bad_q[..., None] | bad_k[..., None, :])
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
        error = error + 16 * inner * case.softcap
    capped = scores
    if "bias" in case.tensors:
        bias = case.tensors["bias"].double()
        scores = scores + bias
        error = error + 4 * inner * _finite(bias).abs()
    if "alibi" in case.tensors:
        penalty = case.tensors["alibi"].double()[:, None, None] * case.distance
        scores = scores - penalty
        error = error + 4 * inner * penalty
    scores = scores.masked_fill(~case.visible, -math.inf)
    terms = scores
    if "sink_logits" in case.tensors:
        sinks = case.tensors["sink_logits"].double()[None, :, None, None].expand(*scores.shape[:3], 1)
        terms = torch.cat([scores, sinks], dim=-1)
    row_max = terms.amax(-1, keepdim=True)
    masked_rows = row_max == -math.inf
    exponentials = (terms - row_max.masked_fill(masked_rows, 0)).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials[..., : scores.shape[3]] / total.masked_fill(masked_rows, 1)
    lse = (row_max + total.log()).squeeze(-1)
    error = (error + 4 * inner * (_finite(scores).abs() + _finite(lse)[..., None].abs())).masked_fill(~case.visible, 0)
    common = error.masked_fill(scores == -math.inf, 0).amax(-1, keepdim=True)
    relative = torch.expm1((error + common + (16 + scores.shape[3]) * inner).clamp(max=50)) + outer
    out = weights @ fv
    bound = (weights * relative) @ fv.abs() + 2 * outer * out.abs() + torch.finfo(case.q.dtype).tiny
    unseen = (case.visible.double() @ (~v.isfinite()).double()) > 0
    return Want(
        *(out, bound, lse, common.squeeze(-1) + (16 + scores.shape[3]) * inner + 4 * inner * _finite(lse).abs()),
        *(broken.any(-1), unseen, weights, relative, capped),
    )


def check_forward(case: Draw, want: Want, out: Tensor, lse: Tensor | None, lse_extra: float = 0.0) -> list[str]:
    """What is wrong with a result. ``lse_extra`` is a relative error of the sum of weights that is not ours."""
    wrong: list[str] = []
    open_ = want.open & ~want.broken[..., None]
    if not out[want.broken].isnan().all():
        wrong.append("a row that sees a number that is not finite is not NaN")
    if out[open_].isfinite().any():
        wrong.append("a value that is not finite is seen, and does not show")
    settled = ~(want.broken[..., None] | open_)
    off = (out.double() - want.out).abs()[settled]
    if not (off <= want.out_bound[settled]).all():
        worst = (off / want.out_bound[settled]).nan_to_num(nan=math.inf).max().item() if off.numel() else 0.0
        wrong.append(f"out is off by {worst:.3g} times what rounding allows")
    masked_rows = want.lse == -math.inf
    if out[(masked_rows & ~want.broken)[..., None] & ~open_].any():
        wrong.append("a row that sees nothing is not 0")
    if lse is not None:
        if not lse[want.broken].isnan().all():
            wrong.append("the lse of a row that sees a number that is not finite is not NaN")
        rows = ~want.broken
        if not torch.equal(lse[rows & masked_rows].double(), want.lse[rows & masked_rows]):
            wrong.append("the lse of a row that sees nothing is not -inf")
        rows = rows & ~masked_rows
        if not ((lse.double() - want.lse).abs()[rows] <= want.lse_bound[rows] + lse_extra).all():
            wrong.append("the lse is off")
    return wrong


def want_gradients(case: Draw, want: Want, upstream: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each input its gradient in fp64, the bound of its error, and the numbers that the law leaves open."""
    inner, outer = _units(case.q.dtype)
    heads = case.q.shape[1]
    lq, lk, value_width = case.q.shape[2], case.k.shape[2], case.v.shape[3]
    q, k, v = (
        _finite(x)
        for x in (case.q.double(), _per_query_head(case.k.double(), heads), _per_query_head(case.v.double(), heads))
    )
    d_out = upstream.double()
    lost = want.broken | want.open.any(-1) | ~d_out.isfinite().all(-1)
    d_out = d_out.masked_fill(lost[..., None], 0)
    p, out = want.weights.masked_fill(lost[..., None], 0), want.out
    d_p, delta = d_out @ v.mT, (d_out * out).sum(-1, keepdim=True)
    terms = d_out.abs() @ v.abs().mT + (d_out.abs() * out.abs()).sum(-1, keepdim=True)
    e_delta = (d_out.abs() * (want.out_bound + outer * out.abs())).sum(-1, keepdim=True)
    e_p = want.error
    d_s = p * (d_p - delta)
    e_s = p * (e_p * terms + (value_width + 4) * inner * terms + e_delta + 2 * outer * (d_p - delta).abs())
    e_s = e_s + torch.finfo(torch.float32).tiny * terms  # weights below are 0
    d_raw, e_raw = d_s, e_s
    if case.softcap is not None:
        slope = 1 - (want.scores / case.softcap) ** 2
        d_raw = d_s * slope
        e_raw = e_s * slope + d_s.abs() * 2 * (e_p / case.softcap + 16 * inner)
    factor = case.factor

    def per_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (case.k.shape[1], -1)).sum(2)

    def bounded(value: Tensor, error: Tensor, terms: Tensor, count: int, lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiny = torch.finfo(case.q.dtype).tiny
        return value, 2 * (error + (count + 8) * inner * terms + outer * value.abs()) + tiny, lost

    seen = per_kv_head((case.visible & lost[..., None]).double()).sum(2) > 0  # (B, Hkv, Lk)
    rows = heads // case.k.shape[1] * lq
    found = {
        "q": bounded(
            factor * d_raw @ k, abs(factor) * e_raw @ k.abs(), abs(factor) * d_raw.abs() @ k.abs(), lk, lost[..., None]
        ),
        "k": bounded(
            per_kv_head(factor * d_raw.mT @ q),
            per_kv_head(abs(factor) * e_raw.mT @ q.abs()),
            per_kv_head(abs(factor) * d_raw.abs().mT @ q.abs()),
            *(rows, seen[..., None]),
        ),
        "v": bounded(
            per_kv_head(p.mT @ d_out),
            per_kv_head((p * e_p + torch.finfo(torch.float32).tiny).mT @ d_out.abs()),
            per_kv_head(p.mT @ d_out.abs()),
            *(rows, seen[..., None]),
        ),
    }
    anything = lost.any()
    if "bias" in case.tensors:
        shape = case.tensors["bias"].shape
        parts = (d_s.sum_to_size(shape), e_s.sum_to_size(shape), d_s.abs().sum_to_size(shape))
        found["bias"] = bounded(*parts, d_s.numel() // parts[0].numel(), anything)
    if "alibi" in case.tensors:
        value, error, size = (-(x * case.distance).sum((0, 2, 3)) for x in (d_s, -e_s, -d_s.abs()))
        found["alibi"] = bounded(value, error, size, d_s.numel() // heads, anything)
    if "sink_logits" in case.tensors:
        share = (case.tensors["sink_logits"].double()[:, None] - want.lse).exp()
        share = share.masked_fill(want.lse == -math.inf, 0)[..., None]
        e_share = torch.expm1((want.lse_bound + 8 * inner).clamp(max=50))[..., None]
        size = (d_out.abs() * out.abs()).sum(-1, keepdim=True)
        value, error = -(share * delta).sum((0, 2, 3)), (share * (e_delta + e_share * size)).sum((0, 2, 3))
        found["sink_logits"] = bounded(value, error, (share * size).sum((0, 2, 3)), d_s.numel() // heads, anything)
    return found


def check_backward(
    case: Draw, want: dict[str, tuple[Tensor, Tensor, Tensor]], got: dict[str, Tensor | None]
) -> list[str]:
    """What is wrong with gradients."""
    wrong: list[str] = []
    for name, (exact, bound, lost) in want.items():
        gradient = got[name]
        if gradient is None:
            wrong.append(f"the gradient of {name} is None")
            continue
        settled = ~lost.expand(exact.shape)
        off = (gradient.double() - exact).abs()[settled]
        if not (off <= bound[settled]).all():
            worst = (off / bound[settled]).nan_to_num(nan=math.inf).max().item()
            wrong.append(f"the gradient of {name} is off by {worst:.3g} times what rounding allows")
    hidden = ~case.visible.unflatten(1, (case.k.shape[1], -1)).any(dim=(2, 3))
    for name in ("k", "v"):
        gradient = got[name]
        if gradient is not None and gradient[hidden].any():
            wrong.append(f"a hidden key has a gradient, of {name}")
    return wrong


def run_forward(solver: Solver, case: Draw, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    name = solver.backend.NAME
    if wants_lse:
        out, lse = qkv.attention_with_lse(case.q, case.k, case.v, **case.options, backend=name)
        return out, lse
    # The fast path is taken by calls that leave the choice of backend to the library.
    backend = "auto" if name == "native" else name
    return qkv.attention(case.q, case.k, case.v, **case.options, backend=backend), None


def run_backward(solver: Solver, case: Draw, upstream: Tensor) -> dict[str, Tensor | None]:
    leaves = {"q": case.q, "k": case.k, "v": case.v, **case.tensors}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    options = {**case.options, **{name: leaves[name] for name in case.tensors}}
    out = qkv.attention(leaves["q"], leaves["k"], leaves["v"], **options, backend=solver.backend.NAME)
    found = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def solvers(case: Draw, *, wants_lse: bool, needs_grad: bool) -> list[Solver]:
    """All that solve the case. FlexAttention is left to its own tests: uncompiled, it takes a second a call."""
    tensors = {"q": case.q, **case.tensors}
    if needs_grad:
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    problem = make_problem("fuzz", k=case.k, v=case.v, **{**case.options, **tensors}, wants_lse=wants_lse)
    return [
        solver
        for solver in SOLVERS
        if solver.device == "cpu" and solver.backend.NAME != "flex" and not solver.backend.why_not(problem)
    ]


def check(seed: int, *, backward: bool) -> tuple[int, list[str]]:
    """Runs the draw of a seed on all solvers: how many cases that is, and what is wrong."""
    torch.set_num_threads(1)
    case = draw(seed)
    want = answer(case)
    count, wrong = 0, []
    if backward:
        numbers = torch.Generator().manual_seed(seed + 1)
        upstream = torch.randn(want.out.shape, generator=numbers, dtype=torch.float64).to(case.q.dtype)
        if seed % 7 == 0:
            upstream[:, :, seed % upstream.shape[2]] = math.nan
        gradients = want_gradients(case, want, upstream)
    torch.set_num_threads(case.threads)
    for wants_lse in (False,) if backward else (False, True):
        for solver in solvers(case, wants_lse=wants_lse, needs_grad=backward):
            with solver.at_work() if solver.isa else nullcontext():
                try:
                    if backward:
                        faults = check_backward(case, gradients, run_backward(solver, case, upstream))
                    else:
                        # torch's kernel adds weights up as rounded to 16 bits.
                        extra = _units(case.q.dtype)[1] if solver.backend.NAME == "sdpa" else 0.0
                        faults = check_forward(case, want, *run_forward(solver, case, wants_lse=wants_lse), extra)
                except Exception as error:  # whatever it is, the draw must be named
                    faults = [f"{type(error).__name__}: {error}"]
            count += 1
            variant = " backward" if backward else " with lse" if wants_lse else ""
            wrong += [f"{solver}{variant}: {fault}" for fault in faults]
    return count, [f"{case}\n    {fault}" for fault in wrong]


def campaign(cases: int, seed: int, *, backward: bool) -> int:
    """Runs so many cases; returns how many draws went wrong."""
    begun, done, failed, kinds = time.monotonic(), 0, 0, Counter[str]()
    word = "backward" if backward else "forward"
    while done < cases:
        count, wrong = check(seed, backward=backward)
        done, seed = done + count, seed + 1
        if wrong:
            failed += 1
            for line in wrong:
                kind = line.rsplit("    ", 1)[1].split(" by ")[0]
                kinds[kind] += 1
                if kinds[kind] <= EXAMPLES:
                    print(line, flush=True)
    print(f"{done} {word} cases in {time.monotonic() - begun:.0f} s, next seed {seed}: {failed} draws failed")
    for kind, times in kinds.most_common():
        print(f"  {times} x {kind}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--forward", type=int, default=20_000, help="cases of the forward pass")
    parser.add_argument("--backward", type=int, default=5_000, help="cases of the backward pass")
    parser.add_argument("--seed", type=int, default=0, help="of the first draw")
    arguments = parser.parse_args()
    failed = campaign(arguments.forward, arguments.seed, backward=False)
    failed += campaign(arguments.backward, arguments.seed, backward=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
