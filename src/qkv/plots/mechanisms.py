"""Pictures of mechanisms, from their sizes alone: keys that are seen, heads that share, how far layers reach, bytes."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from qkv import drawing
from qkv.arguments import require_count
from qkv.masks import Mask
from qkv.models.kv_cache_size import LayerShape, cache_bytes, int8_bytes, readable_bytes
from qkv.plots.canvas import (
    BLUE,
    ORANGE,
    SERIES,
    SKY,
    VERMILION,
    axes_for,
    counts_on,
    draw_cells,
    figure_of,
    label_ticks,
    open_frame,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 128
"""Most cells of a mask in a row and in a column."""
SHORTEST = 64
"""Tokens at the left edge of the picture of caches."""


def mask(
    mask: Mask,
    lq: int,
    lk: int | None = None,
    *,
    offset: int | None = None,
    row: int = 0,
    head: int = 0,
    ax: "Axes | None" = None,
) -> "Figure":
    """Which keys each query sees, as `Mask.draw` has it: a line a query, a column a key, a dot at the query's own key.

    Beyond 128 queries or keys, a cell stands for a square of pairs, and has a lighter colour where only some of them
    are visible.

    Args:
        mask: any `Mask`.
        lq: number of queries.
        lk: number of keys; ``lq`` if None.
        offset: position of the first query among the keys. Required, as in `Mask.draw`, if the mask depends on
            positions and lq differs from lk.
        row: of the batch, for a mask with tensors.
        head: for a mask with tensors.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: as `Mask.draw`, and for a row or head that the mask does not have.

    Example:
        >>> from qkv import Mask, plots
        >>> figure = plots.mask(Mask.causal(window=3), 8)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"plots.mask: mask must be a qkv.Mask; got {type(mask).__name__}.")
    size, patterns = drawing.cells(*mask.pattern("plots.mask", lq, lk, offset), CELLS)
    index = []
    for name, number, count in zip(("row", "head"), (row, head), patterns.shape, strict=False):
        require_count("plots.mask", name, number, 0)
        if number >= count > 1:
            raise ValueError(f"plots.mask: {name} must be less than the mask's {count}; got {number}.")
        index.append(number if count > 1 else 0)
    from_first = 0 if offset is None else offset
    ax = axes_for("plots.mask", ax, 4, min(max(1 + 3.4 * patterns.shape[2] / patterns.shape[3], 1.8), 6))
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["#F2F2F2", SKY, BLUE])
    draw_cells(ax, patterns[index[0], index[1]], cmap=colours, vmin=-0.5, vmax=2.5)
    ax.set_aspect("equal")
    if size == 1:
        own = [(query + from_first, query) for query in range(lq) if 0 <= query + from_first < patterns.shape[3]]
        if own and mask.is_positional:
            ax.plot(*zip(*own, strict=True), ".", color=ORANGE, markersize=4)
    several = [
        f"{name} {n}" for name, n, count in zip(("row", "head"), index, patterns.shape, strict=False) if count > 1
    ]
    ax.set_title(", ".join([str(mask), *several]))
    for axis in (ax.xaxis, ax.yaxis):
        whole_ticks(axis, size)
    unit = "" if size == 1 else f", {size} in a cell"
    ax.set(xlabel=f"key{unit}", ylabel=f"query{unit}")
    return figure_of(ax)


