"""Attention over several sequences in one call: packed, or with keys in pages."""

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


class PagedKeys(NamedTuple):
    """Keys and values of N sequences, in a pool of pages."""

    k: Tensor
    """(pages, page_size, Hkv, D)"""
    v: Tensor
    """(pages, page_size, Hkv, Dv)"""
    firsts: Tensor
    """integer (N,): the first key of sequence n is row ``firsts[n] % page_size`` of page
    ``tables[n, firsts[n] // page_size]``"""
    lengths: Tensor
    """integer (N,), number of keys of each sequence"""
    tables: Tensor | None = None
    """integer (N, entries), the pages of each sequence in order; sequences may share pages, and entries past the keys
    of a sequence are ignored. None for a single page, in which sequences do not overlap"""

    @classmethod
    def packed(cls, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor | None = None) -> "PagedKeys":
        """Packed keys ``(T, Hkv, D)`` as one page: from each of ``starts (N + 1,)``, the first ``lengths`` keys."""
        return cls(k[None], v[None], starts[:-1], starts.diff() if lengths is None else lengths)

    def gathered(self) -> "PagedKeys":
        """The same keys gathered into one page: a copy, with gradients."""
        if self.tables is None:
            return self
        device, page_size = self.k.device, self.k.shape[1]
        firsts, lengths, tables = (x.to(device, torch.int64) for x in (self.firsts, self.lengths, self.tables))
        starts = lengths.cumsum(0) - lengths
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        row = torch.arange(len(sequence), device=device) + (firsts - starts)[sequence]
        page = tables[sequence, row // page_size]
        rows = page.where(page >= 0, len(self.k)), row % page_size  # -1 would be the last page
        return PagedKeys(self.k[rows][None], self.v[rows][None], starts, lengths)


class Sequences(NamedTuple):
    """N validated sequences, made by `make_sequences`."""

    caller: str
    problem: Problem
    """all queries over one page, for the dtype, the mask and the scores that sequences share"""
    q: Tensor
    starts: Tensor
    keys: PagedKeys
    alibi: Tensor | None

    def attend(self) -> Partial:
        """Attention ``(T, H, Dv)`` and its lse ``(H, T)``.

        One call of the kernel if it can take the problem, else one of `attention` for each sequence. The bits of a
        sequence do not depend on the other sequences, nor on where its keys are in memory.
        """
        sequences = self._prepared()
        if native.why_not(sequences.problem):
            return sequences._attend_each()
        return sequences._attend_in_one_call()

    def _prepared(self) -> "Sequences":
        """The sequences in the dtype of autocast, with contiguous widths; in one page if that or gradients need it."""
        q, keys, dtype = self.q, self.keys, self.problem.q.dtype
        fits = keys.k.dtype is dtype and keys.k.stride(3) == keys.v.stride(3) == 1
        # Gather instead of copying the whole pool, and since gradients of shared pages are sums.
        if keys.tables is not None and (self.problem.needs_grad or not fits):
            keys = keys.gathered()
        elif fits and q.dtype is dtype and q.stride(2) == 1:
            return self
        q, k, v = (x.to(dtype) for x in (q, keys.k, keys.v))
        if q.is_cpu:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        page = [x[:1].transpose(1, 2) for x in (k, v)]
        problem = self.problem._replace(q=q.transpose(0, 1).unsqueeze(0), k=page[0], v=page[1])
        return self._replace(problem=problem, q=q, keys=keys._replace(k=k, v=v))

    def _attend_in_one_call(self) -> Partial:
        keys = self.keys
        k, v = (x.transpose(1, 2) for x in (keys.k, keys.v))
        call = native.call_of(self.problem)._replace(k=k, v=v, alibi=self.alibi)
        sequences = kernels.Sequences(call, self.starts, keys.firsts, keys.lengths, keys.tables)
        out, lse = kernels.forward_sequences(sequences, needs_grad=self.problem.needs_grad)
        return Partial(out.squeeze(0).transpose(0, 1), lse.squeeze(0))

    def _attend_each(self) -> Partial:
        problem, keys = self.problem, self.keys.gathered()
        lengths = [stop - start for start, stop in pairwise(self.starts.tolist())]
        ranges = zip(keys.firsts.tolist(), keys.lengths.tolist(), strict=True)
        results: list[Partial] = []
        for n, (q, (first, length)) in enumerate(zip(self.q.split(lengths), ranges, strict=True)):
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
    keys: PagedKeys,
    *,
    mask: Mask = FULL,
    **scores: Unpack[ScoreOptions],
) -> Sequences:
    """Validates attention of N sequences, each over its own keys, its last query aligned with its last key.

    Args:
        caller: the function that error messages name.
        q: ``(T, H, D)``, the queries of all sequences one after the other.
        starts: integer ``(N + 1,)``, from 0 to T, non-decreasing: the first query of each sequence, then T.
        keys: those of all sequences.
        mask: an interval. Positions count from the first key of each sequence.
        **scores: as in `qkv.attention`, without a bias; ``alibi`` is ``(H,)`` or ``(N, H)``.

    Returns:
        The validated sequences; `Sequences.attend` computes them.

    Raises:
        TypeError, ValueError: for tensors that do not fit together. The numbers in starts, lengths and tables are
            checked by `Sequences.attend`, which raises ValueError before it reads out of bounds.
    """
    count = keys.lengths.shape[0]
    if count == 0 or starts.shape[0] != count + 1:
        raise ValueError(
            f"{caller}: queries and keys must have the same number of sequences, at least 1; "
            f"got {starts.shape[0] - 1} and {count}."
        )
    if keys.k.shape[0] == 0:
        raise ValueError(f"{caller}: keys must have at least one page; got none.")
    alibi = scores.get("alibi")
    if alibi is not None:
        require_tensors(caller, alibi_slopes=alibi)
        scores["alibi"] = alibi if alibi.dim() == 1 else alibi[:1].squeeze(0)
    if alibi is not None and alibi.shape not in ((q.shape[1],), (count, q.shape[1])):
        raise ValueError(
            f"{caller}: alibi_slopes must be ({q.shape[1]},) or ({count}, {q.shape[1]}), one per query head; "
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
