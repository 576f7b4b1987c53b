"""`Call`: a call of attention over ranks, and what each rank sends by the formulas of the schemes.

Bytes are those of a forward pass in fp32, for a batch of 1. Ranks divide the heads and, twice, the tokens.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from settings import Settings

from qkv import Mask

SCHEMES = ("gather", "heads", "merge")
BYTES = 4


class Call(NamedTuple):
    """Self-attention of tokens over ranks."""

    scheme: str
    mask: str
    """"full", "causal" or "window" (causal as well)"""
    layout: str
    """"even" or "zigzag\""""
    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    width: int
    window: int
    size: int = BYTES
    """bytes of a number"""

    @property
    def what(self) -> str:
        return f"{self.mask} {self.layout}" if self.mask == "causal" else self.mask

    @property
    def visible(self) -> Mask:
        return {"full": Mask.full(), "causal": Mask.causal(), "window": Mask.causal(window=self.window)}[self.mask]


def calls(settings: Settings) -> Iterator[Call]:
    """All that are measured."""
    for mask, layout in (("full", "even"), ("causal", "even"), ("causal", "zigzag"), ("window", "even")):
        for kv_heads in settings.kv_heads:
            for scheme in SCHEMES:
                yield Call(
                    scheme, mask, layout, settings.tokens, settings.ranks, settings.heads, kv_heads, settings.width,
                    settings.window,
                )  # fmt: skip


def long_window(settings: Settings) -> Call:
    """A window in a long sequence."""
    tokens, width = settings.long_tokens, settings.width
    return Call("gather", "window", "even", tokens, settings.ranks, 2, 1, width, settings.window)


def sent(call: Call) -> list[float]:
    """The bytes that each rank sends."""
    return [there + back for there, back in zip(*_moved(call)[0], strict=True)]


def received(call: Call) -> list[float]:
    """The bytes that each rank receives."""
    return [there + back for there, back in zip(*_moved(call)[1], strict=True)]


def _moved(call: Call) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """What each rank sends, there and back, and what it receives."""
    ranks, rows = call.ranks, call.tokens / call.ranks
    key, query = 2 * call.kv_heads * call.width * call.size, call.heads * call.width * call.size
    nothing = [0.0] * ranks
    if call.scheme == "heads":
        busy = min(ranks, call.heads)
        copies = max(1.0, busy / call.kv_heads)
        there = [rows * (1 - 1 / ranks) * (query + key * copies)] * ranks
        back = [rows * (1 - 1 / ranks) * query] * ranks
        if busy < ranks:  # some have no head: they send all, and receive results alone
            one = (query + key * copies) / busy, query / busy  # of a head's tokens, and of its results
            has = [(rank + 1) * busy // ranks > rank * busy // ranks for rank in range(ranks)]
            there = [rows * one[0] * (busy - own) for own in has]
            back = [(call.tokens - rows) * one[1] * own for own in has]
            into = [(call.tokens - rows) * one[0] * own for own in has]
            return (there, back), (into, [rows * one[1] * (busy - own) for own in has])
        return (there, back), (there, back)
    asked, asks = _exchanged(call)
    if call.scheme == "gather":
        return ([rows * key for rows in asked], nothing), ([rows * key for rows in asks], nothing)
    # Whole runs of queries visit the ranks whose keys they see; partial results and their lse are in fp32.
    visits, visited = _visiting(call)
    answer = call.heads * (call.width + 1) * 4
    there, back = [rows * query for rows in visits], [rows * answer for rows in visited]
    return (there, back), ([rows * query for rows in visited], [rows * answer for rows in visits])


def _exchanged(call: Call) -> tuple[list[float], list[float]]:
    """The keys that each rank sends and receives by ``gather``."""
    ranks, rows, each = call.ranks, call.tokens / call.ranks, range(call.ranks)
    if call.mask == "full":
        return [(ranks - 1) * rows] * ranks, [(ranks - 1) * rows] * ranks
    if call.mask == "window":
        before = [min(call.window - 1, rank * rows) for rank in each]
        return [min(call.window - 1, (ranks - 1 - rank) * rows) for rank in each], before
    if call.layout == "even":
        return [(ranks - 1 - rank) * rows for rank in each], [rank * rows for rank in each]
    return [(ranks - 1 + rank) * rows / 2 for rank in each], [(2 * ranks - 2 - rank) * rows / 2 for rank in each]


def _visiting(call: Call) -> tuple[list[float], list[float]]:
    """The queries that each rank sends to others, and those that it receives, by ``merge``."""
    ranks, rows, each = call.ranks, call.tokens / call.ranks, range(call.ranks)
    if call.mask == "full":
        return [(ranks - 1) * rows] * ranks, [(ranks - 1) * rows] * ranks
    if call.mask == "window":
        reach = -(-(call.window - 1) // int(rows)) if call.window > 1 else 0
        return [min(reach, rank) * rows for rank in each], [min(reach, ranks - 1 - rank) * rows for rank in each]
    if call.layout == "even":
        return [rank * rows for rank in each], [(ranks - 1 - rank) * rows for rank in each]
    return [(ranks - 1 + rank) * rows / 2 for rank in each], [(2 * ranks - 2 - rank) * rows / 2 for rank in each]


def scores(call: Call) -> list[float]:
    """The scores that each rank computes."""
    ranks, n, rows = call.ranks, call.tokens, call.tokens / call.ranks
    if call.mask == "full":
        of_all = [n * rows] * ranks
    elif call.layout == "zigzag":
        of_all = [n * (n + 1) / 2 / ranks] * ranks
    else:
        most = call.window if call.mask == "window" else n
        before = [_seen_before(rank * rows, most) for rank in range(ranks + 1)]
        of_all = [end - start for start, end in itertools.pairwise(before)]
    if call.scheme == "heads":
        busy = -(-call.heads // ranks) if ranks <= call.heads else 1
        return [busy * sum(of_all)] * min(ranks, call.heads) + [0.0] * max(0, ranks - call.heads)
    if call.scheme == "merge" and call.layout == "even":
        of_all = of_all[::-1]  # the first keys are seen by most queries
    return [call.heads * one for one in of_all]


def _seen_before(position: float, most: int) -> float:
    """The scores of all queries before a position, each of which sees itself and those before, at most so many."""
    few = min(position, most)
    return few * (few + 1) / 2 + (position - few) * most


def held(call: Call) -> float:
    """The bytes that the busiest rank has at once besides its own rows."""
    key, query = 2 * call.kv_heads * call.width * call.size, call.heads * call.width * call.size
    if call.scheme == "gather":
        return max(received(call))
    if call.scheme == "heads":
        return (
            call.tokens
            * max(1 / call.ranks, 1 / call.heads)
            * (2 * query + key * max(1, min(call.ranks, call.heads) / call.kv_heads))
        )
    visits, visited = _visiting(call)
    return max(
        rows * query + (rows + own) * call.heads * (call.width + 1) * 4
        for rows, own in zip(visited, visits, strict=True)
    )
