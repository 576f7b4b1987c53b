"""Runs of positions: which of them each rank holds. Ints alone, no process group."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qkv.arguments import require_int

MAX_RUNS = 64
"""runs of a rank: each is a call of the kernel, and tokens dealt out one by one would be n / P of them"""


class Run(NamedTuple):
    """Positions ``start .. stop - 1``."""

    start: int
    stop: int


Runs = tuple[Run, ...]
"""what one rank holds, in the order of its rows"""
Layout = tuple[Runs, ...]
"""what each rank holds"""


def even(n: int, ranks: int) -> Layout:
    """One run for each rank, in order, whose lengths differ by at most 1."""
    return normalised([(cut(n, rank, ranks), cut(n, rank + 1, ranks))] for rank in range(ranks))


def zigzag(n: int, ranks: int) -> Layout:
    """Two of 2 P even runs for each rank: one from the front and one from the back."""
    blocks = even(n, 2 * ranks)
    return normalised([*blocks[rank], *blocks[2 * ranks - 1 - rank]] for rank in range(ranks))


def cut(n: int, part: int, parts: int) -> int:
    """Where part number ``part`` of ``parts`` begins in n."""
    return n * part // parts


def normalised(layout: Iterable[Sequence[tuple[int, int]]]) -> Layout:
    """The layout without empty runs, and with neighbours in one run."""
    found: list[Runs] = []
    for runs in layout:
        kept: list[Run] = []
        for start, stop in runs:
            if kept and kept[-1].stop == start:
                kept[-1] = Run(kept[-1].start, stop)
            elif start < stop:
                kept.append(Run(start, stop))
        found.append(tuple(kept))
    return tuple(found)


def rows_of(runs: Runs) -> int:
    """The number of rows of a rank."""
    return sum(stop - start for start, stop in runs)


def numbered(runs: Runs) -> list[tuple[Run, int]]:
    """Each run with the row at which it begins."""
    found, row = [], 0
    for run in runs:
        found.append((run, row))
        row += run.stop - run.start
    return found


def require_layout(caller: str, layout: object, ranks: int) -> Layout:
    """The layout of ``ranks`` ranks, normalised.

    Raises:
        TypeError: for anything but a sequence of runs for each rank.
        ValueError: for another number of ranks, too many runs, and runs that do not hold each position once.
    """
    wanted = f"{caller}: runs must be a sequence for each rank of (start, stop) pairs"
    if not isinstance(layout, Sequence) or isinstance(layout, str):
        raise TypeError(f"{wanted}; got {type(layout).__name__}.")
    for rank, runs in enumerate(layout):
        if not isinstance(runs, Sequence) or not all(isinstance(run, Sequence) and len(run) == 2 for run in runs):
            raise TypeError(f"{wanted}; got {runs!r} for rank {rank}.")
        for run in runs:
            for bound in run:
                require_int(caller, "runs", bound, ", a position")
            if not 0 <= run[0] <= run[1]:
                raise ValueError(f"{wanted} with 0 <= start <= stop; got {tuple(run)} for rank {rank}.")
    if len(layout) != ranks:
        raise ValueError(f"{wanted} of the mesh, {ranks}; got those of {len(layout)}.")
    found = normalised(layout)
    most = max((len(runs) for runs in found), default=0)
    if most > MAX_RUNS:
        raise ValueError(
            f"{caller}: a rank must hold at most {MAX_RUNS} runs, each of which is a call of its own; got {most}. "
            "Tokens.zigzag balances causal masks with two."
        )
    end = 0
    for start, stop in sorted(run for runs in found for run in runs):
        if start != end:
            what = f"positions {start} to {end - 1} twice" if start < end else f"none for {end} to {start - 1}"
            raise ValueError(f"{caller}: runs must hold each position from 0 on once; got {what}.")
        end = stop
    return found
