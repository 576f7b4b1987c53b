"""Picture 7: the weight that windows cut."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.analysis.labels import labels_of
from qkv.analysis.page.charts import Chart, linear, logarithmic
from qkv.analysis.page.markup import Markup, figure, table
from qkv.analysis.seen import Seen
from qkv.analysis.words import counted, narrow_layers, percent


def cuts(seen: Seen) -> Markup:
    """A thin line a KV head, and a thick one for the worst of all."""
    recording = seen.recording
    windows = recording.windows
    names = labels_of(recording.layers)
    layers = [(n, layer) for n, layer in enumerate(recording.layers) if not layer.is_cross]
    chart = Chart(
        logarithmic("window, keys", [(window, f"{window}") for window in sorted(windows)], min(windows), max(windows)),
        linear("weight cut", 0, 1, lambda x: f"{100 * x:.0f}%"),
    )
    order = sorted(range(len(windows)), key=windows.__getitem__)
    by_layer = recording.cut_by_layer()
    for _, layer in layers:
        for row in layer.cut_by_kv_head()[:, 0].T.tolist():
            _cut_line(chart, windows, row, order, "thin")
    worst = torch.stack([by_layer[n] for n, _ in layers]).amax(0).tolist()
    _cut_line(chart, windows, worst, order, "thick")
    sinks = recording.sink_tokens
    kept = f", with {counted(sinks, 'sink token')} kept" if sinks else ", without sink tokens"
    window = windows[order[0]]
    says = (
        f"A window of {counted(window, 'key')} cuts {percent(min(_column(by_layer, order[0])))} of the layer that "
        f"loses least and {percent(worst[order[0]])} of the one that loses most."
    )
    rows = [[names[n], *(percent(by_layer[n, at].item()) for at in order)] for n, _ in layers]
    narrow = [
        f" A window of {each:,} hides nothing where {some}."
        for each in windows
        if (some := narrow_layers(recording.layers, each))
    ]
    return figure(
        chart.drawn(f"Weight that windows cut{kept}. {says}"),
        f"Shows the weight on keys that a window hides{kept}: a thin line is a KV head, the largest of its query heads "
        f"in the mean over queries that lose keys; the thick line is the largest of all. {says}",
        "Does not show what those keys hold: the loss does. It is before training." + "".join(narrow),
        table(
            "Weight cut from the KV head of a layer that loses most",
            ["layer", *(f"window of {windows[at]:,}" for at in order)],
            rows,
        ),
    )


def _column(numbers: Tensor, at: int) -> list[float]:
    return [number for number in numbers[:, at].tolist() if math.isfinite(number)] or [math.nan]


def _cut_line(chart: Chart, windows: Sequence[int], row: Sequence[float], order: Sequence[int], kind: str) -> None:
    points = [(float(windows[at]), row[at]) for at in order]
    if len(points) == 1:  # a line of one point is not seen
        (window, cut), width = points[0], 1.05 if kind == "thin" else 1.1
        points = [(window / width, cut), (window * width, cut)]
    chart.line(points, kind)
