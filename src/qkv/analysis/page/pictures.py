"""The pictures that stand without JavaScript: savings against price; price, cuts and masks by layer; the cache."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.analysis.page.charts import Chart, legend, linear, logarithmic, nearly_logarithmic
from qkv.analysis.page.markup import Markup, element, figure, joined, table
from qkv.analysis.pricing import Price
from qkv.analysis.recording import Recording
from qkv.analysis.seen import (
    Against,
    Saving,
    Seen,
    labels,
    labels_of,
    listed,
    narrow_layers,
    numbers_of,
    without_number,
)
from qkv.convert.families.windows import as_ranges
from qkv.layer_record import LayerRecord

UNIT = 0.01
"""Nats up to which the axis of increases has about equal steps."""
LONGEST = 1 << 17
"""Tokens at the right edge of the picture of the cache, and more for longer texts."""
LABELS = 8
"""Layers, at most, whose numbers are written below a chart."""


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(count: float) -> str:
    """A number of bytes, to three digits.

    Example:
        >>> size(512), size(20_000), size(188_743_680)
        ('512 B', '20 kB', '189 MB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(count) >= 10**power:
            number = count / 10**power
            digits = f"{number:.{2 - math.floor(math.log10(abs(number)))}f}" if abs(number) < 100 else f"{number:.0f}"
            return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"
    return f"{count:.0f} B"


def nats(number: float) -> str:
    """An increase of the loss, with its sign."""
    return f"{number:+.4f}" if math.isfinite(number) else "no number"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if math.isfinite(share) else "no number"


def savings(seen: Seen, most: float) -> Markup:
    """Picture 11: what changes save in the cache, against what they cost in loss, with the table of its points."""
    now = seen.cache_bytes({})
    found = [seen.savings(price) for price in seen.prices]
    proposal = seen.proposal(most)
    points = [saving for some in found for saving in some if math.isfinite(saving.increase)]
    increases = [0.0, most, *(saving.increase for saving in points)]
    least, largest = min(increases), max(increases)
    chart = Chart(
        linear("bytes of keys and values of this text", 0, now * 1.04, size),
        nearly_logarithmic("more loss, nats a token", min(least * 1.2, -UNIT / 5), max(largest * 1.3, UNIT), UNIT),
    )
    chart.line([(0, most), (now * 1.04, most)], "limit")
    for n, some in enumerate(found):
        chart.line(sorted((saving.cache_bytes, saving.increase) for saving in some), f"line s{n % 4} d{n % 5}")
        for saving in some:
            if math.isfinite(saving.increase):
                at = f"{saving.price.change} in {counted(len(saving.layers), 'layer')}"
                words = f"{at}: {size(saving.cache_bytes)}, {nats(saving.increase)} nats"
                chart.mark(saving.cache_bytes, saving.increase, n, words)
    chart.mark(now, 0, len(found), f"as it is: {size(now)}")
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
        f"{size(proposal.cache_bytes)} instead of {size(seen.cache_bytes({}))}, {nats(proposal.increase)} nats. {how}"
    )


def price_by_layer(price: Price) -> Markup:
    """Picture 8: the increase of the loss if a layer alone were changed."""
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


