"""Draws the pictures of the pages, `make pages`. A test draws them again and compares."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import qkv
from qkv import Mask, plots
from qkv.bench.mechanisms import Sizes, mechanisms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "pictures"


def seven() -> "Figure":
    """The seven mechanisms: above which keys a query sees, below which query heads share keys and values."""
    sizes = Sizes(1, 10, 6, 2, 64, 4, torch.float32, decode=False, backward=False)
    figure, axes = _row_of_axes(7, 2, width=1.75, height=1.75)
    for column, each in enumerate(mechanisms(sizes)):
        of_keys, of_heads = axes[column], axes[column + 7]
        plots.mask(each.mask, each.num_queries, each.num_keys, offset=0, ax=of_keys)
        of_keys.set_title(each.name)
        of_keys.set(xticks=[], yticks=[], xlabel="keys", ylabel="queries" if column == 0 else "")
        plots.groups(each.num_heads, each.num_kv_heads, ax=of_heads)
        of_heads.set_title("")
        middle = (each.num_heads - 1) / 2
        of_heads.set_xlim(middle - sizes.num_heads / 2, middle + sizes.num_heads / 2)
        if column:
            of_heads.set_yticks([])
    return figure


def masks() -> "Figure":
    """Six masks, a line a query."""
    is_global = torch.arange(16)[None] == 5
    documents = torch.arange(16)[None] // 6
    figure, axes = _row_of_axes(3, 2)
    for ax, mask, title in zip(
        axes,
        (
            Mask.causal(),
            Mask.causal(window=4),
            Mask.sliding(window=4),
            Mask.prefix(5),
            Mask.causal() & Mask.documents(documents),
            Mask.sliding(window=4) | Mask.global_tokens(is_global),
        ),
        (
            "causal",
            "causal, window=4",
            "sliding, window=4",
            "prefix of 5",
            "causal & documents",
            "sliding | a global token",
        ),
        strict=True,
    ):
        plots.mask(mask, 16, ax=ax)
        ax.set_title(title)
        ax.label_outer()
    return figure


def windows() -> "Figure":
    """What window=4 counts: causal, sliding, and with sinks."""
    figure, axes = _row_of_axes(3)
    for ax, mask in zip(
        axes, (Mask.causal(window=4), Mask.sliding(window=4), Mask.causal(window=4, sink_tokens=2)), strict=True
    ):
        plots.mask(mask, 12, ax=ax)
        ax.label_outer()
    return figure


def offsets() -> "Figure":
    """Three queries and eight keys, aligned in two ways."""
    figure, axes = _row_of_axes(2)
    for ax, offset, title in zip(axes, (0, 5), ("offset=0: top-left", "offset=5: bottom-right"), strict=True):
        plots.mask(Mask.causal(), 3, 8, offset=offset, ax=ax)
        ax.set_title(title)
    return figure


def groups() -> "Figure":
    """Eight query heads on eight, two and one KV heads."""
    figure, axes = _row_of_axes(1, 3, height=1.9, width=5.4)
    for ax, kv_heads in zip(axes, (8, 2, 1), strict=True):
        plots.groups(8, kv_heads, ax=ax)
    return figure


def caches() -> "Figure":
    """Bytes over the length."""
    return plots.cache(32, 8, 128, window=4096, num_layers=32, mark=1 << 17, tokens=1 << 18)


def reach() -> "Figure":
    """A window in each layer, and one layer without."""
    figure, axes = _row_of_axes(2, width=4.4, height=3)
    for ax, layers in zip(axes, ([5] * 6, [5, 5, None, 5, 5, 5]), strict=True):
        plots.reach(layers, tokens=32, ax=ax)
    return figure


def sinks() -> "Figure":
    """Windows with first tokens that stay visible, and how a sink logit takes weight away."""
    figure, axes = _row_of_axes(2)
    plots.mask(Mask.causal(window=4, sink_tokens=2), 16, ax=axes[0])
    counts = range(1, 17)
    for logit, style in ((None, "o-"), (0.0, "s--"), (2.0, "^-.")):
        of_sink = 0.0 if logit is None else math.exp(logit)
        label = "no sink" if logit is None else f"logit {logit:g}"
        axes[1].plot(counts, [n / (n + of_sink) for n in counts], style, label=label)
    axes[1].set(xlabel="keys that a query sees, all of score 0", ylabel="sum of their weights", ylim=(0, 1.05))
    axes[1].set_title("A sink logit takes weight")
    axes[1].legend(frameon=False)
    return figure


def nan() -> "Figure":
    """Rows of outputs that one NaN reaches: of a key that a window shows to some queries."""
    k = torch.ones(1, 1, 16, 8)
    k[:, :, 6] = torch.nan
    out = qkv.attention(torch.ones(1, 1, 16, 8), k, torch.ones(1, 1, 16, 8), mask=Mask.causal(window=4))
    figure, axes = _row_of_axes(2)
    plots.mask(Mask.causal(window=4), 16, ax=axes[0])
    axes[0].axvline(6, color="#D55E00", linewidth=6, alpha=0.4)
    axes[0].set_title("Key 6 is NaN")
    is_nan = out[0, 0, :, 0].isnan()
    axes[1].barh(range(16), [1] * 16, color=["#D55E00" if bad else "#56B4E9" for bad in is_nan.tolist()])
    axes[1].set(ylabel="query", ylim=(15.5, -0.5), xticks=[], xlim=(0, 4))
    axes[1].set_title("Outputs: NaN where key 6 is seen")
    return figure


def same_bits() -> "Figure":
    """The same numbers, added in fp32 in other orders."""
    count = 997
    numbers = [math.fmod(7919 * n, 1009) / 1009 - 0.5 for n in range(count)]
    exact = math.fsum(numbers)
    errors = []
    for step in range(1, 61):
        total = torch.tensor(0.0)
        for place in range(count):
            total = total + numbers[place * step % count]
        errors.append(total.item() - exact)
    figure, axes = _row_of_axes(1, width=6, height=2.8)
    axes[0].plot(range(1, 61), errors, "o", markersize=4, color="#0072B2")
    axes[0].axhline(0, color="0.5", linewidth=0.8)
    axes[0].set(xlabel="order", ylabel="error of the sum")
    axes[0].set_title(f"The same {count} numbers, added in fp32 in 60 orders")
    return figure


def _row_of_axes(columns: int, rows: int = 1, width: float = 3.4, height: float = 3.4) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


PICTURES: dict[str, Callable[[], "Figure"]] = {
    "seven": seven,
    "masks": masks,
    "windows": windows,
    "offsets": offsets,
    "groups": groups,
    "caches": caches,
    "reach": reach,
    "sinks": sinks,
    "nan": nan,
    "same-bits": same_bits,
}


def drawn(name: str) -> str:
    """A picture as SVG, with the settings that matplotlib comes with, whatever the machine's are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        return plots.svg(PICTURES[name]())


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        (FOLDER / f"{name}.svg").write_text(drawn(name))
