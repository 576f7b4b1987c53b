"""Pictures 1 and 2: the mask in effect and the sharing of KV heads, of each kind of layer; and a table of all."""

from collections.abc import Sequence

from torch import Tensor

from qkv.analysis.labels import labels, labels_of, listed
from qkv.analysis.page.markup import Markup, element, figure, joined, table
from qkv.analysis.seen import Seen
from qkv.analysis.words import counted, keys_seen, what_layers_see, without_number


def layers(seen: Seen, even: Sequence[Tensor]) -> Markup:
    """A picture of each kind of layer, and the table. ``even`` are the maps of `even_maps`."""
    kinds: dict[tuple[str, int, int, int | None, bool], list[int]] = {}
    records, names = seen.recording.layers, labels_of(seen.recording.layers)
    for n, layer in enumerate(records):
        kind = _outline(even[n]), layer.heads, layer.kv_heads, layer.window, layer.is_cross
        kinds.setdefault(kind, []).append(n)
    pictures = []
    for (outline, heads, kv_heads, _, is_cross), members in kinds.items():
        sees = keys_seen(records[members[0]])
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
    says = without_number(seen.recording.layers)
    return [] if says is None else [element("p", says)]


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
    words = what_layers_see(recording.layers, recording.cut_by_layer())
    rows = [
        [label, layer.name, str(layer.heads), str(layer.kv_heads), *row]
        for label, layer, row in zip(labels_of(recording.layers), recording.layers, words, strict=True)
    ]
    caption = "What layers attend to, in the mean over heads and queries; cut: of the KV head that loses most"
    return table(caption, heading, rows)
