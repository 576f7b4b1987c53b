"""Picture 11: what changes save in the cache, against what they cost in loss."""

import math

from qkv.analysis.page.charts import Chart, legend, linear, nearly_logarithmic
from qkv.analysis.page.markup import Markup, figure, joined, table
from qkv.analysis.seen import Saving, Seen
from qkv.analysis.words import counted, nats
from qkv.byte_sizes import readable_bytes, unit_of, written_round
from qkv.convert.families.windows import as_ranges

UNIT = 0.01
"""Nats up to which the axis of increases has about equal steps."""


def savings(seen: Seen, most: float) -> Markup:
    """The points of all changes, with the table of them."""
    now = seen.cache_bytes({})
    found = [seen.savings(price) for price in seen.prices]
    proposal = seen.proposal(most)
    points = [saving for some in found for saving in some if math.isfinite(saving.increase)]
    increases = [0.0, most, *(saving.increase for saving in points)]
    least, largest = min(increases), max(increases)
    chart = Chart(
        linear("bytes of keys and values of this text", 0, now * 1.04, written_round, unit_of(now)),
        nearly_logarithmic("more loss, nats a token", min(least * 1.2, -UNIT / 5), max(largest * 1.3, UNIT), UNIT),
    )
    chart.line([(0, most), (now * 1.04, most)], "limit")
    for n, some in enumerate(found):
        chart.line(sorted((saving.cache_bytes, saving.increase) for saving in some), f"line s{n % 4} d{n % 5}")
        for saving in some:
            if math.isfinite(saving.increase):
                at = f"{saving.price.change} in {counted(len(saving.layers), 'layer')}"
                words = f"{at}: {readable_bytes(saving.cache_bytes)}, {nats(saving.increase)} nats"
                chart.mark(saving.cache_bytes, saving.increase, n, words)
    chart.mark(now, 0, len(found), f"as it is: {readable_bytes(now)}")
    if proposal is not None:
        chart.ring(proposal.cache_bytes, proposal.increase, "the proposal")
    sentence = _proposal(seen, proposal, most)
    names = [*(price.change for price in seen.prices), "as it is"]
    rows = [["as it is", "0", "", "+0.0000", f"{now:,}", "100%"]]
    rows += [_saving_row(saving, now) for some in found for saving in some]
    shown = figure(
        joined(chart.drawn(f"Savings against price. {sentence} The numbers are in the table below."), legend(names)),
        f"Shows what the cheapest layers would save together, and the loss that it costs before training. {sentence}",
        "Does not show what training would win back, nor other texts. Steps on the upright axis are about equal up to "
        f"{UNIT:g} nats, and factors beyond; the dashed line is at {most:g} nats.",
    )
    heading = ["change", "layers", "which", "more loss, nats a token", "bytes of keys and values", "of now"]
    return joined(shown, table("What changes save and cost on this text, before training", heading, rows))


def _saving_row(saving: Saving, now: int) -> list[str]:
    where = [str(len(saving.layers)), as_ranges(saving.layers)]
    return [
        saving.price.change,
        *where,
        nats(saving.increase),
        f"{saving.cache_bytes:,}",
        f"{saving.cache_bytes / now:.0%}",
    ]


def _proposal(seen: Seen, proposal: Saving | None, most: float) -> str:
    if not any(price.window is not None for price in seen.prices):
        return "No window was measured, so that none is proposed."
    if proposal is None:
        return f"No measured window saves bytes for at most {most:g} nats a token."
    how = (
        "Configurations of transformers have no sink tokens; qkv.SlidingKVCache has them."
        if proposal.price.sink_tokens
        else "With the JSON report of qkv see, qkv convert --like writes that."
    )
    return (
        f"The measured windows that save most for at most {most:g} nats a token, before training: "
        f"{proposal.price.change} in {counted(len(proposal.layers), 'layer')} ({as_ranges(proposal.layers)}), "
        f"{readable_bytes(proposal.cache_bytes)} instead of {readable_bytes(seen.cache_bytes({}))}, "
        f"{nats(proposal.increase)} nats. {how}"
    )
