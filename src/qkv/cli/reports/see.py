"""The reports of `qkv see` as text."""

from collections import Counter
from collections.abc import Sequence

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qkv.analysis import Agreement, CostlyToken, Price, Reach, Recording, Saving, Seen
from qkv.analysis.labels import labels, labels_of, listed
from qkv.analysis.words import (
    agreement_by_group,
    how_heads_agree,
    narrow_layers,
    percent,
    what_layers_see,
    without_number,
)
from qkv.bench.mechanisms import Mechanism, Sizes, mechanisms
from qkv.cli.printing import COLUMNS, counted, print_line, print_table
from qkv.convert.families.windows import as_ranges
from qkv.models.kv_cache_size import readable_bytes

PICTURED = Sizes(1, 8, 4, 2, 64, 3, torch.bfloat16, decode=False, backward=False)
COUNTED = PICTURED._replace(length=4096, num_heads=8, window=512)
WINDOWS = 2
"""in a table; more of them are shown below each other"""
BAR = 24
"""Most characters of a bar."""
COSTLY = 10
"""Number of tokens that are listed."""
BEFORE = 48
"""Characters before such a token."""
TOKEN = 20
"""Most characters of it."""
GROUPS = {"encoder": "Encoder", "decoder": "Decoder", "cross": "Cross-attention"}
"""Kinds of layers, in order."""
SENTENCES = {
    "scaled dot-product": "One head: weights softmax(q k / sqrt(d)) over all keys.",
    "multi-head": "Several heads, each with keys and values of its own.",
    "cross": "Keys and values come from another sequence, here half as long.",
    "causal": "A token sees itself and those before it.",
    "sliding-window": "A token sees the latest ones alone; layers pass on the rest.",
    "multi-query": "All query heads share the keys and values of one head.",
    "grouped-query": "Groups of query heads share keys and values.",
}


def print_mechanisms(console: Console) -> None:
    """Prints the seven mechanisms: which keys each query sees, and what that costs."""
    title = f"Who sees whom: a line a query, a column a key, of {PICTURED.length} tokens"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for small, large in zip(mechanisms(PICTURED), mechanisms(COUNTED), strict=True):
        console.print()
        picture = small.mask.draw(small.num_queries, small.num_keys, offset=small.offset).splitlines()
        words = [small.name, SENTENCES[small.name], *_costs(large)]
        for row in range(max(len(picture), len(words))):
            left = picture[row] if row < len(picture) else ""
            right = words[row] if row < len(words) else ""
            line = Text(f"  {left.ljust(PICTURED.length)}   " if right else f"  {left}")
            console.print(line.append(right, style="bold" if row == 0 else ""), soft_wrap=True)
    console.print()
    console.print(Text("qkv see MODEL --text FILE shows what the layers of a model attend to."), soft_wrap=True)


def _costs(mechanism: Mechanism) -> list[str]:
    lengths = mechanism.num_queries, mechanism.num_keys
    scores = int(mechanism.mask.visible(*lengths, mechanism.offset).sum()) * mechanism.num_heads
    window = "" if mechanism.window is None else f", a window of {mechanism.window}"
    heads = f"{counted(mechanism.num_heads, 'query head')} on {counted(mechanism.num_kv_heads, 'KV head')}"
    return [
        f"{COUNTED.length:,} tokens, {heads}{window}:",
        f"{scores:,} scores, {readable_bytes(mechanism.kv_bytes())} of keys and values",
    ]


def print_seen(seen: Seen, most: float, why_not: str | None, console: Console) -> None:
    """Prints what was found of a model.

    Args:
        most: nats that the proposal may cost.
        why_not: why `qkv convert` could not write the proposal; None if it could.
    """
    title = f"{_one_line(seen.model)} on {_one_line(seen.text)}: {_read(len(seen.tokens), seen.tokens_left_out)}"
    if seen.context is not None:
        read = _read(seen.context.tokens, seen.context.tokens_left_out)
        title += f", after {_one_line(seen.context.text)}: {read}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for sizes, count in Counter(
        (layer.heads, layer.kv_heads, layer.head_dim) for layer in seen.recording.layers
    ).items():
        shape = f"{counted(sizes[0], 'query head')} on {counted(sizes[1], 'KV head')} of width {sizes[2]}"
        console.print(Text(f"{counted(count, 'layer')} of {shape}"), soft_wrap=True)
    if seen.cache_bytes({}):  # an encoder keeps none
        console.print(Text(f"{readable_bytes(seen.cache_bytes({}))} of keys and values"), soft_wrap=True)
    groups = [layer.group for layer in seen.recording.layers]
    _print_changes(seen.recording, console)
    for group in sorted(set(groups), key=list(GROUPS).index):
        console.print()
        members = [index for index, other in enumerate(groups) if other == group]
        title = _titled("What layers attend to, in the mean over queries and heads", group, groups)
        print_table(title, _layers(seen.recording, members), console)
    names = labels(seen.recording.without_heads)
    if names:
        which = f"layer {names[0]} keeps" if len(names) == 1 else f"layers {listed(names)} keep"
        print_line(f"not shown: {which} no keys by heads", console)
    lost = without_number(seen.recording.layers)
    if lost is not None:
        print_line(lost, console)
    _print_rows(seen, console)
    for price in seen.prices:
        _print_price(seen, price, console)
    for agreement in seen.agreements:
        _print_agreement(agreement, console)
    for title, reach in seen.reaches:
        _print_reach(title, reach, console)
    if seen.against is not None:
        before, after = (loss.nanmean().item() for loss in (seen.against.before, seen.against.loss))
        console.print()
        title = f"Against {seen.against.model}: loss {before:.4f} to {after:.4f} ({after - before:+.4f})"
        console.print(Text(title, style="bold"), soft_wrap=True)
        _print_tokens("Tokens that it predicts worse", seen, seen.against.costly(COSTLY), console)
    if seen.prices:
        console.print()
        for line in _proposal(seen, most, why_not):
            print_line(line, console)


