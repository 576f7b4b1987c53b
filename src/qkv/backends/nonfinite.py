"""Numbers that are not finite: NaN for whoever sees them, without influence on everybody else, forward and backward.

Kernels multiply a weight of 0 with the NaN that the mask hides, take the score -inf of an infinite key for a masked
one, and sum the gradients of all rows before the mask is applied. So `zero_nonfinite` replaces non-finite numbers
before the kernel runs, and `add_visible_nonfinite` gives each row what it really sees afterwards, and keeps gradients
of non-finite rows from keys that these rows do not see. The law is a table in DESIGN.md.

On a GPU, looking for such numbers waits and restoring them takes many times as long as attention itself. There, keys
that padding hides from all become zeros, whatever they held; among the others, a NaN spreads as it does in torch's
kernels.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv import kernels
from qkv.backends.result import Result, accumulation_dtype
from qkv.masks import Mask
from qkv.problem import Problem


class NonfiniteTerms(NamedTuple):
    """What is not finite in a problem, as `add_visible_nonfinite` needs it."""

    problem: Problem
    """As it was given to `zero_nonfinite`."""
    out: Tensor | None
    """(B, H, Lq, Dv): 0, inf, -inf or NaN, which is added to the result. None where all is finite."""
    lse: Tensor | None
    """(B, H, Lq): 0 or NaN"""


def zero_nonfinite(problem: Problem) -> tuple[Problem, NonfiniteTerms | None]:
    """The problem with finite numbers alone, biases and sink logits of -inf apart; None where nothing can leak."""
    if not problem.k.is_cpu:
        return _without_padding(problem), None
    if problem.mask.is_full and torch.onnx.is_in_onnx_export():
        return problem, None  # Nothing is hidden, and one node shall stay one node.
    if _can_read(problem.q, problem.k, problem.v):
        if _is_finite(problem):
            may_leak = problem.needs_grad and not problem.mask.is_full  # gradients that are not finite
            return problem, NonfiniteTerms(problem, None, None) if may_leak else None
        problem = _with_finite_alibi(problem)
    with torch.no_grad():
        nonfinite = _poison(problem)
    return _finite(problem), nonfinite


def add_visible_nonfinite(result: Result, nonfinite: NonfiniteTerms | None) -> Result:
    """The result of the shielded problem as it is for the one that was given, and so its gradients."""
    if nonfinite is None:
        return result
    problem, mask = nonfinite.problem, nonfinite.problem.mask
    # A trace or an exported program cannot hold a function of Python's.
    if problem.needs_grad and not (torch._C._get_tracing_state() or torch.compiler.is_exporting()):
        scores = problem.scores
        inputs = distinct(problem.q, problem.k, problem.v, scores.bias, scores.alibi, scores.sink_logits)
        function = _Restored if torch.compiler.is_compiling() else _RestoredWithTangents
        return Result(*function.apply(*result, nonfinite.out, nonfinite.lse, *inputs, problem.offset, *mask.values()))  # type: ignore[no-untyped-call]
    return Result(*_restored(*result, nonfinite.out, nonfinite.lse))


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, with a view for one that is given again: as torch's compiler asks of functions with a backward."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        found.append(tensor.view_as(tensor) if tensor is not None and any(tensor is x for x in found) else tensor)
    return tuple(found)


def _restored(
    out: Tensor, lse: Tensor | None, poison_out: Tensor | None, poison_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if poison_out is None or poison_lse is None:
        return out.clone(), None if lse is None else lse.clone()
    return out + poison_out, None if lse is None else lse + poison_lse


def _can_read(*tensors: Tensor) -> bool:
    """Whether looking at values is possible: not while tracing or batching."""
    return (
        all(map(kernels.is_plain, tensors))
        and not kernels.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def _without_padding(problem: Problem) -> Problem:
    keep = problem.mask.keep_keys(problem.lk)
    if keep is None:
        return problem
    hidden = ~keep[:, None, :, None]
    return problem._replace(k=problem.k.masked_fill(hidden, 0), v=problem.v.masked_fill(hidden, 0))


def _is_finite(problem: Problem) -> bool:
    """Whether every number is, biases and sink logits of -inf apart."""
    # Values that all rows see spread as they should by themselves, in the forward pass.
    spread = problem.mask.is_full and not problem.needs_grad
    summed = (problem.q, problem.k, problem.scores.alibi, None if spread else problem.v)
    return all(tensor is None or _all_finite(tensor) for tensor in summed) and not any(
        scores is not None and _raises(scores).any() for scores in (problem.scores.bias, problem.scores.sink_logits)
    )


def _all_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all its terms are, and costs a seventh of isfinite().all(). Where it overflows, the
    # answer is a false alarm: correct, only slower.
    tensor = tensor.detach()
    total = tensor.sum() if tensor.dtype is not torch.float16 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def _raises(scores: Tensor) -> Tensor:
    """Where a score that is added makes its row NaN. One of -inf makes a weight of 0."""
    return scores.isnan() | (scores == torch.inf)


def _with_finite_alibi(problem: Problem) -> Problem:
    """Slopes that are not finite are a bias like any other."""
    scores, alibi = problem.scores, problem.scores.alibi
    if alibi is None or _all_finite(alibi):
        return problem
    dtype = accumulation_dtype(problem.q.dtype)
    bias = -alibi.to(dtype)[:, None, None] * problem.distance().to(dtype)
    bias = bias[None] if scores.bias is None else scores.bias + bias
    return problem._replace(scores=scores._replace(alibi=None, bias=bias))


def _finite(problem: Problem) -> Problem:
    q, k, v = (torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in problem[:3])
    bias, sink_logits = (
        None if scores is None else torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=-torch.inf)
        for scores in (problem.scores.bias, problem.scores.sink_logits)
    )
    return problem._replace(q=q, k=k, v=v, scores=problem.scores._replace(bias=bias, sink_logits=sink_logits))


def _poison(problem: Problem) -> NonfiniteTerms:
    q, k, v, bias, width = problem.q, problem.k, problem.v, problem.scores.bias, problem.v.shape[3]
    sight = Sight(problem.mask, problem.offset, problem.lq, problem.lk, problem.group)
    bad_key = ~k.isfinite().all(dim=-1, keepdim=True)
    flags = [v.isnan() | (v == torch.inf), v.isnan() | (v == -torch.inf), bad_key, torch.ones_like(bad_key)]
    up, down, bad, sees = sight.of_rows(torch.cat(flags, dim=-1)).split([width, width, 1, 1], dim=-1)
    bad = bad | (sees & ~q.isfinite().all(dim=-1, keepdim=True))
    if bias is not None:
        visible = problem.visible()
        bad = bad | (visible & _raises(bias)).any(dim=-1, keepdim=True)
        # Infinities with a weight of 0.
        erased = _any_of(visible & (bias == -torch.inf), v.isinf().repeat_interleave(problem.group, dim=1))
        up, down = up | erased, down | erased
    if problem.scores.sink_logits is not None:
        bad = bad | _raises(problem.scores.sink_logits)[:, None, None]
    nothing = torch.zeros((), dtype=q.dtype, device=q.device)
    out = torch.where(up | bad, torch.inf, nothing) - torch.where(down | bad, torch.inf, nothing)
    return NonfiniteTerms(
        problem, out, torch.where(bad.squeeze(-1), torch.nan, nothing.to(accumulation_dtype(q.dtype)))
    )


class Sight(NamedTuple):
    """Which rows and which keys see each other. Linear in the lengths for intervals and padding."""

    mask: Mask
    offset: int
    lq: int
    lk: int
    group: int

    def of_rows(self, flags: Tensor) -> Tensor:
        """For flags (B, Hkv, Lk, C) of the keys: whether each row sees a flagged one, (B, H, Lq, C)."""
        mask, lk = self.mask, self.lk
        if self.mask.is_pairwise:
            return _any_of(self.pairs(flags.device), flags.repeat_interleave(self.group, dim=1))
        keep = mask.keep_keys(lk)
        if keep is not None:
            flags = flags & keep[:, None, :, None]
        position = torch.arange(self.lq, device=flags.device) + self.offset
        start = torch.zeros_like(position) if mask.left is None else (position - mask.left).clamp(0, lk)
        stop = torch.full_like(position, lk) if mask.right is None else (position + mask.right + 1).clamp(0, lk)
        seen = _any_between(flags, start, stop)
        if mask.sink_tokens:
            seen = seen | _any_between(flags, torch.zeros_like(stop), stop.clamp(max=mask.sink_tokens))
        return seen.repeat_interleave(self.group, dim=1)

    def of_keys(self, flags: Tensor) -> Tensor:
        """For flags (B, H, Lq, C) of the rows: whether a flagged one sees each key, (B, Hkv, Lk, C)."""
        mask, lq = self.mask, self.lq
        if self.mask.is_pairwise:
            seen = _any_of(self.pairs(flags.device).mT, flags)
        else:
            row = torch.arange(self.lk, device=flags.device) - self.offset  # which stands where the key does
            start = torch.zeros_like(row) if mask.right is None else (row - mask.right).clamp(0, lq)
            stop = torch.full_like(row, lq) if mask.left is None else (row + mask.left + 1).clamp(0, lq)
            if mask.sink_tokens:
                stop = torch.where(row + self.offset < mask.sink_tokens, lq, stop)
            seen = _any_between(flags, start, stop)
            keep = mask.keep_keys(self.lk)
            if keep is not None:
                seen = seen & keep[:, None, :, None]
        per_group: Tensor = seen.unflatten(1, (-1, self.group))
        return per_group.any(dim=2)

    def pairs(self, device: torch.device) -> Tensor:
        """The mask written out, broadcastable to (B, H, Lq, Lk)."""
        return self.mask.visible(self.lq, self.lk, self.offset, device=device)


def _any_of(pairs: Tensor, flags: Tensor) -> Tensor:
    """Whether any of the flags (..., n, C) is set that the pairs (..., m, n) select: (..., m, C)."""
    return pairs.float() @ flags.float() > 0


def _any_between(flags: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Whether any of the flags (B, H, n, C) from ``start`` to ``stop`` is set, for each of these (m,): (B, H, m, C)."""
    count = F.pad(flags.cumsum(dim=2, dtype=torch.int32), (0, 0, 1, 0))
    return count[:, :, stop] > count[:, :, start]


