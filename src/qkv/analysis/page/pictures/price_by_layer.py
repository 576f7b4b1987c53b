"""Picture 8: the increase of the loss if a layer alone were changed; and another model's loss."""

import math

from qkv.analysis.labels import labels
from qkv.analysis.page.charts import Chart, linear
from qkv.analysis.page.markup import Markup, element, figure, table
from qkv.analysis.pricing import Price
from qkv.analysis.seen import Against, Seen
from qkv.analysis.words import nats

LABELS = 8
"""Layers, at most, whose numbers are written below a chart."""


def price_by_layer(price: Price) -> Markup:
    """A bar a layer."""
    costs = price.by_layer.tolist()
    finite = [cost for cost in costs if math.isfinite(cost)] or [0.0]
    names, count = labels(price.layers), len(costs)
    every = -(-count // LABELS)
    least, most = min(0.0, *finite), max(0.0, *finite)
    base = linear("layer", -0.5, count - 0.5, str)
    chart = Chart(
        base._replace(ticks=[(n, names[n]) for n in range(0, count, every)]),
        linear("more loss, nats a token", least, most, lambda x: f"{x:.3g}"),
    )
    for n, cost in enumerate(costs):
        if math.isfinite(cost):
            chart.bar(n - 0.4, n + 0.4, cost, f"layer {names[n]}: {nats(cost)} nats")
    dearest = max(range(count), key=lambda n: costs[n] if math.isfinite(costs[n]) else -math.inf)
    title = f"If one layer had {price.change}"
    says = f"{title}: layer {names[dearest]} costs most, {nats(costs[dearest])} nats a token before training."
    rows = [[names[n], price.layers[n], nats(cost)] for n, cost in enumerate(costs)]
    return figure(
        chart.drawn(says),
        f"Shows how much the loss of {price.loss.nanmean().item():.4f} nats increases if that layer alone is changed. "
        + says,
        "Does not show several layers at once, which may cost more than their sum."
        + (f" {price.note[0].upper()}{price.note[1:]}." if price.note else ""),
        table(f"{title}, before training", ["layer", "name", "more loss, nats a token"], rows),
    )


def against(seen: Seen, other: Against) -> Markup:
    """The loss of another model on the same text."""
    before, after = other.before.nanmean().item(), other.loss.nanmean().item()
    return element(
        "p",
        f"{other.model} has a loss of {after:.4f} nats a token where {seen.model} has {before:.4f}: "
        f"{nats(after - before)}. Its tokens are among the changes below.",
    )
