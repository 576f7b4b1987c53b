"""Picture 4: how far one token has an influence, layer by layer."""

import torch

from qkv.analysis.labels import listed
from qkv.analysis.page.charts import Chart, linear
from qkv.analysis.page.markup import Markup, element, figure, joined, table
from qkv.analysis.reach import Reach
from qkv.analysis.words import counted

COLUMNS = 128
"""Blocks of tokens, at most."""
LEAST = (0.1, 0.01, 0.001, 0.0)
"""Changes from which a shade is used, the darkest first."""


def reach_by_layers(title: str, reach: Reach) -> Markup:
    """Hidden states that change, filled by how far they move, within the outline of what the windows allow."""
    rows, length = reach.change.shape
    chart = Chart(
        linear("token", 0, length, lambda x: f"{x:g}"),
        linear("after layers", 0, rows, lambda x: f"{x:g}" if x < rows and x == int(x) else ""),
    )
    columns = min(COLUMNS, length)
    block = torch.arange(length) * columns // length
    change = torch.zeros(rows, columns).scatter_reduce_(1, block.expand(rows, -1), reach.change.nan_to_num(), "amax")
    wide = length / columns
    for row, column in change.nonzero().tolist():
        shade = next(n for n, least in enumerate(LEAST) if change[row, column] >= least)
        chart.cell((column * wide, row), ((column + 1) * wide, row + 1), shade)
    edge = [(float(reach.position), 0.0)]
    edge += [(float(stop), float(at)) for row, stop in enumerate(reach.stops) for at in (row, row + 1)]
    chart.line([*edge, (float(reach.position), float(rows)), (float(reach.position), 0.0)], "line")
    beyond, outside = reach.beyond(), sum(length - stop + reach.position for stop in reach.stops)
    says = f"Of {counted(outside, 'hidden state')} out of reach, " + (
        "all are equal in bits." if not beyond else f"{beyond:,} change: this model computes some tokens together."
    )
    limited = [str(n) for n, window in enumerate(reach.windows) if window is not None]
    which = f"layers {listed(limited)}" if limited else "no layer"
    shades = ["a tenth and more", "a hundredth", "a thousandth", "less"]
    squares = [element("rect", class_=f"change c{n}", width=16, height=16) for n in range(len(shades))]
    legend = [
        element("li", element("svg", square, viewBox="0 0 16 16", aria_hidden="true"), name)
        for square, name in zip(squares, shades, strict=True)
    ]
    windows = ["", *("none" if window is None else f"{window:,}" for window in reach.windows)]
    body = [
        [str(row), window, f"{allowed:,}", f"{measured:,}"]
        for row, (window, allowed, measured) in enumerate(zip(windows, reach.allowed(), reach.measured(), strict=True))
    ]
    heading = ["after layers", "window", "by the windows", "measured"]
    drawn = chart.drawn(f"{title}: reach of token {reach.position}. {says}")
    return figure(
        joined(drawn, element("ul", *legend, class_="legend")),
        f"{title}. Shows how far the hidden states of the text move if token {reach.position} is another one, as a "
        f"share of their length, with windows in {which}; the outline is what these allow, 1 + the sum of (window - 1) "
        f"over the layers below. {says}",
        "Does not show whether the influence is of use.",
        table(f"{title}: tokens that one token reaches", heading, body),
    )
