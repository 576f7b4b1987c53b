"""The plots of benchmarks/README.md."""

import math
from pathlib import Path

import matplotlib.pyplot as plt

from harness.case import DTYPES
from harness.limits import Limits
from harness.measurement import OURS, Measurement
from harness.peers import PEERS

plt.switch_backend("svg")
plt.rcParams.update(
    {
        "svg.hashsalt": "qkv",  # The same figures give the same file.
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

LIBRARIES = [OURS, *(peer.NAME for peer in PEERS)]
COLOURS = dict(zip(LIBRARIES, ("#1f5fa8", "#e07b39", "#7a9e7e", "#b05f8a", "#8c8c8c"), strict=True))


def plot_rates(rows: list[Measurement], bounds: Limits, path: Path) -> None:
    """Bar chart of the rates of all libraries, one panel per dtype, with the limit of the machine."""
    names = list(dict.fromkeys(row.case.name for row in rows))
    by_case = {(row.case.name, row.dtype): row for row in rows}
    libraries = [name for name in LIBRARIES if any(name in row.times for row in rows)]
    width = 0.8 / len(libraries)
    figure, panels = plt.subplots(len(DTYPES), 1, figsize=(10, 7), sharex=True, layout="constrained")
    for panel, dtype in zip(panels, DTYPES, strict=True):
        for index, library in enumerate(libraries):
            measured = [(x, by_case[name, dtype]) for x, name in enumerate(names) if (name, dtype) in by_case]
            bars = [(x + index * width, row.rate(library)) for x, row in measured if library in row.times]
            panel.bar([x for x, _ in bars], [y for _, y in bars], width, color=COLOURS[library], label=library)
        limit = _limit(rows, dtype, bounds)
        if limit is not None:
            panel.axhline(limit, color="black", linewidth=0.8, linestyle=":")
        panel.set_ylabel(f"{dtype}, {'GB/s' if rows[0].case.is_decoding else 'GF/s'}")
    panels[0].legend(ncols=len(libraries), frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    panels[-1].set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names, rotation=20, ha="right")
    _save(figure, path)


def plot_grid(rows: list[Measurement], path: Path) -> None:
    """Scatter plot of torch's time relative to qkv over the arithmetic of the call."""
    figure, panel = plt.subplots(figsize=(10, 4), layout="constrained")
    for dtype, marker in zip(DTYPES, "os^", strict=True):
        points = [(row.case.operations(), row.ratio("torch") or math.nan) for row in rows if row.dtype == dtype]
        panel.scatter([x for x, _ in points], [y for _, y in points], s=18, marker=marker, label=dtype, alpha=0.8)
    panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="multiplications and additions", ylabel="time of torch / time of qkv")
    panel.legend(frameon=False)
    _save(figure, path)


def _limit(rows: list[Measurement], dtype: str, bounds: Limits) -> float | None:
    return next((row.limit(bounds) for row in rows if row.dtype == dtype), None)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