def _read(tokens: int, left_out: int | None) -> str:
    """How much of a text was read."""
    rest = "the rest" if left_out is None else f"{left_out:,}"
    return counted(tokens, "token") + (f" (the first; {rest} left out)" if left_out != 0 else "")


def _titled(title: str, group: str, groups: Sequence[str]) -> str:
    """A title, after the kind of layers where there are several."""
    return title if len(set(groups)) == 1 else f"{GROUPS[group]}: {title[0].lower()}{title[1:]}"


def _print_changes(recording: Recording, console: Console) -> None:
    """What windows would change in layers, those first that change least."""
    if not recording.windows:
        return
    groups = [layer.group for layer in recording.layers]
    names = labels_of(recording.layers)
    changes, cuts = recording.change_by_layer(), recording.cut_by_layer()
    for group in sorted({*groups} - {"cross"}, key=list(GROUPS).index):
        members = [index for index, other in enumerate(groups) if other == group]
        for first in range(0, len(recording.windows), WINDOWS):
            at = range(first, min(first + WINDOWS, len(recording.windows)))
            table = Table(box=None, pad_edge=False)
            table.add_column("layer", justify="right", no_wrap=True)
            for n in at:
                table.add_column(f"change by {recording.windows[n]:,}", justify="right", no_wrap=True)
                table.add_column(f"cut by {recording.windows[n]:,}", justify="right", no_wrap=True)
            for index in sorted(members, key=lambda index: changes[index, first].nan_to_num(torch.inf).item()):
                cells = (percent(numbers[index, n].item()) for n in at for numbers in (changes, cuts))
                table.add_row(names[index].rpartition(" ")[2], *cells)
            named = " and ".join(f"{recording.windows[n]:,}" for n in at)
            title = f"What {'a window' if len(at) == 1 else 'windows'} of {named} would change, the least"
            title += " first" if len(at) == 1 else f" by {recording.windows[first]:,} first"
            console.print()
            print_table(_titled(title, group, groups), table, console)
    sinks = f" (it shows {counted(recording.sink_tokens, 'sink token')})" if recording.sink_tokens else ""
    for line in (
        "change: how far the output moves, as a share of its length, of the head that moves most;",
        f"cut: the weight on keys that a window hides{sinks}, of the KV head that loses most; before training.",
        "Change ranks layers better than cut; --measure finds what they cost.",
    ):
        print_line(line, console)
    for window in recording.windows:
        narrow = narrow_layers(recording.layers, window)
        if narrow is not None:
            print_line(f"--window {window} hides nothing more where {narrow}", console)


def _layers(recording: Recording, members: list[int]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "sees", "in effect", "distance", "on sinks"):
        table.add_column(title, justify="right", no_wrap=True)
    names = labels_of(recording.layers)
    rows = what_layers_see(recording.layers, recording.cut_by_layer())
    for index in members:
        table.add_row(names[index].rpartition(" ")[2], *rows[index][:4])
    return table


