"""Patterns of pairs in square cells, and as text."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 72
"""Most characters of a line, and most lines of a pattern."""


def cells(rows: Callable[[int, int], Tensor], lq: int, lk: int, most: int) -> tuple[Tensor, int]:
    """Patterns (B, H, lq, lk) in at most ``most`` by ``most`` square cells of pairs.

    Args:
        rows: gives the query rows from the first number up to the second, boolean (B, H, rows, lk).

    Returns:
        Cells (B, H, rows, columns), 0 where no pair is visible, 2 where each is, and 1 where some are; and the number
        of queries, and of keys, in a cell.
    """
    size = max(1, -(-max(lq, lk) // most))
    strips = [_strip(rows(start, min(start + size, lq)), size) for start in range(0, lq, size)]
    return torch.cat(strips, dim=2), size


def draw(patterns: Tensor, size: int) -> str:
    """Cells as text: a line a query, a character a key; ``#`` is visible, ``.`` hidden, ``+`` a cell that has both."""
    lists = patterns.tolist()
    several = len(lists), len(lists[0])
    lines = [f"each character is {size} x {size} pairs, + where some are visible"] * (size > 1)
    for b, heads in enumerate(lists):
        for h, pattern in enumerate(heads):
            index = [
                f"{name} {i}" for name, i, count in zip(("row", "head"), (b, h), several, strict=True) if count > 1
            ]
            lines += [", ".join(index) + ":"] * bool(index)
            lines += ["".join(".+#"[cell] for cell in line) for line in pattern]
    return "\n".join(lines)


def _strip(rows: Tensor, size: int) -> Tensor:
    """A line of cells of up to ``size`` rows and ``size`` keys."""
    pad = -rows.shape[3] % size
    some: Tensor = F.pad(rows, (0, pad), value=False).unflatten(3, (-1, size))
    every: Tensor = F.pad(rows, (0, pad), value=True).unflatten(3, (-1, size))
    return some.any(dim=4).any(dim=2, keepdim=True).int() + every.all(dim=4).all(dim=2, keepdim=True).int()