class _Restored(torch.autograd.Function):
    """`_restored`, whose backward hands on finite gradients alone, and NaN to what the other rows see.

    A row is NaN in the backward pass where its gradient from above is not finite, or where it has one and its result is
    not finite. A row without a gradient from above adds nothing, whatever it sees.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        out: Tensor, lse: Tensor | None, poison_out: Tensor | None, poison_lse: Tensor | None, *others
    ) -> tuple[Tensor, Tensor | None]:
        return _restored(out, lse, poison_out, poison_lse)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, _, poison_out, _, q, k, v, bias, alibi, sink_logits, offset, left, right, sink_tokens, *tensors = inputs
        ctx.save_for_backward(poison_out, sink_logits, *tensors)
        ctx.shapes = [None if x is None else x.shape for x in (q, k, v, bias, alibi)]
        ctx.bounds = offset, left, right, sink_tokens

    @staticmethod
    def backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
        poison_out, sink_logits, *tensors = ctx.saved_tensors
        from_above = [gradient for gradient in (d_out, d_lse) if gradient is not None]
        if poison_out is None and _can_read(*from_above) and all(map(_all_finite, from_above)):
            return d_out, d_lse, *[None] * (len(ctx.needs_input_grad) - 2)
        columns = [d_out] if d_lse is None else [d_out, d_lse[..., None]]
        bad = torch.stack([~column.isfinite().all(dim=-1) for column in columns]).any(dim=0)
        if poison_out is not None:
            has_any = torch.stack([(column != 0).any(dim=-1) for column in columns]).any(dim=0)
            bad = bad | (has_any & ~poison_out.isfinite().all(dim=-1))
        bad = bad[..., None]
        d_out, d_lse = d_out.masked_fill(bad, 0), None if d_lse is None else d_lse.masked_fill(bad[..., 0], 0)
        spread = _spread(ctx, bad, sink_logits, tensors)
        return d_out, d_lse, None, None, *spread, *[None] * (len(ctx.needs_input_grad) - 4 - len(spread))


class _RestoredWithTangents(_Restored):
    """Forward mode as well, which torch's compiler does not take."""

    @staticmethod
    def jvp(ctx, d_out, d_lse, *others):  # type: ignore[no-untyped-def]
        return d_out.clone(), None if d_lse is None else d_lse.clone()


def _spread(
    ctx: Any, bad: Tensor, sink_logits: Tensor | None, mask_tensors: list[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of q, k, v, bias, alibi and sink logits: NaN for what the bad rows (B, H, Lq, 1) see, else 0."""
    q, k, v, bias, alibi = ctx.shapes
    offset, *bounds = ctx.bounds
    sight = Sight(Mask(*bounds, *mask_tensors), offset, q[2], k[2], q[1] // k[1])
    seen = sight.of_keys(bad)
    sees = bad & sight.of_rows(torch.ones_like(seen))

    def nan(where: Tensor) -> Tensor:
        return torch.where(where, torch.nan, torch.zeros((), device=where.device))

    return [
        nan(sees).expand(q),
        nan(seen).expand(k),
        nan(seen).expand(v),
        None if bias is None else nan(sight.pairs(bad.device) & bad).sum_to_size(bias),
        None if alibi is None else nan(sees.any(dim=(0, 2, 3))),
        None if sink_logits is None else nan(bad.any(dim=(0, 2, 3)) & (sink_logits != -torch.inf)),
    ]