def _print_rows(seen: Seen, console: Console) -> None:
    """What the chosen queries attend to, in the layers that are shown, or the middle one of all."""
    records, is_shown = seen.recording.layers, seen.is_shown()
    names = labels_of(records)
    chosen = [n for n in range(len(records)) if is_shown[n]] if seen.shown else [len(records) // 2]
    for n in chosen:
        for query, rows in seen.rows(records[n]):
            console.print()
            title = f"What token {query}, [{_one_line(seen.tokens[query])[:TOKEN]}], attends to in layer {names[n]}"
            console.print(Text(title, style="bold"), soft_wrap=True)
            console.print(Text("head  keys  their weight  the heaviest, each with its place in the text"))
            for head, row in enumerate(rows):
                share = "no number" if row.covered != row.covered else f"{100 * row.covered:.1f}%"
                line = f"{head:4}  {len(row.keys):4}  {share:>12}"
                for key, weight in zip(row.keys, row.weights, strict=True):
                    token = "" if records[n].is_cross else f" [{_one_line(seen.tokens[key])[:TOKEN]}]"
                    more = f"  {100 * weight:.1f}%{token} {key}"
                    if weight != weight or cell_len(line + more) > COLUMNS:
                        break
                    line += more
                console.print(Text(line), soft_wrap=True)
    if seen.shown is None and any(layer.queries for layer in records):
        console.print(Text("--layer shows other layers."), soft_wrap=True)


def _print_price(seen: Seen, price: Price, console: Console) -> None:
    loss, names = price.loss.nanmean().item(), labels(price.layers)
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "nats a token"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    costs = price.by_layer.tolist()
    most = max(map(abs, costs))
    for name, cost in zip(names, costs, strict=True):
        bar = round(BAR * abs(cost) / most) if most > 0 else 0
        table.add_row(name, f"{cost:+.4f}", ("#" if cost > 0 else "-") * bar)
    console.print()
    print_table(f"If one layer had {price.change}: loss {loss:.3f}, before training", table, console)
    if price.note is not None:
        print_line(price.note, console)
    if not price.together:
        _print_tokens("Tokens that pay most in the mean of these", seen, seen.costly(price, COSTLY), console)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("layers", "nats a token", "keys and values", "of now"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    now = seen.cache_bytes({})
    for saving in seen.savings(price):
        table.add_row(
            str(len(saving.layers)),
            f"{saving.increase:+.4f}",
            readable_bytes(saving.cache_bytes),
            f"{saving.cache_bytes / now:.0%}",
            as_ranges(saving.layers),
        )
    console.print()
    print_table("If the cheapest had it together", table, console)
    _print_tokens("Tokens that pay most for that", seen, seen.costly(price, COSTLY), console)


def _print_agreement(agreement: Agreement, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "of", "groups", "in a group", "least", "of others"):
        table.add_column(title, justify="left" if title in ("of", "groups") else "right", overflow="fold")
    for row in agreement_by_group(agreement.layers):
        table.add_row(*row)
    console.print()
    print_table(f"How alike KV heads are, for {agreement.change}: 1 for the same", table, console)
    print_line(how_heads_agree(agreement.change, agreement.layers), console)


def _print_reach(title: str, reach: Reach, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("after layers", "window", "by the windows", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    windows = ["", *("none" if window is None else f"{window:,}" for window in reach.windows)]
    for row, numbers in enumerate(zip(windows, reach.allowed(), reach.measured(), strict=True)):
        table.add_row(str(row), numbers[0], *(f"{number:,}" for number in numbers[1:]))
    console.print()
    print_table(f"{title}: how many tokens token {reach.position} reaches", table, console)


def _print_tokens(title: str, seen: Seen, costly: list[CostlyToken], console: Console) -> None:
    if costly:
        console.print()
        console.print(Text(f"{title}, in nats, after what stands before them", style="bold"))
        for token in costly:
            before = _one_line("".join(seen.tokens[max(0, token.position - BEFORE) : token.position]))[-BEFORE:]
            words = f"{before}[{_one_line(seen.tokens[token.position])[:TOKEN]}]"
            console.print(Text(f"  {token.increase:+6.2f}  {words}"), soft_wrap=True)


def _one_line(text: str) -> str:
    """Text whose line ends and control characters are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _proposal(seen: Seen, most: float, why_not: str | None) -> list[str]:
    proposal: Saving | None = seen.proposal(most)
    if proposal is None:
        if all(price.window is None for price in seen.prices):
            return []
        return [f"No window of these saves memory for {most:g} nats a token or less; see --most."]
    now = seen.cache_bytes({})
    saved = f"{readable_bytes(now)} to {readable_bytes(proposal.cache_bytes)} ({proposal.cache_bytes / now:.0%})"
    count = sum(layer.group == "decoder" for layer in seen.recording.layers)
    where = f"{len(proposal.layers)} of {count} layers, {as_ranges(proposal.layers)}"
    how = "With --json, qkv convert MODEL OUT --like REPORT.json writes that." if why_not is None else why_not
    return [
        f"For {most:g} nats a token or less: {proposal.price.change} in {where}.",
        f"Keys and values: {saved}. Loss: {proposal.increase:+.4f}, before training.",
        how,
    ]
