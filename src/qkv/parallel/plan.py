"""What each rank sends to which, as a pure function of the mask and of layouts: no tensors move, no process group.

All ranks compute the same plan from the same ints, so no collective is spent on sizes.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qkv import kernels
from qkv.masks import FULL, NUMBERS, Mask
from qkv.parallel.runs import Layout, Run, Runs, cut, numbered, rows_of

Interval = tuple[int, int]

PLANS = 256
"""plans that are kept: those of all layers of a model, for some lengths"""


class Keys(NamedTuple):
    """Keys ``0 .. head - 1`` and ``start .. stop - 1``, renumbered from 0: the arguments of `Mask.select_keys`."""

    head: int
    start: int
    stop: int

    def intervals(self) -> list[Interval]:
        """Those that are not empty."""
        return [(a, b) for a, b in ((0, self.head), (self.start, self.stop)) if a < b]

    def shift(self) -> int:
        """What an offset changes by."""
        return self.head - self.start


Seen = tuple[tuple[Keys, ...], ...]
"""the keys that each run of each rank may see"""


def keys_seen(mask: Mask, queries: Layout, n_keys: int, offset: int | Tensor) -> Seen:
    """The keys that the mask may show to each run of queries: all that positions, or documents on a CPU, do not hide.

    Args:
        mask: of all queries and keys.
        queries: their layout.
        n_keys: number of keys.
        offset: position of the first query among the keys.
    """
    if isinstance(offset, Tensor) or mask.is_global is not None:
        return _keys_of_band(FULL, queries, n_keys, 0)
    band = Mask(*mask.values()[:NUMBERS])
    if mask.prefix_lengths is not None:  # numbers that would have to be read
        band = dataclasses.replace(band, right=None)
    seen = _keys_of_band(band, queries, n_keys, offset)
    ids = mask.document_ids
    if ids is None or not ids.is_cpu or not kernels.can_read_values(ids):
        return seen
    first, end = _document_bounds(ids)
    return tuple(
        tuple(
            _within(
                keys,
                int(first[run.start + offset : run.stop + offset].min()),
                int(end[run.start + offset : run.stop + offset].max()),
            )
            for keys, run in zip(of_rank, runs, strict=True)
        )
        for of_rank, runs in zip(seen, queries, strict=True)
    )


@lru_cache(PLANS)
def _keys_of_band(mask: Mask, queries: Layout, n_keys: int, offset: int) -> Seen:
    return tuple(tuple(_keys_of_run(mask, run, n_keys, offset) for run in runs) for runs in queries)


def _keys_of_run(mask: Mask, run: Run, n_keys: int, offset: int) -> Keys:
    near = dataclasses.replace(mask, sink_tokens=0)
    start, stop = near.key_range(run.stop - run.start, n_keys, offset + run.start)
    head = min(mask.sink_tokens, stop)
    return Keys(0, 0, stop) if start <= head else Keys(head, start, stop)


def _within(keys: Keys, first: int, end: int) -> Keys:
    """The keys that are among ``first .. end - 1``."""
    start = max(keys.start, first)
    head = 0 if first >= keys.head else keys.head
    return Keys(head, start, max(start, min(keys.stop, end)))


_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""what `_document_bounds` found for a tensor, with its version"""