def groups(num_heads: int, num_kv_heads: int, *, ax: "Axes | None" = None) -> "Figure":
    """Which query heads share a KV head: multi-head, grouped-query or multi-query attention.

    Args:
        num_heads: query heads.
        num_kv_heads: key/value heads, which divide them.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for numbers that are not counts, and KV heads that do not divide the query heads.

    Example:
        >>> from qkv import plots
        >>> figure = plots.groups(8, 2)
    """
    require_count("plots.groups", "num_heads", num_heads)
    require_count("plots.groups", "num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"plots.groups: num_kv_heads must divide num_heads={num_heads}; got {num_kv_heads}.")
    ax = axes_for("plots.groups", ax, max(5.4, 0.45 * num_heads), 1.9)
    size = num_heads // num_kv_heads
    for group in range(num_kv_heads):
        style = SERIES[group % len(SERIES)]
        members = range(group * size, (group + 1) * size)
        middle = group * size + (size - 1) / 2
        for query in members:
            ax.plot(
                [query, middle], [1, 0], color=style["color"], linestyle=style["linestyle"], linewidth=1.2, zorder=1
            )
        ax.scatter(members, [1] * size, s=90, color=style["color"], zorder=2)
        ax.scatter([middle], [0], s=110, color=style["color"], marker="s", zorder=2)
    kind = {num_heads: "multi-head", 1: "multi-query"}.get(num_kv_heads, "grouped-query")
    ax.set_title(f"{kind}: {_counted(num_heads, 'query head')} on {_counted(num_kv_heads, 'KV head')}")
    ax.set(xlim=(-0.6, num_heads - 0.4), ylim=(-0.4, 1.4), xticks=[])
    ax.set_yticks([0, 1], ["KV heads", "query heads"])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure_of(ax)


def reach(
    windows: Sequence[int | None],
    *,
    tokens: int | None = None,
    measured: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """How many tokens reach the output of each layer of a causal model: ``1 + sum(w - 1)`` of all windows up to it.

    Args:
        windows: of each layer, the number of keys that a query sees, its own included, as `Mask.causal` counts them;
            None for all. Of a recording, ``[layer.window for layer in recording.layers]``.
        tokens: length of the text, which no layer reaches beyond; by default the farthest reach.
        measured: numbers of tokens found in an experiment, one for each layer, as marks beside the bars.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for windows that are not counts, no windows, and as many measurements as there are not
            layers.

    Example:
        >>> from qkv import plots
        >>> figure = plots.reach([4, 4, None, 4], tokens=40)

    Source: Mistral 7B, section 2, whose ``W`` keys before the query's own are ``window=W + 1`` here.
    """
    for window in windows:
        if window is not None:
            require_count("plots.reach", "each of windows", window, 1, ", or None for all keys")
    if not windows:
        raise ValueError("plots.reach: windows must have one for each layer; got none.")
    if tokens is not None:
        require_count("plots.reach", "tokens", tokens)
    if measured is not None and len(measured) != len(windows):
        raise ValueError(
            f"plots.reach: measured must have a number for each of the {len(windows)} layers; got {len(measured)}."
        )
    until = next((n for n, window in enumerate(windows) if window is None), len(windows))
    found = list(accumulate((window - 1 for window in windows[:until] if window is not None), initial=1))[1:]
    longest = max([*found, *(measured or ()), 1]) if tokens is None else tokens
    found = [min(number, longest) for number in found] + [longest] * (len(windows) - until)
    ax = axes_for("plots.reach", ax, 5, 1.2 + 0.24 * len(windows))
    for layer, number in enumerate(found):
        hatch = "///" if layer >= until else None
        ax.barh(layer, number, color=SKY, edgecolor=BLUE, linewidth=0.8, hatch=hatch)
    if measured is not None:
        ax.plot(measured, range(len(measured)), "D", color=VERMILION, markersize=5, label="measured")
        ax.legend(frameon=False, loc="lower right")
    label_ticks(ax.yaxis, [str(layer) for layer in range(len(windows))])
    ax.set(xlim=(0, 1.03 * longest), ylim=(-0.6, len(windows) - 0.4))
    ax.set(xlabel="tokens that reach a position, its own included", ylabel="layer")
    ax.set_title("Hatched: a layer sees all keys" if until < len(windows) else "Layers widen what a position sees")
    counts_on(ax.xaxis)
    open_frame(ax)
    return figure_of(ax)


def cache(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    num_layers: int = 1,
    bytes_per_number: int = 2,
    tokens: int = 1 << 17,
    mark: int | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """Bytes of keys and values over the length of the text, a line for each mechanism.

    Multi-head, grouped-query where ``num_kv_heads`` is between both, multi-query, a window of multi-head attention, and
    ``num_kv_heads`` in int8 with its scales. One text; a batch of n has n times as much.

    Args:
        num_heads: query heads.
        num_kv_heads: key/value heads, which divide them.
        head_dim: width of a head of keys, and of values.
        window: number of keys that a query of the window sees; no such line without.
        num_layers: number of layers of this kind.
        bytes_per_number: 2 for bf16.
        tokens: length at the right edge, more than 64.
        mark: a length at which to draw a line.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for numbers that are not counts, KV heads that do not divide the query heads, and
            tokens of 64 or less.

    Example:
        >>> from qkv import plots
        >>> figure = plots.cache(32, 8, 128, window=4096, num_layers=32)
    """
    given = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "num_layers": num_layers}
    for name, number in {**given, "bytes_per_number": bytes_per_number}.items():
        require_count("plots.cache", name, number)
    require_count("plots.cache", "tokens", tokens, SHORTEST + 1)
    for name, optional in (("window", window), ("mark", mark)):
        if optional is not None:
            require_count("plots.cache", name, optional)
    if num_heads % num_kv_heads:
        raise ValueError(f"plots.cache: num_kv_heads must divide num_heads={num_heads}; got {num_kv_heads}.")
    kinds: list[tuple[str, int, int | None]] = [("multi-head", num_heads, None)]
    if 1 < num_kv_heads < num_heads:
        kinds.append((f"grouped-query, {num_kv_heads} KV heads", num_kv_heads, None))
    kinds.append(("multi-query", 1, None))
    if window is not None:
        kinds.append((f"a window of {window:,}, multi-head", num_heads, window))
    powers = (1 << n for n in range(SHORTEST.bit_length() - 1, tokens.bit_length()))
    counts = sorted({*powers, tokens, *([window] if window is not None and SHORTEST < window < tokens else [])})
    ax = axes_for("plots.cache", ax, 6, 4)
    for style, (name, kv_heads, seen) in zip(SERIES, kinds, strict=False):
        layers = num_layers * (LayerShape(num_heads, kv_heads, head_dim, head_dim, seen),)
        ax.plot(counts, [cache_bytes(layers, n, bytes_per_number) for n in counts], **style, markevery=2, label=name)
    rounded = num_layers * (LayerShape(num_heads, num_kv_heads, head_dim, head_dim, None),)
    words = f"int8, {_counted(num_kv_heads, 'KV head')}"
    ax.plot(counts, [int8_bytes(rounded, n) for n in counts], **SERIES[4], markevery=2, label=words)
    if mark is not None:
        ax.axvline(mark, color="0.5", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    counts_on(ax.xaxis)
    counts_on(ax.yaxis, lambda number: readable_bytes(int(number)))
    ax.set(xlabel="tokens", ylabel="keys and values")
    ax.set_title(f"{_counted(num_layers, 'layer')} of {_counted(num_heads, 'query head')} of width {head_dim}")
    ax.legend(frameon=False)
    open_frame(ax)
    return figure_of(ax)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
