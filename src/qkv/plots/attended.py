"""Pictures of what layers attend to: from a recording of a model, and from the numbers of `qkv.look`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from qkv.arguments import require_count
from qkv.layer_record import LayerRecord
from qkv.look import BlockMap
from qkv.plots.canvas import (
    BLUE,
    RAMP,
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

    from qkv.analysis import Recording

SMALLEST = 1e-4
"""Of the largest weight of a map: what is less has the last colour."""

Of = Literal["cut", "change", "keys_in_effect", "distance", "sinks"]


class _Number(NamedTuple):
    """A number of each head of a layer."""

    of: Callable[[LayerRecord], Tensor]
    """(B, H)"""
    title: str


NUMBERS = {
    "keys_in_effect": _Number(lambda layer: layer.mean(layer.keys_in_effect), "keys in effect, mean over queries"),
    "distance": _Number(lambda layer: layer.mean(layer.distance.mean), "distance of keys, mean over queries"),
    "sinks": _Number(
        lambda layer: layer.mean(layer.sinks.first + layer.sinks.learned), "weight on sinks, mean over queries"
    ),
}


def heads(recording: "Recording", of: Of, *, window: int | None = None, ax: "Axes | None" = None) -> "Figure":
    """A number of each head of each layer, as a grid: where to look.

    Numbers are means over the queries of a head; of ``cut`` and ``change``, over those that have more keys before them
    than the window shows. Of several rows of a batch, the largest cut and change, and the mean of the others. Places
    without a number are hatched: heads that a layer does not have, and windows in cross-attention.

    Args:
        recording: of `qkv.analysis.record`.
        of: ``"cut"``, the weight on keys that the window hides; ``"change"``, how far the output moves without them, in
            its own length; ``"keys_in_effect"``, on a logarithmic scale; ``"distance"`` of keys before their query;
            ``"sinks"``, the weight on the first keys and on sink logits.
        window: for ``cut`` and ``change``, one of the recording's.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        ValueError: for another number, a window that was not recorded, and a window of a number that has none.

    Example:
        >>> from qkv import plots
        >>> plots.heads(record(model, input_ids, windows=[256]), "cut", window=256)  # doctest: +SKIP
    """
    from qkv.analysis.labels import labels  # with transformers, which pictures of masks need not have

    known = ["cut", "change", *NUMBERS]
    if of not in known:
        raise ValueError(f"plots.heads: of must be one of {', '.join(known)}; got {of!r}.")
    if of in NUMBERS:
        if window is not None:
            raise ValueError(f"plots.heads: window belongs to cut and change; got {window} with {of!r}.")
        rows = [NUMBERS[of].of(layer).nanmean(0) for layer in recording.layers]
        title = NUMBERS[of].title
    else:
        if window not in recording.windows:
            raise ValueError(
                f"plots.heads: window must be one of the recorded {list(recording.windows)}; got {window}. Record it "
                "by record(..., windows=[...])."
            )
        at = recording.windows.index(window)
        rows = [_lost(layer, of, at) for layer in recording.layers]
        what = "weight that a window of {} cuts" if of == "cut" else "change of the output by a window of {}"
        title = f"{what.format(window)}, mean over queries that lose keys"
    found = torch.full((len(rows), max(map(len, rows))), torch.nan)
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = row
    ax = axes_for("plots.heads", ax, 1.8 + 0.28 * found.shape[1] + 0.8, 1.4 + 0.17 * found.shape[0])
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator

    finite = found[found.isfinite()].tolist() or [0.0]
    norm: Normalize
    if of == "keys_in_effect":
        found = found.masked_fill(found <= 0, torch.nan)
        norm = LogNorm(max(1.0, min(finite)), max(2.0, *finite))
    elif of == "distance":
        norm = Normalize(min(0.0, *finite), max(1.0, *finite))
    else:
        norm = Normalize(0, max(1.0, *finite))
    cells = draw_cells(ax, found, cmap=RAMP, norm=norm)
    bar = figure_of(ax).colorbar(cells, ax=ax)
    if of == "keys_in_effect":
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        counts_on(bar.ax.yaxis, "{:g}".format)
    label_ticks(ax.xaxis, [str(head) for head in range(found.shape[1])])
    label_ticks(ax.yaxis, labels([layer.name for layer in recording.layers]))
    ax.set(xlabel="query head", ylabel="layer")
    ax.set_title(title, wrap=True)
    return figure_of(ax)


def _lost(layer: LayerRecord, of: str, at: int) -> Tensor:
    """(H,), the number of a window, of the row of the batch that loses most."""
    if layer.is_cross:
        return torch.full((layer.heads,), torch.nan)
    by_head = layer.cut_by_head() if of == "cut" else layer.change_by_head()
    return by_head[at].amax(0)


def cut(recording: "Recording", *, ax: "Axes | None" = None) -> "Figure":
    """The weight that windows cut, over their width: a thin line a KV head, and a thick one for the largest of all.

    A KV head has the largest weight of its query heads, since one that needs distant keys needs those of its group; of
    several rows of a batch, the largest. Where the thick line falls, a window may do.

    Args:
        recording: of `qkv.analysis.record`, with two windows or more.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a recording with fewer windows, or of cross-attention alone.

    Example:
        >>> from qkv import plots
        >>> plots.cut(record(model, input_ids, windows=[64, 128, 256, 512]))  # doctest: +SKIP
    """
    windows = recording.windows
    layers = [layer for layer in recording.layers if not layer.is_cross]
    if len(set(windows)) < 2:
        raise ValueError(
            f"plots.cut: recording must have two windows or more; got {list(windows)}. Record them by "
            "record(..., windows=[...])."
        )
    if not layers:
        raise ValueError("plots.cut: recording must have a layer of self-attention, which windows are for; got none.")
    order = sorted(range(len(windows)), key=windows.__getitem__)
    ax = axes_for("plots.cut", ax, 5, 3.6)
    widths = [windows[n] for n in order]
    lines = torch.cat([layer.cut_by_kv_head().amax(1).T for layer in layers])[:, order]
    for line in lines.tolist():
        ax.plot(widths, line, color=BLUE, linewidth=0.6, alpha=0.5)
    worst = lines.amax(0).tolist()
    ax.plot(widths, worst, color=VERMILION, linewidth=2.2, marker="o", markersize=4, label="the head that loses most")
    ax.plot([], [], color=BLUE, linewidth=0.6, label="a KV head")
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [f"{width:,}" for width in widths])
    ax.minorticks_off()
    sinks = recording.sink_tokens
    kept = f"{sinks} sink {'token' if sinks == 1 else 'tokens'} kept" if sinks else "no sink tokens"
    ax.set(ylim=(0, 1), xlabel="window, keys", ylabel="weight cut", title=f"Weight that windows cut, {kept}")
    ax.legend(frameon=False)
    open_frame(ax)
    return figure_of(ax)


def block_map(
    found: BlockMap, *, row: int = 0, head: int = 0, maxima: bool = False, ax: "Axes | None" = None
) -> "Figure":
    """The weights of a head between blocks of queries and of keys, on a logarithmic scale.

    Blocks of no weight, such as those that a mask hides, are hatched. What is less than a ten-thousandth of the largest
    weight has the colour of that.

    Args:
        found: of `look.block_map`, or ``layer.map`` of a record.
        row: of the batch.
        head: a query head.
        maxima: the largest weight of each pair of blocks, which `look.block_map` finds if asked, instead of a block of
            keys' weight in the mean over queries.
        ax: axes of matplotlib to draw in; a new figure without.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for a row or head that is not there, and maxima that were not asked for.

    Example:
        >>> import torch
        >>> from qkv import Mask, look, plots
        >>> q, k = torch.randn(2, 1, 4, 256, 32)
        >>> figure = plots.block_map(look.block_map(q, k, mask=Mask.causal()), head=3)
    """
    weights = found.most if maxima else found.mean
    if weights is None:
        raise ValueError(
            "plots.block_map: found must have maxima; got none. Ask for them: look.block_map(maxima=True)."
        )
    for name, number, count in (("row", row, weights.shape[0]), ("head", head, weights.shape[1])):
        require_count("plots.block_map", name, number, 0)
        if number >= count:
            raise ValueError(f"plots.block_map: {name} must be less than {count}; got {number}.")
    shown = weights[row, head]
    shown = shown.masked_fill(shown <= 0, torch.nan)
    ax = axes_for("plots.block_map", ax, 4.8, 4)
    from matplotlib.colors import LogNorm

    finite = shown[shown.isfinite()].tolist() or [1.0]
    norm = LogNorm(max(min(finite), SMALLEST * max(finite)) * (1 - 1e-6), max(finite), clip=True)
    cells = draw_cells(ax, shown, cmap=RAMP, norm=norm)
    ax.set_aspect("equal")
    figure_of(ax).colorbar(cells, ax=ax, extend="min" if min(finite) < norm.vmin else "neither")
    for axis in (ax.xaxis, ax.yaxis):
        whole_ticks(axis)
    what = "largest weight" if maxima else "weight of a block of keys, mean over queries"
    ax.set(xlabel="block of keys", ylabel="block of queries", title=f"head {head}: {what}")
    return figure_of(ax)
