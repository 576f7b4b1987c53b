"""Pictures of what changes cost: by layer, by token, against the bytes that they save; and heads that may be pooled."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qkv.arguments import require_count, require_finite
from qkv.models.kv_cache_size import readable_bytes
from qkv.plots.canvas import (
    BLUE,
    ORANGE,
    RAMP,
    SERIES,
    VERMILION,
    axes_for,
    counts_on,
    draw_cells,
    figure_of,
    label_ticks,
    open_frame,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qkv.analysis import Price, Seen
    from qkv.convert import HeadAgreement

UNIT = 0.01
"""Nats up to which the axis of increases has equal steps; equal factors beyond."""
COLUMNS = 88
"""Letters in a line of text."""
LONGEST = 24
"""Most letters of a token."""


def price(price: "Price", *, ax: "Axes | None" = None) -> "Figure":
    """How much the loss increases if one layer alone is changed: a bar a layer, hatched where the loss falls.

    Args:
        price: of `qkv.analysis.price`.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> from qkv import plots
        >>> plots.price(price(model, input_ids, window=256))  # doctest: +SKIP
    """
    from qkv.analysis.labels import labels  # with transformers, which pictures of masks need not have

    costs = price.by_layer.tolist()
    ax = axes_for("plots.price", ax, max(4.0, 1.2 + 0.2 * len(costs)), 3)
    for layer, cost in enumerate(costs):
        style: dict[str, Any] = (
            {"color": VERMILION} if cost > 0 else {"facecolor": "white", "edgecolor": BLUE, "hatch": "////"}
        )
        ax.bar(layer, cost, width=0.8, **style)
    ax.axhline(0, color="0.3", linewidth=0.8)
    label_ticks(ax.xaxis, labels(price.layers))
    ax.set(xlabel="layer", ylabel="more loss, nats a token")
    ax.set_title(f"If one layer had {price.change}, before training", wrap=True)
    open_frame(ax)
    return figure_of(ax)


def tokens(
    price: "Price",
    tokens: Sequence[str],
    *,
    start: int | None = None,
    count: int = 300,
    row: int = 0,
    ax: "Axes | None" = None,
) -> "Figure":
    """The tokens that pay: a text with each token's increase of the loss as its background.

    The increase is that of the most layers changed together, or the mean over layers changed in turn if none were. The
    first token has no loss. What does not print is escaped, and long tokens are cut.

    Args:
        price: of `qkv.analysis.price`.
        tokens: of the text, each as it reads; `Seen` has them.
        start: the first token that is shown; by default, of the ``count`` tokens in a row that pay most.
        count: how many tokens are shown.
        row: of the batch.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for another number of tokens than were priced, and numbers that are not counts, or
            beyond the text.

    Example:
        >>> from qkv import plots
        >>> plots.tokens(seen.prices[0], seen.tokens)  # doctest: +SKIP
    """
    rows, length = price.loss.shape[0], price.loss.shape[1] + 1
    if len(tokens) != length:
        raise ValueError(f"plots.tokens: tokens must be the {length} that were priced; got {len(tokens)}.")
    require_count("plots.tokens", "count", count)
    for name, number, limit in (("row", row, rows), ("start", start or 0, length)):
        require_count("plots.tokens", name, number, 0)
        if number >= limit:
            raise ValueError(f"plots.tokens: {name} must be less than {limit}; got {number}.")
    increase = torch.cat([torch.tensor([math.nan]), price.by_token[row].float().cpu()])
    first = _dearest(increase, count) if start is None else start
    shown = [_readable(token) for token in tokens[first : first + count]]
    places = _places(shown)
    lines = places[-1][1] + 1
    ax = axes_for("plots.tokens", ax, 9, 0.9 + 0.21 * lines)
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize

    numbers = increase[first : first + count]
    most = numbers[numbers.isfinite()].abs().max().item() if numbers.isfinite().any() else 0.0
    boxes = [
        [(x, y - 0.5), (x + len(text), y - 0.5), (x + len(text), y + 0.5), (x, y + 0.5)]
        for text, (x, y) in zip(shown, places, strict=True)
    ]
    norm = Normalize(-(most or 1.0), most or 1.0)
    colours = PolyCollection(boxes, cmap="PuOr_r", norm=norm, linewidths=0)
    colours.set_array(torch.nan_to_num(numbers, nan=0.0).numpy())
    ax.add_collection(colours)
    size = 72 * 0.93 * ax.get_position().width * figure_of(ax).get_figwidth() / COLUMNS / 0.602
    for text, (x, y), number in zip(shown, places, numbers.tolist(), strict=True):
        ink = _ink_on(*colours.cmap(norm(number if math.isfinite(number) else 0.0))[:3])
        style: dict[str, Any] = {"color": ink, "family": "monospace", "fontsize": size}
        ax.text(x, y, text, va="center", parse_math=False, **style)
    ax.set(xlim=(0, COLUMNS), ylim=(lines - 0.4, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    bar = figure_of(ax).colorbar(colours, ax=ax, orientation="horizontal", aspect=60, pad=0.02)
    bar.set_label("more loss, nats")
    which = f"tokens {first:,} to {first + len(shown) - 1:,} of {length:,}" + (", which pay most" * (start is None))
    ax.set_title(f"{price.change}: {which}", wrap=True)
    return figure_of(ax)


def _ink_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever has the larger contrast with a colour of sRGB, as WCAG 2.2 computes it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def _dearest(increase: Tensor, count: int) -> int:
    """The first of the ``count`` tokens in a row whose increases have the largest sum."""
    sums = torch.cat([torch.zeros(1), increase.nan_to_num()]).double().cumsum(0)
    count = min(count, len(increase))
    return int((sums[count:] - sums[:-count]).argmax())


def _places(shown: Sequence[str]) -> list[tuple[int, int]]:
    """Column and line of each token; a line ends with a line end, and before a token that does not fit into it."""
    found, column, line = [], 0, 0
    for text in shown:
        if column + len(text) > COLUMNS:
            column, line = 0, line + 1
        found.append((column, line))
        column += len(text)
        if text.endswith("⏎"):
            column, line = 0, line + 1
    return found


def _readable(token: str) -> str:
    """A token on one line, of characters that print."""
    written = "".join(
        "⏎" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token
    )
    return written if len(written) <= LONGEST else f"{written[: LONGEST - 1]}…"


def savings(seen: "Seen", *, most: float = UNIT, ax: "Axes | None" = None) -> "Figure":
    """What changes save in the cache of the text, against the loss that they cost: a mark for each number of layers.

    A line joins the marks of a change, the cheapest layers first; a ring is around the proposal, the window that saves
    most for at most ``most`` nats. Before training.

    Args:
        seen: of ``qkv see``, or made of a recording and of prices with ``together``.
        most: nats a token that the proposal may cost.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for nothing that was changed together, and a number that is not finite.

    Example:
        >>> from qkv import plots
        >>> plots.savings(seen, most=0.05)  # doctest: +SKIP
    """
    require_finite("plots.savings", "most", most)
    if not any(price.together for price in seen.prices):
        raise ValueError(
            "plots.savings: seen must have prices of several layers changed together; got none. Measure them by "
            "price(..., together=[...])."
        )
    ax = axes_for("plots.savings", ax, 5.6, 4)
    now = seen.cache_bytes({})
    for number, change in enumerate(seen.prices):
        points = sorted((saving.cache_bytes, saving.increase) for saving in seen.savings(change))
        ax.plot(*zip(*points, strict=True), **SERIES[number % len(SERIES)], markersize=5, label=change.change)
    ax.plot(now, 0, "*", color="black", markersize=11, label="as it is")
    proposal = seen.proposal(most)
    if proposal is not None:
        at = proposal.cache_bytes, proposal.increase
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.4}
        ax.plot(*at, "o", markersize=13, **ring, label="the proposal")
    ax.axhline(most, color="0.5", linewidth=0.8, linestyle=":")
    ax.set_yscale("symlog", linthresh=UNIT)
    ax.margins(y=0.08)
    counts_on(ax.yaxis, "{:g}".format)
    counts_on(ax.xaxis, lambda number: readable_bytes(int(number)))
    ax.set_xlim(0, 1.05 * now)
    ax.set(xlabel=f"keys and values of {len(seen.tokens):,} tokens", ylabel="more loss, nats a token")
    ax.set_title("What changes save, and what they cost before training")
    ax.legend(frameon=False, fontsize="small")
    open_frame(ax)
    return figure_of(ax)


def agreement(
    agreement: "HeadAgreement",
    of: Literal["keys", "values"] = "keys",
    *,
    groups: Iterable[Iterable[int]] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """How alike each pair of KV heads is once one is turned towards the other, with outlines of groups to be pooled.

    Args:
        agreement: of `qkv.convert.head_agreement`.
        of: of the heads' keys or of their values.
        groups: heads that would be pooled, each head in one group, such as ``alignment.order.view(new_kv_heads, -1)``.
            Heads are drawn in this order.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        ValueError: for groups that do not have each head once.

    Example:
        >>> from qkv import plots
        >>> plots.agreement(head_agreement(projections, 8, symmetry), groups=[[0, 5], [1, 2]])  # doctest: +SKIP

    Source: Jin et al. 2024, section 3.2, on weights instead of activations.
    """
    if of not in ("keys", "values"):
        raise ValueError(f"plots.agreement: of must be 'keys' or 'values'; got {of!r}.")
    matrix = agreement.keys if of == "keys" else agreement.values
    count = len(matrix)
    given = None if groups is None else [[int(head) for head in group] for group in groups]
    order = list(range(count)) if given is None else [head for group in given for head in group]
    if sorted(order) != list(range(count)):
        raise ValueError(f"plots.agreement: groups must have each of the {count} heads once; got {given}.")
    ax = axes_for("plots.agreement", ax, 2.2 + 0.3 * count, 1.6 + 0.3 * count)
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    least = min(0.0, matrix.min().item())
    cells = draw_cells(ax, matrix[order][:, order], cmap=RAMP, norm=Normalize(least, 1))
    place = -0.5
    for group in given or []:
        corner = place, place
        ax.add_patch(Rectangle(corner, len(group), len(group), fill=False, edgecolor=ORANGE, linewidth=2.5))
        place += len(group)
    for axis in (ax.xaxis, ax.yaxis):
        label_ticks(axis, list(map(str, order)))
    ax.set_aspect("equal")
    figure_of(ax).colorbar(cells, ax=ax)
    ax.set(xlabel="KV head", ylabel="KV head", title=f"Agreement of {of} after the best turn")
    return figure_of(ax)
