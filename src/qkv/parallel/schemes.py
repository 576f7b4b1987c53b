"""The three schemes of attention over ranks: ``gather``, ``heads`` and ``merge``. Each takes a `Call`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qkv.backends.result import accumulation_dtype
from qkv.backends.sinks import add_sinks
from qkv.masks import Mask, select_keys
from qkv.parallel.exchange import Route, depend, exchange
from qkv.parallel.plan import (
    Gathering,
    Interval,
    Keys,
    Plan,
    Seen,
    Share,
    Visiting,
    by_heads,
    gather_rows,
    gathering,
    keys_seen,
    of_kind,
    pairs,
    shares,
    visit_rows,
    visiting,
    whole,
)
from qkv.parallel.runs import Layout, Run, rows_of
from qkv.parallel.tokens import Tokens
from qkv.partial import merge_stacked
from qkv.scores import ScoreOptions, Scores


class PieceOptions(ScoreOptions, total=False):
    """The options of attention over a piece of queries and keys."""

    mask: Mask
    offset: int | Tensor


class Solve(Protocol):
    """Attention over a piece, on this rank."""

    def __call__(
        self, q: Tensor, keys: Sequence[Tensor], options: PieceOptions, *, wants_lse: bool
    ) -> tuple[Tensor, Tensor | None]: ...


class Call(NamedTuple):
    """A validated call of attention over ranks."""

    q: Tensor
    """(B, H, rows, D), those of this rank"""
    keys: tuple[Tensor, ...]
    """(B, Hkv, rows, width) of this rank: keys and values, and where they are in int8 their scales, of width 1"""
    value_width: int
    tokens: Tokens
    route: Route
    key_layout: Layout | None
    """None where each rank has all keys"""
    n_keys: int
    """of all ranks"""
    mask: Mask
    """of all queries and keys, as the offset and the bias"""
    offset: int | Tensor
    scores: Scores
    """without the bias"""
    bias: Callable[[int, int], Tensor] | None
    """of the query rows from one number up to another, (B or 1, H or 1, rows or 1, keys or 1)"""
    solve: Solve
    wants_lse: bool

    @property
    def seen(self) -> Seen:
        return keys_seen(self.mask, self.tokens.runs, self.n_keys, self.offset)

    @property
    def shares(self) -> tuple[Share, ...]:
        return shares(self.q.shape[1], self.keys[0].shape[1], len(self.tokens.runs))

    def options(
        self, mask: Mask, offset: int | Tensor, bias: Tensor | None, heads: Interval, first_key: int
    ) -> PieceOptions:
        """The options of a piece of some query heads, whose keys begin at the position ``first_key``."""
        (first, end), draw = heads, self.scores.draw
        if draw is not None:
            draw = draw._replace(first_head=draw.first_head + first, first_key=draw.first_key + first_key)
        alibi, sink_logits = self.scores.alibi, self.scores.sink_logits
        if end - first < self.q.shape[1]:
            mask = mask.select_heads(first, end)
            bias = bias if bias is None or bias.shape[1] == 1 else bias[:, first:end]
            alibi = None if alibi is None else alibi[first:end]
            sink_logits = None if sink_logits is None else sink_logits[first:end]
        return {
            "mask": mask,
            "offset": offset,
            "scale": self.scores.scale,
            "softcap": self.scores.softcap,
            "bias": bias,
            "alibi": alibi,
            "sink_logits": sink_logits,
            "dropout": self.scores.dropout,
            "draw": draw,
        }

    def nothing(self, heads: int, rows: int) -> tuple[Tensor, Tensor]:
        """The result of rows that see no key, on a rank that computes none; it depends on all that results do."""
        bias = [] if self.bias is None else [self.bias(0, 0)]
        zero = sum(tensor[..., :0].sum() for tensor in (self.q, *self.keys, *self.scores.tensors(), *bias))
        like = self.q.new_zeros(self.q.shape[0], heads, rows, self.value_width) + zero
        return like, like.new_full(like.shape[:3], -torch.inf, dtype=accumulation_dtype(like.dtype)) + zero


def gather(call: Call) -> tuple[Tensor, Tensor | None]:
    """Each rank receives the keys that its queries may see, and computes its rows over them."""
    found = _gathering(call)
    arrived = exchange(found.plan, call.route, call.keys)
    every_head = (0, call.q.shape[1])
    parts = []
    for run, q, keys, tensors in zip(
        call.tokens.own, _by_run(call.q, call.tokens.own), found.keys, arrived.kinds[0], strict=True
    ):
        bias = None if call.bias is None else select_keys(call.bias(*run), keys.start, keys.stop, keys.head)
        offset = call.offset + run.start + keys.shift()
        options = call.options(_mask_of(call, run, keys), offset, bias, every_head, keys.start - keys.head)
        parts.append(call.solve(q, tensors, options, wants_lse=call.wants_lse))
    out, lse = _joined(parts, 2) if parts else call.nothing(every_head[1], 0)
    return depend(out, arrived.link), None if lse is None else depend(lse, arrived.link)


def _mask_of(call: Call, run: Run, keys: Keys) -> Mask:
    """The mask of a run over the keys that lie in memory for it."""
    if keys.head:
        return call.mask.select_queries(*run).select_keys(keys.start, keys.stop, keys.head)
    return call.mask.select_apart(run, (keys.start, keys.stop), call.n_keys, call.offset)


def heads(call: Call) -> tuple[Tensor, Tensor | None]:
    """Each rank receives all queries and keys of some heads, and sends results back (DeepSpeed-Ulysses)."""
    plan, mine, count = _by_heads(call), call.shares[call.tokens.rank], call.q.shape[1]
    arrived = exchange(plan, call.route, [call.q], call.keys)
    (q,), keys = arrived.kinds[0][0], arrived.kinds[1][0]
    n, first = call.tokens.length, mine.queries[0]
    bias = None if call.bias is None else call.bias(0, n)
    parts = []
    for (start, stop), (first_key, end_key) in mine.groups:
        options = call.options(call.mask, call.offset, bias, (first + start, first + stop), 0)
        of_group = [tensor[:, first_key:end_key] for tensor in keys]
        parts.append(call.solve(q[:, start:stop], of_group, options, wants_lse=call.wants_lse))
    out, lse = _joined(parts, 1) if parts else call.nothing(0, n)
    out = depend(out, arrived.link)
    back = of_kind(plan, 0).reversed((whole(count, call.tokens.rows),))
    results = [out] if lse is None or not call.wants_lse else [out, lse[..., None]]
    found = exchange(back, call.route, results).kinds[0][0]
    return found[0], found[1][..., 0] if call.wants_lse else None


def merge(call: Call) -> tuple[Tensor, Tensor | None]:
    """Queries go to the ranks whose keys they may see; partial results, in fp32 or higher, come back and are merged."""
    plans, route, every_head = _visiting(call), call.route, (0, call.q.shape[1])
    wide = accumulation_dtype(call.q.dtype)
    keys = [tensor if tensor.dtype is torch.int8 else tensor.to(wide) for tensor in call.keys]
    arrived = exchange(plans.there, route, [call.q])
    at_keys = call._replace(scores=call.scores._replace(sink_logits=None))
    parts = []
    for visit, (q,) in zip(plans.visits, arrived.kinds[0], strict=True):
        met = []
        for run, row in visit.keys:
            mask = call.mask.select_apart(visit.run, run, call.n_keys, call.offset)
            bias = None if call.bias is None else select_keys(call.bias(*visit.run), run.start, run.stop, 0)
            offset = call.offset + visit.run.start - run.start
            options = at_keys.options(mask, offset, bias, every_head, run.start)
            of_run = [tensor[:, :, row : row + run.stop - run.start] for tensor in keys]
            met.append(call.solve(q.to(wide), of_run, options, wants_lse=True))
        parts.append(_merged(met))
    out, lse = _joined(parts, 2) if parts else call.nothing(every_head[1], 0)
    assert lse is not None
    exchanged = exchange(plans.back, route, [depend(out.to(wide), arrived.link), lse[..., None]])
    returned, rows = exchanged.kinds[0], []
    for run, own in zip(call.tokens.own, plans.partials, strict=True):
        if own:
            rows.append(_merged([(returned[index][0], returned[index][1][..., 0]) for index in own]))
        else:
            rows.append(call.nothing(every_head[1], run.stop - run.start))
    out, lse = _joined(rows, 2) if rows else call.nothing(every_head[1], 0)
    assert lse is not None
    if call.scores.sink_logits is not None:
        out, lse = add_sinks(out, lse, call.scores.sink_logits)
    return depend(out.to(call.q.dtype), exchanged.link), depend(lse, exchanged.link) if call.wants_lse else None


SCHEMES: dict[str, Callable[[Call], tuple[Tensor, Tensor | None]]] = {"gather": gather, "heads": heads, "merge": merge}
"""in the order in which ``auto`` takes those that send as much"""


def bytes_sent(call: Call) -> dict[str, tuple[int, ...]]:
    """The bytes that each rank sends to others in a forward pass, by scheme, of the schemes that can solve the call."""
    if call.key_layout is None:
        return {"gather": (0,) * len(call.tokens.runs)}
    batch, count, _, width = call.q.shape
    size = call.q.element_size()
    wide = torch.finfo(accumulation_dtype(call.q.dtype)).bits // 8
    of_key = batch * sum(tensor.shape[3] * tensor.element_size() for tensor in call.keys)
    of_query, of_result = batch * width * size, batch * call.value_width * size
    of_result += batch * wide if call.wants_lse else 0
    of_heads, copies = [], sum(share.keys[1] - share.keys[0] for share in call.shares)
    for share, own, own_keys in zip(call.shares, call.tokens.runs, call.key_layout, strict=True):
        heads, kv_heads = share.queries[1] - share.queries[0], share.keys[1] - share.keys[0]
        rows = rows_of(own)
        leaving = rows * (count - heads) * of_query + rows_of(own_keys) * (copies - kv_heads) * of_key
        of_heads.append(leaving + (call.tokens.length - rows) * heads * of_result)
    sent, answered = visit_rows(call.seen, call.tokens.runs, call.key_layout)
    there, back = count * of_query, batch * count * (call.value_width + 1) * wide
    return {
        "gather": tuple(rows * of_key * call.keys[0].shape[1] for rows in gather_rows(call.seen, call.key_layout)),
        "heads": tuple(of_heads),
        "merge": tuple(rows * there + others * back for rows, others in zip(sent, answered, strict=True)),
    }


def scores_computed(call: Call) -> dict[str, tuple[int, ...]]:
    """The scores that each rank computes, by scheme: those that positions show, of all heads and rows of the batch."""
    batch, count = call.q.shape[:2]
    offset, mask = call.offset, call.mask
    if isinstance(offset, Tensor):
        mask, offset = Mask(), 0
    every_key = (0, call.n_keys)
    own = [sum(pairs(mask, run, every_key, offset) for run in runs) for runs in call.tokens.runs]
    found = {"gather": tuple(batch * count * rows for rows in own)}
    if call.key_layout is not None:
        everything = Run(0, call.tokens.length)
        found["heads"] = tuple(batch * (share.queries[1] - share.queries[0]) * sum(own) for share in call.shares)
        found["merge"] = tuple(
            batch * count * sum(pairs(mask, everything, run, offset) for run in runs) for runs in call.key_layout
        )
    return found


def _gathering(call: Call) -> Gathering:
    # The distance to sink tokens counts in ALiBi, and their position in dropout.
    keeps_distances = call.scores.alibi is not None or call.scores.dropout > 0
    kv_heads = call.keys[0].shape[1]
    return gathering(call.seen, call.key_layout, kv_heads, call.tokens.rank, keeps_distances=keeps_distances)


def _by_heads(call: Call) -> Plan:
    assert call.key_layout is not None
    n = call.tokens.length, call.n_keys
    return by_heads(call.tokens.runs, call.key_layout, call.shares, n, call.tokens.rank)


def _visiting(call: Call) -> Visiting:
    assert call.key_layout is not None
    return visiting(call.seen, call.tokens.runs, call.key_layout, call.q.shape[1], call.tokens.rank)


def _by_run(q: Tensor, runs: Sequence[Run]) -> Sequence[Tensor]:
    """The queries of each run."""
    return q.split([run.stop - run.start for run in runs], dim=2) if len(runs) > 1 else [q] * len(runs)


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    """Results side by side, by heads or by rows, in memory as the kernel's: (B, rows, H, Dv)."""
    if len(parts) == 1:
        return parts[0]
    outs = [out.transpose(1, 2) for out, _ in parts]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat(outs, dim=3 - dim).transpose(1, 2), torch.cat(lses, dim=dim) if lses else None


def _merged(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Partial results of the same queries as one."""
    if len(parts) == 1:
        return parts[0]
    return merge_stacked(
        torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts if lse is not None])
    )
