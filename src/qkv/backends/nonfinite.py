"""Non-finite numbers (NaN, inf): they reach the rows that see them and no other row, forward and backward.

Kernels multiply the weight 0 of a hidden key by its NaN, take the score -inf of an infinite key for a masked one, and
sum gradients over all rows, hidden or not. So `zero_nonfinite` replaces non-finite numbers before the kernel runs;
`add_visible_nonfinite` then adds to each row those that it sees, and keeps the gradients of non-finite rows from keys
that they do not see. DESIGN.md has the rules as a table.

On a GPU, the check would force a synchronisation, and the terms cost many times as much as attention. There, keys that
padding hides become zeros, and those that the interval hides are cut off or become zeros; among the others, NaN spreads
as in torch's kernels.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv import kernels
from qkv.backends.result import Result, accumulation_dtype
from qkv.masks import NUMBERS, Mask, positions
from qkv.problem import Problem
from qkv.torch_internals import tracing_state


class NonfiniteTerms(NamedTuple):
    """The non-finite part of the result of a problem, to be added by `add_visible_nonfinite`."""

    problem: Problem
    """as passed to `zero_nonfinite`"""
    out: Tensor | None
    """(B, H, Lq, Dv) of 0, inf, -inf or NaN; None if all inputs are finite"""
    lse: Tensor | None
    """(B, H, Lq) of 0 or NaN; None as ``out``"""


def zero_nonfinite(problem: Problem) -> tuple[Problem, NonfiniteTerms | None]:
    """The problem with non-finite numbers replaced by 0, except biases and sink logits of -inf, and the terms to add.

    The terms are None if there is nothing to add, to results or to gradients.
    """
    if not problem.k.is_cpu:
        return _zero_padded_keys(problem), None
    if problem.mask.is_full and torch.onnx.is_in_onnx_export():
        return problem, None  # Nothing is hidden, and the export should be a single node.
    if kernels.can_read_values(problem.q, problem.k, problem.v):
        if _is_finite(problem):
            may_leak = problem.needs_grad and not problem.mask.is_full  # incoming gradients
            return problem, NonfiniteTerms(problem, None, None) if may_leak else None
        problem = _nonfinite_alibi_as_bias(problem)
    with torch.no_grad():
        nonfinite = _nonfinite_terms(problem)
    return _with_zeros(problem), nonfinite


def add_visible_nonfinite(result: Result, nonfinite: NonfiniteTerms | None) -> Result:
    """The result, and gradients, of the original problem, from the result of the one that `zero_nonfinite` returned."""
    if nonfinite is None:
        return result
    problem, mask = nonfinite.problem, nonfinite.problem.mask
    # A trace or an exported program cannot contain an autograd.Function.
    if problem.needs_grad and not (tracing_state() or torch.compiler.is_exporting()):
        scores = problem.scores
        inputs = distinct(problem.q, problem.k, problem.v, scores.bias, scores.alibi, scores.sink_logits)
        function = _AddTerms if torch.compiler.is_compiling() else _AddTermsWithJvp
        return Result(*function.apply(*result, nonfinite.out, nonfinite.lse, *inputs, problem.offset, *mask.values()))  # type: ignore[no-untyped-call]
    return Result(*_add_terms(*result, nonfinite.out, nonfinite.lse))


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, with a view for each repeated one: torch.compile takes no input of an autograd.Function twice."""
    if not torch.compiler.is_compiling():
        return tensors
    unique: list[Tensor | None] = []
    for tensor in tensors:
        unique.append(tensor.view_as(tensor) if tensor is not None and any(tensor is x for x in unique) else tensor)
    return tuple(unique)