def cuts(seen: Seen) -> Markup:
    """Picture 7: the weight that windows cut, a thin line a KV head and a thick one for the worst of all."""
    recording = seen.recording
    windows = recording.windows
    names = _labels(recording)
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
        f"A window of {counted(window, 'key')} cuts {_percent(min(_column(by_layer, order[0])))} of the layer that "
        f"loses least and {_percent(worst[order[0]])} of the one that loses most."
    )
    rows = [[names[n], *(_percent(by_layer[n, at].item()) for at in order)] for n, _ in layers]
    narrow = [
        f" A window of {each:,} hides nothing where {some}."
        for each in windows
        if (some := narrow_layers(recording, each))
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


def layers(seen: Seen, even: Sequence[Tensor]) -> Markup:
    """Pictures 1 and 2: the mask in effect and the sharing of KV heads, of each kind of layer; and a table of all.

    ``even`` are the maps of `even_maps`.
    """
    kinds: dict[tuple[str, int, int, int | None, bool], list[int]] = {}
    records, names = seen.recording.layers, _labels(seen.recording)
    for n, layer in enumerate(records):
        kind = _outline(even[n]), layer.heads, layer.kv_heads, layer.window, layer.is_cross
        kinds.setdefault(kind, []).append(n)
    pictures = []
    for (outline, heads, kv_heads, _, is_cross), members in kinds.items():
        sees = _sees(records[members[0]])
        which = f"{'Layer' if len(members) == 1 else 'Layers'} {listed([names[n] for n in members])}"
        shares = f"{counted(heads, 'query head')} on {counted(kv_heads, 'KV head')}"
        square = element(
            "svg",
            element("rect", class_="hidden", width=64, height=64),
            element("path", class_="seen", d=outline),
            class_="mask",
            viewBox="-1 -1 66 66",
            role="img",
            aria_label=f"{which}: the mask in effect; a query sees {sees}.",
        )
        pictures.append(
            figure(
                joined(square, _sharing(heads, kv_heads)),
                f"{which} in effect: a query (down) sees {sees} (across); {shares}.",
                "Does not show which of these keys get weight."
                if is_cross
                else "A cell is filled if some pair in it is visible; it does not show which keys get weight.",
            )
        )
    return joined(element("div", *pictures, class_="row"), *_without_heads(seen), _summary(seen), *_lost(seen))


def _without_heads(seen: Seen) -> list[Markup]:
    """The layers of which there are no pictures."""
    names = labels(seen.recording.without_heads)
    if not names:
        return []
    which = f"{'Layer' if len(names) == 1 else 'Layers'} {listed(names)}"
    return [element("p", f"{which} {'keeps' if len(names) == 1 else 'keep'} no keys by heads.", class_="not")]


def _lost(seen: Seen) -> list[Markup]:
    """What the means leave out, since a query or a key has NaN or inf."""
    says = without_number(seen.recording)
    return [] if says is None else [element("p", says)]


def _sees(layer: LayerRecord) -> str:
    if layer.is_cross:
        return "a context"
    if layer.window is not None:
        return counted(layer.window, "key") + (
            " to each side, its own counted, at most" if layer.sees_later_keys else " at most"
        )
    if layer.mask.allow is not None:
        return "what a dense mask shows"
    return "all keys before it and its own" if layer.mask.is_causal else "all keys"


def _outline(even: Tensor) -> str:
    """A path of the blocks that some head sees, in a square of 64."""
    path, seen = "", even.amax(0) > 0
    rows, columns = seen.shape
    high, wide = 64 / rows, 64 / columns
    for i, row in enumerate(seen.tolist()):
        start = None
        for j, is_seen in enumerate([*row, False]):
            if is_seen and start is None:
                start = j
            elif not is_seen and start is not None:
                width = (j - start) * wide
                path += f"M{start * wide:g} {i * high:g}h{width:g}v{high:g}h{-width:g}z"
                start = None
    return path


def _sharing(heads: int, kv_heads: int) -> Markup:
    """Query heads above, joined to the KV heads that they share."""
    wide = 160
    lines, group = [], heads // kv_heads
    for head in range(heads):
        x, to = (head + 0.5) * wide / heads, (head // group + 0.5) * wide / kv_heads
        lines.append(element("line", class_="join", x1=x, y1=10, x2=to, y2=50))
        lines.append(element("circle", class_="query", cx=x, cy=8, r=min(4.0, 0.35 * wide / heads)))
    for head in range(kv_heads):
        half = min(5.0, 0.35 * wide / kv_heads)
        x = (head + 0.5) * wide / kv_heads - half
        lines.append(element("rect", class_="key", x=x, y=50, width=2 * half, height=10))
    label = f"{counted(heads, 'query head')} share {counted(kv_heads, 'KV head')}"
    return element("svg", *lines, class_="sharing", viewBox=f"0 0 {wide} 64", role="img", aria_label=label)


def _summary(seen: Seen) -> Markup:
    recording = seen.recording
    heading = ["layer", "name", "query heads", "KV heads", "sees", "keys in effect", "distance", "on sinks"]
    heading += [f"cut by {window:,}" for window in recording.windows]
    rows = [
        [label, layer.name, str(layer.heads), str(layer.kv_heads), *row]
        for label, layer, row in zip(_labels(recording), recording.layers, recording.rows(), strict=True)
    ]
    caption = "What layers attend to, in the mean over heads and queries; cut: of the KV head that loses most"
    return table(caption, heading, rows)


def _labels(recording: Recording) -> list[str]:
    return labels_of(recording)


def against(seen: Seen, other: Against) -> Markup:
    """The loss of another model on the same text."""
    before, after = other.before.nanmean().item(), other.loss.nanmean().item()
    return element(
        "p",
        f"{other.model} has a loss of {after:.4f} nats a token where {seen.model} has {before:.4f}: "
        f"{nats(after - before)}. Its tokens are among the changes below.",
    )


def cache(seen: Seen, most: float) -> Markup:
    """Picture 5: bytes of keys and values over the number of tokens."""
    length, proposal = len(seen.tokens), seen.proposal(most)
    kinds: list[tuple[str, dict[str, Price]]] = [("as it is", {})]
    for price in seen.prices:
        where = "all layers" if price.unmeasured is None else counted(len(price.layers), "layer")
        kinds.append((f"{price.change} in {where}", dict.fromkeys(price.layers, price)))
    if proposal is not None:
        names = zip(numbers_of(proposal.price.layers), proposal.price.layers, strict=True)
        kinds.append(("the proposal", {name: proposal.price for number, name in names if number in proposal.layers}))
    most_tokens = max(LONGEST, 1 << (length - 1).bit_length())
    counts = [1 << n for n in range(6, most_tokens.bit_length())]
    lines = [[(float(count), float(seen.cache_bytes(changed, count))) for count in counts] for _, changed in kinds]
    least, largest = (end(y for line in lines for _, y in line) for end in (min, max))
    powers = [n for n in range(3, 15) if least <= 10**n <= largest]
    thousands = [(float(count), f"{count >> 10}k") for count in counts if count >= 1024 and count.bit_length() % 2]
    chart = Chart(
        logarithmic("tokens", [(64.0, "64"), (256.0, "256"), *thousands], 64, most_tokens),
        logarithmic("keys and values", [(10.0**n, size(10**n)) for n in powers], least * 0.8, largest * 1.25),
    )
    if length >= 64:
        chart.line([(length, least * 0.8), (length, largest * 1.25)], "limit")
    for n, line in enumerate(lines):
        chart.line(line, f"line s{n % 4} d{n % 5}")
        chart.mark(*line[-1], n, f"{kinds[n][0]}, {counts[-1]:,} tokens: {size(line[-1][1])}")
    says = f"At {counts[-1]:,} tokens the model as it is keeps {size(lines[0][-1][1])}."
    rows = [[f"{count:,}", *(f"{line[at][1]:,.0f}" for line in lines)] for at, count in enumerate(counts)]
    return figure(
        joined(chart.drawn(f"Bytes of keys and values over tokens. {says}"), legend([name for name, _ in kinds])),
        f"Shows bytes of keys and values of one text, {counted(seen.bytes_per_number, 'byte')} a number, as its length "
        f"grows. {says} The dashed line is at this text's {counted(length, 'token')}.",
        "Does not show time, nor memory of weights.",
        table("Bytes of keys and values", ["tokens", *(name for name, _ in kinds)], rows),
    )