def _document_bounds(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each position, where the documents of any row of the batch begin and end that have it: two of ``(L,)``."""
    version = None if ids.is_inference() else ids._version
    known = _bounds.get(ids)
    if known is not None and known[0] == version and version is not None:
        return known[1]  # type: ignore[no-any-return]
    firsts, ends = [], []
    positions = torch.arange(ids.shape[1])
    for row in ids:
        _, number = torch.unique(row, return_inverse=True)
        none = torch.zeros(ids.shape[1], dtype=torch.int64)
        ends.append(none.scatter_reduce(0, number, positions + 1, "amax")[number])
        firsts.append((none + ids.shape[1]).scatter_reduce(0, number, positions, "amin")[number])
    found = torch.stack(firsts).amin(0), torch.stack(ends).amax(0)
    _bounds[ids] = version, found
    return found


class Move(NamedTuple):
    """Rows of some heads, which one rank sends to another."""

    kind: int
    """which tensors: those of queries and those of keys may have other heads and rows"""
    heads: Interval
    rows: Interval

    def size(self) -> int:
        """Number of vectors, for each row of the batch."""
        return (self.heads[1] - self.heads[0]) * (self.rows[1] - self.rows[0])


class Buffer(NamedTuple):
    """Memory for the tensors of one kind that a rank receives."""

    heads: int
    rows: int
    holes: tuple[Interval, ...]
    """rows that nobody sends, which the mask hides"""
    outputs: tuple[tuple[Interval, ...], ...]
    """the rows of each result, one after the other"""


class Plan(NamedTuple):
    """What one rank sends and receives."""

    buffers: tuple[Buffer, ...]
    """one for each kind"""
    sends: tuple[tuple[Move, ...], ...]
    """to each rank, the own one included, from its tensors"""
    receives: tuple[tuple[Move, ...], ...]
    """from each rank, into the buffers"""
    is_local: bool
    """whether no rank sends anything to another, so that no collective is needed"""

    def reversed(self, buffers: tuple[Buffer, ...]) -> "Plan":
        """The plan that brings each row of the buffers back to where it came from."""
        return Plan(buffers, self.receives, self.sends, self.is_local)


def whole(heads: int, rows: int) -> Buffer:
    """A buffer that is filled and read as a whole."""
    return Buffer(heads, rows, (), (((0, rows),),))


class _Owned(NamedTuple):
    """A part of the positions, where it lies."""

    start: int
    stop: int
    rank: int
    row: int


@lru_cache(PLANS)
def _owners(layout: Layout) -> tuple[list[int], list[_Owned]]:
    """All runs in the order of positions, and where they begin."""
    found = sorted(
        _Owned(run.start, run.stop, rank, row) for rank, runs in enumerate(layout) for run, row in numbered(runs)
    )
    return [one.start for one in found], found


def _parts(layout: Layout, interval: Interval) -> Iterator[_Owned]:
    """The parts of an interval of positions by where they lie."""
    starts, owners = _owners(layout)
    first, end = interval
    for one in owners[max(0, bisect.bisect_right(starts, first) - 1) :]:
        if one.start >= end:
            return
        start, stop = max(one.start, first), min(one.stop, end)
        if start < stop:
            yield _Owned(start, stop, one.rank, one.row + start - one.start)


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, in order."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def _wanted(of_rank: tuple[Keys, ...]) -> list[Interval]:
    """The keys that any run of a rank may see."""
    return _merged(interval for keys in of_rank for interval in keys.intervals())


class Gathering(NamedTuple):
    """A plan by which each rank receives the keys that its queries see."""

    plan: Plan
    keys: tuple[Keys, ...]
    """those that lie in memory for each run, holes included"""


def gathering(seen: Seen, layout: Layout | None, heads: int, rank: int, *, keeps_distances: bool) -> Gathering:
    """The plan of ``scheme="gather"``.

    Keys of a run begin in memory at a multiple of `kernels.KEY_PERIOD`, so that the kernel gives the same bits as over
    all keys. What lies before those that the run sees is not sent.

    Args:
        seen: from `keys_seen`.
        layout: of keys; None if each rank has all of them.
        heads: of keys.
        rank: whose plan.
        keeps_distances: whether sink tokens must be as far from other keys in memory as they are in the sequence.
    """
    return _gathering(seen, layout, heads, rank, keeps_distances)


@lru_cache(PLANS)
def _gathering(seen: Seen, layout: Layout | None, heads: int, rank: int, keeps_distances: bool) -> Gathering:
    placed = tuple(_placed(keys, keeps_distances) for keys in seen[rank])
    segments, rows = [], 0
    for start, stop in _merged(interval for keys in placed for interval in keys.intervals()):
        segments.append((start, stop, rows))
        rows += stop - start

    def local(start: int, stop: int) -> Interval:
        """Where an interval lies in memory."""
        first, row = next((first, row) for first, end, row in segments if first <= start and stop <= end)
        return row + start - first, row + stop - first

    ranks, everything = len(seen), (0, heads)
    wanted = [_wanted(of_rank) for of_rank in seen]
    sends: list[list[Move]] = [[] for _ in range(ranks)]
    receives: list[list[Move]] = [[] for _ in range(ranks)]
    if layout is None:
        sends[rank] = [Move(0, everything, interval) for interval in wanted[rank]]
        receives[rank] = [Move(0, everything, local(*interval)) for interval in wanted[rank]]
    else:
        for interval in wanted[rank]:
            for part in _parts(layout, interval):
                receives[part.rank].append(Move(0, everything, local(part.start, part.stop)))
        for peer in range(ranks):
            for interval in wanted[peer]:
                for start, stop, row in _own_parts(layout[rank], interval):
                    sends[peer].append(Move(0, everything, (row, row + stop - start)))
    filled = [local(*interval) for interval in wanted[rank]]
    outputs = tuple(tuple(local(*interval) for interval in keys.intervals()) for keys in placed)
    buffer = Buffer(heads, rows, tuple(_gaps(filled, rows)), outputs)
    is_local = layout is None or not any(gather_rows(seen, layout))
    return Gathering(Plan((buffer,), tuple(map(tuple, sends)), tuple(map(tuple, receives)), is_local), placed)


def _placed(keys: Keys, keeps_distances: bool) -> Keys:
    """The keys that lie in memory where a run sees ``keys``."""
    period = kernels.KEY_PERIOD
    start, head = keys.start // period * period, -(-keys.head // period) * period
    if keys.start == keys.stop:
        start = keys.stop
    if keys.head and (keeps_distances or start <= head):
        return Keys(0, 0, keys.stop)
    return Keys(head, start, keys.stop)


def _own_parts(runs: Runs, interval: Interval) -> list[tuple[int, int, int]]:
    """The parts of an interval that a rank holds, in the order of positions, and the rows at which they begin."""
    found = []
    for run, row in sorted(numbered(runs)):
        start, stop = max(run.start, interval[0]), min(run.stop, interval[1])
        if start < stop:
            found.append((start, stop, row + start - run.start))
    return found


def _gaps(filled: Iterable[Interval], rows: int) -> Iterator[Interval]:
    """What lies between the intervals, up to ``rows``."""
    end = 0
    for start, stop in (*_merged(filled), (rows, rows)):
        if end < start:
            yield end, start
        end = stop


def gather_rows(seen: Seen, layout: Layout) -> tuple[int, ...]:
    """The keys that each rank sends to others by ``gather``."""
    return _gather_rows(seen, layout)


@lru_cache(PLANS)
def _gather_rows(seen: Seen, layout: Layout) -> tuple[int, ...]:
    sent = [0] * len(seen)
    for rank, of_rank in enumerate(seen):
        for interval in _wanted(of_rank):
            for part in _parts(layout, interval):
                if part.rank != rank:
                    sent[part.rank] += part.stop - part.start
    return tuple(sent)


class Share(NamedTuple):
    """The heads of a rank."""

    queries: Interval
    keys: Interval
    """of keys and values, that these read"""
    groups: tuple[tuple[Interval, Interval], ...]
    """heads of queries and of keys, both counted from the first of the rank, of one call of attention each"""


@lru_cache(PLANS)
def shares(heads: int, kv_heads: int, ranks: int) -> tuple[Share, ...]:
    """The heads of each rank: as even as their number allows, each KV head with all ranks whose queries read it."""
    group, found = heads // kv_heads, []
    for rank in range(ranks):
        first, end = cut(heads, rank, ranks), cut(heads, rank + 1, ranks)
        if first == end:
            found.append(Share((first, end), (0, 0), ()))
            continue
        keys = first // group, (end - 1) // group + 1
        sizes = [(max(first, head * group) - first, min(end, (head + 1) * group) - first) for head in range(*keys)]
        groups: tuple[tuple[Interval, Interval], ...]
        if len({stop - start for start, stop in sizes}) == 1:
            groups = (((0, end - first), (0, keys[1] - keys[0])),)
        else:
            groups = tuple((size, (head, head + 1)) for head, size in enumerate(sizes))
        found.append(Share((first, end), keys, groups))
    return tuple(found)


@lru_cache(PLANS)
def by_heads(queries: Layout, keys: Layout, of_ranks: tuple[Share, ...], n: Interval, rank: int) -> Plan:
    """The plan of ``scheme="heads"``: all rows of the own heads; kind 0 are queries, kind 1 keys.

    Args:
        queries, keys: their layouts.
        of_ranks: from `shares`.
        n: number of queries and of keys.
        rank: whose plan.
    """
    mine = of_ranks[rank]
    own = mine.queries[1] - mine.queries[0], mine.keys[1] - mine.keys[0]
    sends = tuple(
        (
            *(Move(0, share.queries, (row, row + run.stop - run.start)) for run, row in numbered(queries[rank])),
            *(Move(1, share.keys, (row, row + run.stop - run.start)) for run, row in numbered(keys[rank])),
        )
        for share in of_ranks
    )
    receives = tuple(
        (*(Move(0, (0, own[0]), run) for run in queries[peer]), *(Move(1, (0, own[1]), run) for run in keys[peer]))
        for peer in range(len(of_ranks))
    )
    return Plan((whole(own[0], n[0]), whole(own[1], n[1])), sends, receives, len(of_ranks) == 1)


def of_kind(plan: Plan, kind: int) -> Plan:
    """The part of a plan that moves the tensors of one kind, which becomes kind 0."""

    def only(moves: tuple[Move, ...]) -> tuple[Move, ...]:
        return tuple(move._replace(kind=0) for move in moves if move.kind == kind)

    return plan._replace(
        buffers=(plan.buffers[kind],), sends=tuple(map(only, plan.sends)), receives=tuple(map(only, plan.receives))
    )


class Visit(NamedTuple):
    """A run of queries at the rank of some keys that it sees."""

    rank: int
    """of the queries"""
    run: Run
    keys: tuple[tuple[Run, int], ...]
    """the runs of keys, and the rows at which they begin"""


class Visiting(NamedTuple):
    """Plans by which queries go to the keys that they see, and partial results back."""

    there: Plan
    visits: tuple[Visit, ...]
    """at this rank, in the order of the outputs of `there`"""
    back: Plan
    partials: tuple[tuple[int, ...], ...]
    """for each own run, which outputs of `back` are its partial results, in the order of ranks"""


@lru_cache(PLANS)
def visiting(seen: Seen, queries: Layout, keys: Layout, heads: int, rank: int) -> Visiting:
    """The plans of ``scheme="merge"``.

    Args:
        seen: from `keys_seen`.
        queries, keys: their layouts.
        heads: of queries.
        rank: whose plan.
    """
    ranks, everything = range(len(seen)), (0, heads)
    sends: list[list[Move]] = [[] for _ in ranks]
    arrives: list[list[Move]] = [[] for _ in ranks]
    visits, ends, row = [], [], 0
    for peer in ranks:
        for wanted, run in zip(seen[peer], queries[peer], strict=True):
            met = _met(wanted, keys[rank])
            if met:
                count = run.stop - run.start
                visits.append(Visit(peer, run, met))
                arrives[peer].append(Move(0, everything, (row, row + count)))
                ends.append((row, row + count))
                row += count
    returns: list[list[Move]] = [[] for _ in ranks]
    partials: list[list[int]] = [[] for _ in queries[rank]]
    results: list[Interval] = []
    at = 0
    for peer in ranks:
        for index, ((run, first), wanted) in enumerate(zip(numbered(queries[rank]), seen[rank], strict=True)):
            if _met(wanted, keys[peer]):
                count = run.stop - run.start
                sends[peer].append(Move(0, everything, (first, first + count)))
                returns[peer].append(Move(0, everything, (at, at + count)))
                partials[index].append(len(results))
                results.append((at, at + count))
                at += count
    is_local = not any(visit_rows(seen, queries, keys)[0])
    there = Buffer(heads, row, (), tuple((end,) for end in ends))
    back = Buffer(heads, at, (), tuple((result,) for result in results))
    return Visiting(
        Plan((there,), tuple(map(tuple, sends)), tuple(map(tuple, arrives)), is_local),
        tuple(visits),
        Plan((back,), tuple(map(tuple, arrives)), tuple(map(tuple, returns)), is_local),
        tuple(map(tuple, partials)),
    )


def _met(wanted: Keys, runs: Runs) -> tuple[tuple[Run, int], ...]:
    """The runs that contain any of the keys, and the rows at which they begin."""
    return tuple(
        (run, row)
        for run, row in numbered(runs)
        if any(max(run.start, start) < min(run.stop, stop) for start, stop in wanted.intervals())
    )


@lru_cache(PLANS)
def visit_rows(seen: Seen, queries: Layout, keys: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The queries that each rank sends to others by ``merge``, and those whose partial results it sends back."""
    sent, answered = [0] * len(seen), [0] * len(seen)
    for rank, of_rank in enumerate(seen):
        for wanted, run in zip(of_rank, queries[rank], strict=True):
            owners = {part.rank for interval in wanted.intervals() for part in _parts(keys, interval)}
            for owner in owners - {rank}:
                sent[rank] += run.stop - run.start
                answered[owner] += run.stop - run.start
    return tuple(sent), tuple(answered)


@lru_cache(PLANS)
def joining(layout: Layout, rank: int) -> Plan:
    """The plan by which each rank receives all rows, in order."""
    n = sum(map(rows_of, layout))
    rows = tuple(Move(0, (0, 1), (row, row + run.stop - run.start)) for run, row in numbered(layout[rank]))
    receives = tuple(tuple(Move(0, (0, 1), run) for run in runs) for runs in layout)
    return Plan((whole(1, n),), (rows,) * len(layout), receives, len(layout) == 1)


@lru_cache(PLANS)
def dealing(held: Layout, wanted: Layout, heads: int, rank: int) -> Plan:
    """The plan by which rows go from one layout to another of the same positions."""
    everything = (0, heads)
    sends = tuple(
        tuple(
            Move(0, everything, (row, row + stop - start))
            for run in runs
            for start, stop, row in _own_parts(held[rank], run)
        )
        for runs in wanted
    )
    receives: list[list[Move]] = [[] for _ in held]
    for run, row in numbered(wanted[rank]):
        for part in _parts(held, run):
            at = row + part.start - run.start
            receives[part.rank].append(Move(0, everything, (at, at + part.stop - part.start)))
    buffer = whole(heads, rows_of(wanted[rank]))
    return Plan((buffer,), sends, tuple(map(tuple, receives)), len(held) == 1)


@lru_cache(PLANS)
def stacking(heads: int, rows: int, ranks: int) -> Plan:
    """The plan by which each rank receives the rows of all, one result for each rank."""
    places = [(rank * rows, (rank + 1) * rows) for rank in range(ranks)]
    buffer = Buffer(heads, ranks * rows, (), tuple((place,) for place in places))
    sends = ((Move(0, (0, heads), (0, rows)),),) * ranks
    return Plan((buffer,), sends, tuple((Move(0, (0, heads), place),) for place in places), ranks == 1)


COUNTED = 1 << 20
"""queries that `pairs` counts at once"""


def pairs(mask: Mask, run: Run, keys: Interval, offset: int) -> int:
    """Number of pairs of a query of the run and a key of the interval that positions show.

    Padding, documents and dense masks hide some of them; a prefix that is a tensor, and global tokens, count as all.
    """
    total = 0
    for start in range(run.start, run.stop, COUNTED):
        total += _pairs(mask, start + offset, min(start + COUNTED, run.stop) + offset, keys)
    return total


def _pairs(mask: Mask, first: int, end: int, keys: Interval) -> int:
    begin, stop = keys
    if mask.is_global is not None:
        return (end - first) * (stop - begin)
    position = torch.arange(first, end)
    low = torch.full_like(position, begin)
    high = torch.full_like(position, stop)
    if mask.right is not None and mask.prefix_lengths is None:
        high = torch.minimum(high, (position + mask.right + 1).clamp(min=mask.prefix_tokens))
    if mask.chunk is not None:
        chunk = position - (position - mask.chunk_start) % mask.chunk
        low, high = torch.maximum(low, chunk), torch.minimum(high, chunk + mask.chunk)
    sinks = (high.clamp(max=mask.sink_tokens) - low).clamp(min=0)
    near = low if mask.left is None else torch.maximum(low, position - mask.left)

    def count(stop: Tensor) -> Tensor:
        """Keys from ``near`` on, by steps of the dilation."""
        counted = torch.div(position - near, mask.dilation, rounding_mode="floor") - torch.div(
            position - stop, mask.dilation, rounding_mode="floor"
        )
        return counted.where(stop > near, 0)

    return int((count(high) + sinks - count(high.clamp(max=mask.sink_tokens))).sum())