def _add_terms(
    out: Tensor, lse: Tensor | None, nonfinite_out: Tensor | None, nonfinite_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Out and lse plus their terms, or copies of both without terms."""
    if nonfinite_out is None or nonfinite_lse is None:
        return out.clone(), None if lse is None else lse.clone()
    return out + nonfinite_out, None if lse is None else lse + nonfinite_lse


def _zero_padded_keys(problem: Problem) -> Problem:
    """The problem with 0 for keys and values that padding (with offsets by row, also the interval) hides entirely."""
    mask, offset = problem.mask, problem.offset
    keep = mask.keep_keys(problem.lk)
    if isinstance(offset, Tensor) and (mask.left is not None or mask.right is not None):
        shown = Visibility(replace(mask, document_ids=None, allow=None), offset, problem.lq, problem.lk, 1)
        keep = shown.of_keys(problem.q.new_ones(problem.q.shape[0], 1, problem.lq, 1, dtype=torch.bool))[:, 0, :, 0]
    if keep is None:
        return problem
    hidden = ~keep[:, None, :, None]
    return problem._replace(k=problem.k.masked_fill(hidden, 0), v=problem.v.masked_fill(hidden, 0))


def _is_finite(problem: Problem) -> bool:
    """Whether all numbers are finite, except biases and sink logits of -inf."""
    # In the forward pass, kernels are right about values that all rows see.
    skip_values = problem.mask.is_full and not problem.needs_grad
    tensors = (problem.q, problem.k, problem.scores.alibi, None if skip_values else problem.v)
    return all(tensor is None or _all_finite(tensor) for tensor in tensors) and not any(
        scores is not None and _makes_row_nan(scores).any()
        for scores in (problem.scores.bias, problem.scores.sink_logits)
    )


def _all_finite(tensor: Tensor) -> bool:
    """Whether the sum of the tensor is finite."""
    # A sum is finite only if all its terms are, and costs a seventh of isfinite().all(). If it overflows, the result is
    # the same, only slower.
    tensor = tensor.detach()
    total = tensor.sum() if tensor.dtype is not torch.float16 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def _makes_row_nan(scores: Tensor) -> Tensor:
    """Where additive scores make their row NaN: NaN and +inf. -inf is a weight of 0."""
    return scores.isnan() | (scores == torch.inf)


def _nonfinite_alibi_as_bias(problem: Problem) -> Problem:
    """The problem with non-finite slopes as a bias."""
    scores, alibi = problem.scores, problem.scores.alibi
    if alibi is None or _all_finite(alibi):
        return problem
    dtype = accumulation_dtype(problem.q.dtype)
    bias = -alibi.to(dtype)[:, None, None] * problem.distance().to(dtype)
    bias = bias if scores.bias is None else scores.bias + bias
    return problem._replace(scores=scores._replace(alibi=None, bias=bias))


def _with_zeros(problem: Problem) -> Problem:
    """The problem with 0 for non-finite numbers, and -inf as it is in scores."""
    q, k, v = (torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in problem[:3])
    bias, sink_logits = (
        None if scores is None else torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=-torch.inf)
        for scores in (problem.scores.bias, problem.scores.sink_logits)
    )
    return problem._replace(q=q, k=k, v=v, scores=problem.scores._replace(bias=bias, sink_logits=sink_logits))


def _nonfinite_terms(problem: Problem) -> NonfiniteTerms:
    """What the non-finite numbers that each row sees add to its result."""
    q, k, v, bias, width = problem.q, problem.k, problem.v, problem.scores.bias, problem.v.shape[3]
    visibility = Visibility(problem.mask, problem.offset, problem.lq, problem.lk, problem.group)
    nonfinite_key = ~k.isfinite().all(dim=-1, keepdim=True)
    flags = [v.isnan() | (v == torch.inf), v.isnan() | (v == -torch.inf), nonfinite_key, torch.ones_like(nonfinite_key)]
    up, down, nan_rows, sees = visibility.of_rows(torch.cat(flags, dim=-1)).split([width, width, 1, 1], dim=-1)
    nan_rows = nan_rows | (sees & ~q.isfinite().all(dim=-1, keepdim=True))
    if bias is not None:
        visible = problem.visible()
        nan_rows = nan_rows | (visible & _makes_row_nan(bias)).any(dim=-1, keepdim=True)
        # 0 * inf is NaN, for infinite values with a weight of 0.
        zero_times_inf = _any_of(visible & (bias == -torch.inf), v.isinf().repeat_interleave(problem.group, dim=1))
        up, down = up | zero_times_inf, down | zero_times_inf
    if problem.scores.sink_logits is not None:
        nan_rows = nan_rows | _makes_row_nan(problem.scores.sink_logits)[:, None, None]
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    out = torch.where(up | nan_rows, torch.inf, zero) - torch.where(down | nan_rows, torch.inf, zero)
    lse = torch.where(nan_rows.squeeze(-1), torch.nan, zero.to(accumulation_dtype(q.dtype)))
    return NonfiniteTerms(problem, out, lse)


class Visibility(NamedTuple):
    """Which rows see which keys, as queries linear in the lengths for intervals and padding."""

    mask: Mask
    offset: int | Tensor
    lq: int
    lk: int
    group: int

    def of_rows(self, flags: Tensor) -> Tensor:
        """Whether each row sees a flagged key: (B, H, Lq, C) from flags (B, Hkv, Lk, C)."""
        mask, lk = self.mask, self.lk
        if self.mask.is_pairwise:
            return _any_of(self.pairs(flags.device), flags.repeat_interleave(self.group, dim=1))
        keep = mask.keep_keys(lk)
        if keep is not None:
            flags = flags & keep[:, None, :, None]
        position = positions(self.lq, self.offset, flags.device)
        start = torch.zeros_like(position) if mask.left is None else (position - mask.left).clamp(0, lk)
        stop = torch.full_like(position, lk) if mask.right is None else (position + mask.right + 1).clamp(0, lk)
        if mask.prefix_tokens:
            stop = stop.clamp(min=min(mask.prefix_tokens, lk))
        if mask.chunk is not None:
            start, stop = self._within_chunk(position, start, stop, lk)
        seen = _any_between(flags, start, stop)
        if mask.sink_tokens:
            seen = seen | _any_between(flags, torch.zeros_like(stop), stop.clamp(max=mask.sink_tokens))
        return seen.repeat_interleave(self.group, dim=1)

    def of_keys(self, flags: Tensor) -> Tensor:
        """Whether each key is seen by a flagged row: (B, Hkv, Lk, C) from flags (B, H, Lq, C)."""
        mask, lq = self.mask, self.lq
        if self.mask.is_pairwise:
            seen = _any_of(self.pairs(flags.device).mT, flags)
        else:
            row = positions(self.lk, -self.offset, flags.device)  # the row at the position of each key
            key = torch.arange(self.lk, device=flags.device)
            start = torch.zeros_like(row) if mask.right is None else (row - mask.right).clamp(0, lq)
            stop = torch.full_like(row, lq) if mask.left is None else (row + mask.left + 1).clamp(0, lq)
            if mask.sink_tokens:
                stop = torch.where(key < mask.sink_tokens, lq, stop)
            if mask.prefix_tokens:
                start = torch.where(key < mask.prefix_tokens, 0, start)
            if mask.chunk is not None:
                start, stop = self._within_chunk(key, start, stop, lq, key - row)
            seen = _any_between(flags, start, stop)
            keep = mask.keep_keys(self.lk)
            if keep is not None:
                seen = seen & keep[:, None, :, None]
        per_group: Tensor = seen.unflatten(1, (-1, self.group))
        return per_group.any(dim=2)

    def _within_chunk(
        self, position: Tensor, start: Tensor, stop: Tensor, length: int, first: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """Ranges of queries or keys, cut to the chunk of each position. Number 0 has position ``first``."""
        size, phase = self.mask.chunk, self.mask.chunk_start
        assert size is not None
        begin = position - (position - phase) % size - first
        return torch.maximum(start, begin.clamp(0, length)), torch.minimum(stop, (begin + size).clamp(0, length))

    def pairs(self, device: torch.device) -> Tensor:
        """The mask as a dense tensor, broadcastable to (B, H, Lq, Lk)."""
        return self.mask.visible(self.lq, self.lk, self.offset, device=device)


def _any_of(pairs: Tensor, flags: Tensor) -> Tensor:
    """Whether a flag (..., n, C) is set among those that the pairs (..., m, n) select: (..., m, C)."""
    return pairs.float() @ flags.float() > 0


def _any_between(flags: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Whether a flag (B, H, n, C) is set in each range ``start`` to ``stop``, both (B or 1, m): (B, H, m, C)."""
    count = F.pad(flags.cumsum(dim=2, dtype=torch.int32), (0, 0, 1, 0))
    batch = torch.arange(count.shape[0], device=count.device)[:, None]
    before_stop, before_start = (count.transpose(1, 2)[batch, bound] for bound in (stop, start))
    return (before_stop > before_start).transpose(1, 2)


class _AddTerms(torch.autograd.Function):
    """`_add_terms`, with a backward that passes finite gradients on and gives NaN to all that non-finite rows see.

    A row is non-finite in the backward pass if its incoming gradient is, or if its result is and its incoming gradient
    is not 0. A row whose incoming gradient is 0 adds nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        out: Tensor, lse: Tensor | None, nonfinite_out: Tensor | None, nonfinite_lse: Tensor | None, *others
    ) -> tuple[Tensor, Tensor | None]:
        return _add_terms(out, lse, nonfinite_out, nonfinite_lse)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, _, nonfinite_out, _, q, k, v, bias, alibi, sink_logits, offset, *fields = inputs
        tensors = fields[NUMBERS:]
        ctx.save_for_backward(nonfinite_out, sink_logits, offset if isinstance(offset, Tensor) else None, *tensors)
        ctx.shapes = [None if x is None else x.shape for x in (q, k, v, bias, alibi)]
        # A sum is a node of this graph: torch's compiler loses an offset that was computed outside of it.
        ctx.offset = None if isinstance(offset, Tensor) else offset + 0
        ctx.numbers = fields[:NUMBERS]

    @staticmethod
    def backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
        nonfinite_out, sink_logits, offsets, *tensors = ctx.saved_tensors
        incoming = [gradient for gradient in (d_out, d_lse) if gradient is not None]
        if nonfinite_out is None and kernels.can_read_values(*incoming) and all(map(_all_finite, incoming)):
            return d_out, d_lse, *[None] * (len(ctx.needs_input_grad) - 2)
        columns = [d_out] if d_lse is None else [d_out, d_lse[..., None]]
        nan_rows = torch.stack([~column.isfinite().all(dim=-1) for column in columns]).any(dim=0)
        if nonfinite_out is not None:
            has_grad = torch.stack([(column != 0).any(dim=-1) for column in columns]).any(dim=0)
            nan_rows = nan_rows | (has_grad & ~nonfinite_out.isfinite().all(dim=-1))
        nan_rows = nan_rows[..., None]
        d_out, d_lse = d_out.masked_fill(nan_rows, 0), None if d_lse is None else d_lse.masked_fill(nan_rows[..., 0], 0)
        offset = ctx.offset if offsets is None else offsets
        nan_gradients = _nan_gradients(ctx, nan_rows, sink_logits, offset, tensors)
        return d_out, d_lse, None, None, *nan_gradients, *[None] * (len(ctx.needs_input_grad) - 4 - len(nan_gradients))


class _AddTermsWithJvp(_AddTerms):
    """`_AddTerms` with forward-mode derivatives, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx, d_out, d_lse, *others):  # type: ignore[no-untyped-def]
        return d_out.clone(), None if d_lse is None else d_lse.clone()


def _nan_gradients(
    ctx: Any, nan_rows: Tensor, sink_logits: Tensor | None, offset: int | Tensor, mask_tensors: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of q, k, v, bias, alibi and sink logits: NaN for all that ``nan_rows (B, H, Lq, 1)`` see, else 0."""
    q, k, v, bias, alibi = ctx.shapes
    visibility = Visibility(Mask(*ctx.numbers, *mask_tensors), offset, q[2], k[2], q[1] // k[1])
    seen = visibility.of_keys(nan_rows)
    sees = nan_rows & visibility.of_rows(torch.ones_like(seen))

    def nan(flags: Tensor) -> Tensor:
        return torch.where(flags, torch.nan, torch.zeros((), device=flags.device))

    return [
        nan(sees).expand(q),
        nan(seen).expand(k),
        nan(seen).expand(v),
        None if bias is None else nan(visibility.pairs(nan_rows.device) & nan_rows).sum_to_size(bias),
        None if alibi is None else nan(sees.any(dim=(0, 2, 3))),
        None if sink_logits is None else nan(nan_rows.any(dim=(0, 2, 3)) & (sink_logits != -torch.inf)),
    ]
