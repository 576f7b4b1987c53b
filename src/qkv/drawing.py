"""Patterns of pairs: in square `cells`, and as text, `draw`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 72
"""Most characters of a line, and most lines of a pattern."""


def cells(rows: Callable[[int, int], Tensor], lq: int, lk: int, most: int) -> tuple[int, Tensor]:
    """Patterns (B, H, lq, lk) in square cells: the number of queries and of keys in a cell, and the cells.

    These are (B, H, rows, columns), ``most`` by ``most`` at most: 0 where no pair is visible, 2 where each is, 1 where
    some are.

    Args:
        rows: as in `draw`.
    """
    size = max(1, -(-max(lq, lk) // most))
    strips = [_cells(rows(start, min(start + size, lq)), size) for start in range(0, lq, size)]
    return size, torch.cat(strips, dim=2)


def draw(rows: Callable[[int, int], Tensor], lq: int, lk: int) -> str:
    """Patterns (B, H, lq, lk) as text: a line a query, a character a key; ``#`` is visible, ``.`` hidden.

    A pattern larger than `COLUMNS` is drawn in square cells, which are ``+`` where some pairs are visible and others
    hidden.

    Args:
        rows: gives the query rows from the first number up to the second, boolean (B, H, rows, lk).
    """
    size, found = cells(rows, lq, lk, COLUMNS)
    patterns = found.tolist()
    several = len(patterns), len(patterns[0])
    lines = [f"each character is {size} x {size} pairs, + where some are visible"] * (size > 1)
    for b, heads in enumerate(patterns):
        for h, pattern in enumerate(heads):
            index = [
                f"{name} {i}" for name, i, count in zip(("row", "head"), (b, h), several, strict=True) if count > 1
            ]
            lines += [", ".join(index) + ":"] * bool(index)
            lines += ["".join(".+#"[cell] for cell in line) for line in pattern]
    return "\n".join(lines)


def _cells(rows: Tensor, size: int) -> Tensor:
    """A line of cells of up to ``size`` rows and ``size`` keys: 0 where nothing is visible, 2 where everything is."""
    pad = -rows.shape[3] % size
    some: Tensor = F.pad(rows, (0, pad), value=False).unflatten(3, (-1, size))
    every: Tensor = F.pad(rows, (0, pad), value=True).unflatten(3, (-1, size))
    return some.any(dim=4).any(dim=2, keepdim=True).int() + every.all(dim=4).all(dim=2, keepdim=True).int()
