"""Patterns of pairs: in square `cells`, as text, `draw`, and as a picture, `figure`."""

import html
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 72
"""Most characters of a line, and most lines of a pattern."""
PATTERNS = 4
"""Rows of the batch and heads, at most, that a figure shows."""
SIDE = 144
"""Of a pattern in a figure, in pixels, at most."""


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


def figure(title: str, rows: Callable[[int, int], Tensor], lq: int, lk: int) -> str:
    """Patterns as SVG below a title, in HTML that needs nothing else; arguments as in `draw`. Blue is visible."""
    size, found = cells(rows, lq, lk, COLUMNS)
    patterns = found.flatten(0, 1)
    of_a_cell = f"; a cell is {size} by {size} pairs, pale where some are visible" if size > 1 else ""
    rest = len(patterns) - PATTERNS
    more = f"; {rest} more of the batch and of heads" if rest > 0 else ""
    caption = f"{lq:,} queries (down) and {lk:,} keys (across), those visible in blue{of_a_cell}{more}"
    pictures = "".join(map(_svg, patterns[:PATTERNS]))
    return f"<figure>{preformatted(title)}<div>{pictures}</div><figcaption>{caption}</figcaption></figure>"


def preformatted(text: str) -> str:
    """A text in HTML as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def _svg(pattern: Tensor) -> str:
    """A pattern (rows, columns) of cells."""
    high, wide = pattern.shape
    scale = SIDE / max(high, wide)
    frame = f'<rect width="{wide}" height="{high}" fill="#808080" fill-opacity="0.2"/>'
    paths = "".join(
        f'<path fill="#0072b2" fill-opacity="{opacity}" d="{_runs(pattern == kind)}"/>'
        for kind, opacity in ((2, 1), (1, 0.5))
        if (pattern == kind).any()
    )
    return (
        f'<svg role="img" aria-label="which keys queries see" width="{wide * scale:g}" '
        f'height="{high * scale:g}" viewBox="0 0 {wide} {high}" style="margin:4px">{frame}{paths}</svg>'
    )


def _runs(shown: Tensor) -> str:
    """A path around the cells that are True, one rectangle for those next to each other in a row."""
    edges = F.pad(shown.int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return "".join(
        f"M{start} {row}h{stop - start}v1h{start - stop}z"
        for (row, start), (_, stop) in zip(starts, stops, strict=True)
    )


def _cells(rows: Tensor, size: int) -> Tensor:
    """A line of cells of up to ``size`` rows and ``size`` keys: 0 where nothing is visible, 2 where everything is."""
    pad = -rows.shape[3] % size
    some: Tensor = F.pad(rows, (0, pad), value=False).unflatten(3, (-1, size))
    every: Tensor = F.pad(rows, (0, pad), value=True).unflatten(3, (-1, size))
    return some.any(dim=4).any(dim=2, keepdim=True).int() + every.all(dim=4).all(dim=2, keepdim=True).int()
