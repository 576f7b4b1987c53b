"""Caches whose rows differ in length, in every order of operations, against a list of tokens for each row.

PYTHONPATH=tests python -m fuzz.rows --steps 100000 --seed 0
"""

from typing import Any

import torch
from fuzz.caches import COPIES, KINDS, MODES, Pick, assert_refused, check_pools, play
from torch import Tensor

from qkv import CrossKVCache, LatentKVCache, PagedKVCache, SlidingKVCache
from qkv.cache import Cache

NAMES = [name for name, kind in KINDS.items() if isinstance(kind.make(), Cache)]
WIDTHS = (8, 5)
Row = tuple[Tensor, Tensor]
"""Keys and values of one row, ``(heads, length, width)``."""


class Line:
    """A copy of a cache, and the tokens of each of its rows."""

    def __init__(self, cache: Any, rows: list[Row] | None) -> None:
        self.cache = cache
        self.rows = rows
        """None for an empty cache, which takes any batch"""

    @property
    def lengths(self) -> list[int]:
        return [row[0].shape[1] for row in self.rows or []]


class World:
    """Copies of one cache, whatever happens to them."""

    OPERATIONS = (
        *["append"] * 5,
        "crop",
        "crop_rows",
        "select",
        "repeat",
        "join",
        "replace",
        "fork",
        "reset",
        "refuse",
    )

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind = KINDS[kind]
        self.generator = torch.Generator().manual_seed(seed)
        self.lines = [Line(self.kind.make(), None)]
        self.history: list[str] = []

    def step(self, operation: str, pick: Pick) -> None:
        try:
            getattr(self, operation)(self.lines[pick(len(self.lines))], pick)
            for each in self.lines:
                if each.rows is not None:
                    assert each.cache.lengths.tolist() == each.lengths
                    assert each.cache.length == max(each.lengths)
            check_pools([each.cache for each in self.lines])
        except Exception as error:
            raise AssertionError("; ".join(self.history)) from error

    def tell(self, line: Line, *words: object) -> None:
        self.history.append(f"{self.lines.index(line)}: {' '.join(map(str, words))}")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens_and_padding(self, batch: int, pick: Pick) -> tuple[list[Tensor], Tensor | None]:
        """New keys and values, and which columns are tokens: padding on the left, on the right, in holes, or none."""
        count, style = (1, 1, 2, 5, 11)[pick(5)], pick(5)
        new = [self.random(batch, self.kind.heads, count, width) for width in WIDTHS]
        if style == 0:
            return new, None
        first = torch.tensor([pick(count + 1) if style in (1, 3) else 0 for _ in range(batch)])
        last = torch.tensor([pick(count + 1) if style in (2, 3) else count for _ in range(batch)])
        column = torch.arange(count)
        is_token = (column >= first[:, None]) & (column < last[:, None])
        if style == 4:
            is_token = torch.tensor([[pick(2) > 0 for _ in range(count)] for _ in range(batch)])
        for x in new:  # numbers of padding go nowhere
            x[~is_token[:, None].expand(x.shape[:3])] = float("nan")
        return new, is_token

    def append(self, line: Line, pick: Pick) -> None:
        mode = list(MODES)[pick(3)]
        batch = 1 + pick(3) if line.rows is None else len(line.rows)
        new, is_token = self.tokens_and_padding(batch, pick)
        real = [torch.ones(new[0].shape[2], dtype=torch.bool)] * batch if is_token is None else list(is_token)
        self.tell(line, "append", mode, [row.int().tolist() for row in real])
        heads = self.kind.heads
        rows = line.rows if line.rows is not None else [(self.random(heads, 0, 8), self.random(heads, 0, 5))] * batch
        grown = [
            tuple(torch.cat([old, x[b][:, real[b]]], dim=1) for old, x in zip(rows[b], new, strict=True))
            for b in range(batch)
        ]
        longest = max(row[0].shape[1] for row in grown)
        with MODES[mode]():
            if (self.kind.capacity is not None and longest > self.kind.capacity) or (
                isinstance(line.cache, CrossKVCache) and line.cache.length
            ):
                assert_refused(lambda: line.cache.append(*new, is_token))
                return
            found = line.cache.append(*new, is_token)
            line.rows = grown  # type: ignore[assignment]
            self.check(line, found, real)

    def check(self, line: Line, found: Any, real: list[Tensor]) -> None:
        """That each row has the tokens which its new queries may see, in order, at the offset returned."""
        cache = line.cache
        found = found.gathered() if isinstance(cache, PagedKVCache) else found
        k, v = found[:2]
        if isinstance(cache, LatentKVCache):
            k, v = k.split(WIDTHS, dim=3)
        if found.k_scale is not None:
            k, v = k * found.k_scale[..., None], v * found.v_scale[..., None]
        for b, row in enumerate(line.rows or []):
            length, added = row[0].shape[1], int(real[b].sum())
            count = k.shape[2] if found.lengths is None else int(found.lengths[b])
            if isinstance(cache, SlidingKVCache):
                assert count >= min(length, cache.sink_tokens + cache.window - 1 + added)
            else:
                assert count == length
            if found.offset is not None:
                before = int((real[b].cumsum(0) == 0).sum()) if added else len(real[b])
                offset = found.offset if isinstance(found.offset, int) else int(found.offset[b])
                assert offset == count - added - before
            for got, want in zip((k[b], v[b]), row, strict=True):
                sinks = min(self.kind.sinks, count)
                want = torch.cat([want[:, :sinks], want[:, length - (count - sinks) :]], dim=1)
                step = want.abs().amax(dim=-1, keepdim=True) / 127 if self.kind.is_rounded else 0.0
                assert ((got[:, :count] - want).abs() <= step * (0.5 + 127 * torch.finfo(torch.float32).eps)).all()

    def crop(self, line: Line, pick: Pick) -> None:
        length = pick(max(line.lengths, default=0) + 3) - 1
        self.tell(line, "crop", length)
        self.crop_to(line, length, [min(length, one) for one in line.lengths])

    def crop_rows(self, line: Line, pick: Pick) -> None:
        if line.rows is None:
            return
        wanted = [one - pick(one + 2) if pick(2) else one for one in line.lengths]
        self.tell(line, "crop rows", wanted)
        self.crop_to(line, torch.tensor(wanted), wanted)

    def crop_to(self, line: Line, length: Any, wanted: list[int]) -> None:
        cache, lengths = line.cache, line.lengths
        possible = all(one >= 0 for one in wanted) and (not isinstance(length, int) or 0 <= length <= cache.length)
        if isinstance(cache, SlidingKVCache) and possible and lengths:
            rows = cache._rows_or_equal()
            for b, one in enumerate(wanted):
                dropped = lengths[b] - int(rows.stored[b])
                if dropped and one < lengths[b] and one - dropped < cache.sink_tokens + cache.window - 1:
                    possible = False
        if not possible:
            assert_refused(lambda: cache.crop(length))
            return
        cache.crop(length)
        if line.rows is not None:
            line.rows = [(k[:, :n], v[:, :n]) for (k, v), n in zip(line.rows, wanted, strict=True)]
            if isinstance(length, int) and length == 0:
                line.rows = None

    def select(self, line: Line, pick: Pick) -> None:
        if not cached(line):
            return
        assert line.rows is not None
        index = [pick(len(line.rows)) for _ in range(1 + pick(3))]
        self.tell(line, "select", index)
        line.cache.select(torch.tensor(index))
        line.rows = [line.rows[i] for i in index]

    def repeat(self, line: Line, pick: Pick) -> None:
        if not cached(line) or len(line.rows or []) > 4:
            return
        count = 1 + pick(2)
        self.tell(line, "repeat", count)
        line.cache.repeat(count)
        line.rows = [row for row in line.rows or [] for _ in range(count)]

    def join(self, line: Line, pick: Pick) -> None:
        other = self.lines[pick(len(self.lines))]
        self.tell(line, "join", self.lines.index(other))
        if len(line.lengths) + len(other.lengths) > 6 or (isinstance(line.cache, CrossKVCache) and other is line):
            return
        line.cache.join(other.cache)
        if cached(other):
            line.rows = (line.rows if cached(line) and line.rows else []) + (other.rows or [])

    def replace(self, line: Line, pick: Pick) -> None:
        other = self.lines[pick(len(self.lines))]
        if not cached(line) or not cached(other):
            return
        assert line.rows is not None and other.rows is not None
        start = pick(len(line.rows))
        index = [(start + i) % len(line.rows) for i in range(len(other.rows))]
        self.tell(line, "replace", index, self.lines.index(other))
        if len(set(index)) < len(index):
            assert_refused(lambda: line.cache.replace(torch.tensor(index), other.cache))
            return
        line.cache.replace(torch.tensor(index), other.cache)
        rows = list(line.rows)
        for i, row in zip(index, other.rows, strict=True):
            rows[i] = row
        line.rows = rows

    def fork(self, line: Line, pick: Pick) -> None:
        name = list(COPIES)[pick(len(COPIES))]
        self.tell(line, "fork", name)
        self.lines.append(Line(COPIES[name](line.cache), line.rows))
        if len(self.lines) > 4:
            del self.lines[pick(4)]

    def reset(self, line: Line, pick: Pick) -> None:
        self.tell(line, "reset")
        line.cache.reset()
        line.rows = None

    def refuse(self, line: Line, pick: Pick) -> None:
        """Tokens and flags that do not fit."""
        if not cached(line) or isinstance(line.cache, CrossKVCache):
            return
        self.tell(line, "refuse")
        batch, heads = len(line.rows or []), self.kind.heads
        k, v, other = (torch.zeros(batch, *shape) for shape in ((heads, 2, 8), (heads, 2, 5), (3, 2, 8)))
        flags = torch.tensor([[True, False]]).expand(batch, -1)
        wrong = [
            (k[..., :7], v, flags),
            (k, v, flags[:, :1]),
            (k, v, flags.int()),
            (k, v, flags[0]),
            (other, other[..., :5], flags),
        ][pick(5)]
        assert_refused(lambda: line.cache.append(*wrong))


def cached(line: Line) -> bool:
    """Whether the cache has a batch."""
    return line.rows is not None and line.cache._batch > 0


if __name__ == "__main__":
    play(World, NAMES, __doc__, "as a list of tokens for each row")
