"""What all plots share: axes, colours, grids of cells; and figures as SVG."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qkv.plots.small_svg import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
"""Colours that the colour-blind tell apart (Okabe and Ito). None stands for something by itself."""
SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": PURPLE, "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "P", "linestyle": (0, (5, 1, 1, 1))},
    {"color": SKY, "marker": "X", "linestyle": (0, (3, 1))},
)
"""Lines that differ in more than their colour."""
RAMP = "cividis"
"""The colours of numbers: their lightness rises with the number, in print and for the colour-blind too."""
PATHS = 2048
"""Cells, at most, of which each is a path in a vector format; grids of more are pictures in it."""
TICKS = 12
"""Labels, at most, beside the cells of a grid or below bars."""


def axes_for(caller: str, ax: "Axes | None", width: float, height: float) -> "Axes":
    """The axes that were given, or those of a new figure of these inches."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"{caller}: it needs matplotlib ({error}). Run pip install 'qkv[plots]'.") from error
    if ax is None:
        return Figure(figsize=(width, height), layout="constrained").add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(
            f"{caller}: ax must be Axes of matplotlib, or None for a new figure; got {type(ax).__name__}. "
            "Of several that subplots returns, give one."
        )
    return ax


def figure_of(ax: "Axes") -> "Figure":
    """The figure that axes are in, whatever lies between."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def open_frame(ax: "Axes") -> None:
    """Takes away the lines at the top and at the right."""
    ax.spines[["top", "right"]].set_visible(False)


def draw_cells(ax: "Axes", numbers: Tensor, **style: Any) -> Any:
    """A grid of cells, the first row on top, each around its own number; hatched where a number is NaN."""
    import numpy as np

    rows, columns = numbers.shape
    ax.patch.set(facecolor="white", edgecolor="0.7", hatch="////", linewidth=0)
    lines: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5} if max(rows, columns) <= 40 else {}
    edges = (np.arange(count + 1) - 0.5 for count in (columns, rows))
    values = np.ma.masked_invalid(numbers.detach().cpu().double().numpy())
    cells = ax.pcolormesh(*edges, values, rasterized=rows * columns > PATHS, **lines, **style)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    return cells


def label_ticks(axis: Any, labels: Sequence[str]) -> None:
    """Labels of the places 0, 1, 2, ..., some of them if they are many."""
    every = -(-len(labels) // TICKS) if labels else 1
    axis.set_ticks(range(0, len(labels), every), labels[::every])


def whole_ticks(axis: Any, unit: int = 1) -> None:
    """Ticks at whole places, labelled by so many times their number."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    counts_on(axis, lambda place: f"{round(place) * unit:,}")


def counts_on(axis: Any, written: Callable[[float], str] = "{:,.0f}".format) -> None:
    """Numbers in words of their own on an axis, and none between them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda number, _: written(number)))
    axis.set_minor_formatter(NullFormatter())


def svg(figure: "Figure") -> str:
    """A figure as SVG, without a date, and with names of parts that are not random.

    Figures that are made alike give the same text, the first time each is drawn; drawing it moves a figure's layout by
    a rounding. Letters stay letters, which the viewer's fonts draw. Places are rounded to hundredths of a point, and
    cells of one colour are one path, so that the file is a third of matplotlib's own, or less.

    Args:
        figure: of matplotlib, from any of these functions or of your own.

    Example:
        >>> from qkv import Mask, plots
        >>> picture = plots.svg(plots.mask(Mask.causal(window=3), 8))
        >>> picture == plots.svg(plots.mask(Mask.causal(window=3), 8))
        True
    """
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "qkv", "svg.fonttype": "none"}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return shortened(file.getvalue())
