"""Attention of several sequences in one call: packed one after the other, or with keys in pages of a pool."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from qkv import kernels
from qkv.arguments import require_tensors
from qkv.backends import native
from qkv.functional import attend
from qkv.masks import FULL, Mask
from qkv.partial import Partial
from qkv.problem import Problem, make_problem
from qkv.scores import ScoreOptions


class Keys(NamedTuple):
    """Keys and values of N sequences, in a pool of pages."""

    k: Tensor
    """(pages, page_size, Hkv, D)"""
    v: Tensor
    """(pages, page_size, Hkv, Dv)"""
    firsts: Tensor
    """integer (N,): the first key of sequence n is row ``firsts[n] % page_size`` of page
    ``tables[n, firsts[n] // page_size]``"""
    lengths: Tensor
    """integer (N,), keys of each"""
    tables: Tensor | None = None
    """integer (N, entries), the pages of each sequence in order, some of which it may share with others; entries behind
    its keys have no meaning. None where there is but one page, of which each sequence has its own keys"""

    @classmethod
    def packed(cls, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor | None = None) -> "Keys":
        """Keys ``(T, Hkv, D)`` of sequences that begin at ``starts (N + 1,)``, of which the first ``lengths`` count."""
        return cls(k[None], v[None], starts[:-1], starts.diff() if lengths is None else lengths)

    def side_by_side(self) -> "Keys":
        """The same keys in one page: a copy, through which gradients flow."""
        if self.tables is None:
            return self
        device, page_size = self.k.device, self.k.shape[1]
        firsts, lengths, tables = (x.to(device, torch.int64) for x in (self.firsts, self.lengths, self.tables))
        starts = lengths.cumsum(0) - lengths
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        place = torch.arange(len(sequence), device=device) + (firsts - starts)[sequence]
        page = tables[sequence, place // page_size]
        rows = page.where(page >= 0, len(self.k)), place % page_size  # torch would count from the end
        return Keys(self.k[rows][None], self.v[rows][None], starts, lengths)


class Sequences(NamedTuple):
    """N sequences that fit together, as `make_sequences` has found; `attend` computes them."""

    caller: str
    problem: Problem
    """What they share: that of all queries over a page."""
    q: Tensor
    starts: Tensor
    keys: Keys
    alibi: Tensor | None

    def attend(self) -> Partial:
        """``(T, H, Dv)``, and the lse ``(H, T)``.

        One call of the kernel, or, where that cannot be, one of `attention` for each sequence. A sequence has the bits
        that it has alone, wherever its keys lie.
        """
        found = self._laid_out()
        return found._attend_each() if native.why_not(found.problem) else found._attend_at_once()

    def _laid_out(self) -> "Sequences":
        """The same in the dtype that autocast wants and with contiguous widths, and what has a gradient in one page."""
        q, keys, dtype = self.q, self.keys, self.problem.q.dtype
        fits = keys.k.dtype is dtype and keys.k.stride(3) == keys.v.stride(3) == 1
        # A pool is never copied as a whole. Gradients of pages that sequences share are sums.
        if keys.tables is not None and (self.problem.needs_grad or not fits):
            keys = keys.side_by_side()
        elif fits and q.dtype is dtype and q.stride(2) == 1:
            return self
        q, k, v = (x.to(dtype) for x in (q, keys.k, keys.v))
        if q.is_cpu:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        page = [x[:1].transpose(1, 2) for x in (k, v)]
        problem = self.problem._replace(q=q.transpose(0, 1).unsqueeze(0), k=page[0], v=page[1])
        return self._replace(problem=problem, q=q, keys=keys._replace(k=k, v=v))

    def _attend_at_once(self) -> Partial:
        keys = self.keys
        k, v = (x.transpose(1, 2) for x in (keys.k, keys.v))
        call = native.call_of(self.problem)._replace(k=k, v=v, alibi=self.alibi)
        sequences = kernels.Sequences(call, self.starts, keys.firsts, keys.lengths, keys.tables)
        out, lse = kernels.forward_sequences(sequences, needs_grad=self.problem.needs_grad)
        return Partial(out.squeeze(0).transpose(0, 1), lse.squeeze(0))

    def _attend_each(self) -> Partial:
        problem, keys = self.problem, self.keys.side_by_side()
        lengths = [stop - start for start, stop in pairwise(self.starts.tolist())]
        places = zip(keys.firsts.tolist(), keys.lengths.tolist(), strict=True)
        results: list[Partial] = []
        for n, (q, (first, length)) in enumerate(zip(self.q.split(lengths), places, strict=True)):
            alibi = self.alibi if self.alibi is None or self.alibi.dim() == 1 else self.alibi[n]
            k, v = (x[0, first : first + length] for x in (keys.k, keys.v))
            partial = attend(
                self.caller,
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                mask=problem.mask,
                offset=length - len(q),
                **{**problem.scores._asdict(), "alibi": alibi},
            )
            results.append(partial)
        return Partial(
            out=torch.cat([result.out[0].transpose(0, 1) for result in results]),
            lse=torch.cat([result.lse[0] for result in results], dim=1),
        )


def make_sequences(
    caller: str,
    q: Tensor,
    starts: Tensor,
    keys: Keys,
    *,
    mask: Mask = FULL,
    **scores: Unpack[ScoreOptions],
) -> Sequences:
    """Attention of each of N sequences over its own keys, the last query aligned with the last key.

    Args:
        caller: the function that error messages name.
        q: ``(T, H, D)``, the queries of all sequences one after the other.
        starts: integer ``(N + 1,)``, where the queries of each begin, and the end: 0 to T, non-decreasing.
        keys: of all sequences.
        mask: an interval, in which positions count from the first key of each sequence.
        **scores: as in `qkv.attention`, without a bias; ``alibi`` is ``(H,)`` or ``(N, H)``.

    Returns:
        What `Sequences.attend` computes. Nothing is yet.

    Raises:
        TypeError, ValueError: for tensors that do not fit together. At starts, lengths and tables `attend` looks, which
            reads nothing outside of the tensors, and raises ValueError.
    """
    count = keys.lengths.shape[0]
    if count == 0 or starts.shape[0] != count + 1:
        raise ValueError(
            f"{caller}: there must be at least one sequence, and as many of queries as of keys; "
            f"got {starts.shape[0] - 1} and {count}."
        )
    if keys.k.shape[0] == 0:
        raise ValueError(f"{caller}: there must be at least one page of keys; got none.")
    alibi = scores.get("alibi")
    if alibi is not None:
        require_tensors(caller, alibi_slopes=alibi)
        scores["alibi"] = alibi if alibi.dim() == 1 else alibi[:1].squeeze(0)
    if alibi is not None and alibi.shape not in ((q.shape[1],), (count, q.shape[1])):
        raise ValueError(
            f"{caller}: alibi_slopes must be ({q.shape[1]},) or ({count}, {q.shape[1]}), one a query head; "
            f"got shape {tuple(alibi.shape)}."
        )
    problem = make_problem(
        caller,
        q.transpose(0, 1).unsqueeze(0),
        *(x[:1].transpose(1, 2) for x in (keys.k, keys.v)),
        mask=mask,
        offset=0,
        wants_lse=True,
        **scores,
    )
    if next(mask.tensors(), None) is not None:
        raise ValueError(f"{caller}: the mask of packed sequences must be an interval, the same for all; got {mask!r}.")
    return Sequences(caller, problem, q, starts, keys, alibi)
