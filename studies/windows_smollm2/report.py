"""Writes the page of the study and its figures from the results."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch
from findings import RANKS, WORSE, between_stages, closed, correlations, half_of
from matplotlib.figure import Figure
from measuring import SCREEN
from training import ALL, HALF, ORIGINAL

from qkv import plots
from qkv.analysis import Price
from qkv.convert.families.windows import as_ranges
from qkv.models.kv_cache_size import readable_bytes

START = "<!-- From here on written by report.py. -->"
STYLES = (("o-", "#0072B2"), ("s--", "#D55E00"), ("^-.", "#009E73"), ("D:", "#CC79A7"))


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the figures, and the part of the page below START."""
    for name, draw in (("price", prices), ("together", together)):
        with own_style():
            (folder / f"{name}.svg").write_text(plots.svg(draw(results)))
    page = folder / "README.md"
    by_hand, _, _ = page.read_text().partition(START)
    parts = [by_hand + START, *answers(results), *training(results), machine(results)]
    page.write_text("\n\n".join(parts) + "\n")


@contextmanager
def own_style() -> Iterator[None]:
    """The settings that matplotlib comes with and a few of ours, whatever the machine's are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
        yield


def prices(results: dict[str, Any]) -> Figure:
    """The price of each layer, stage by stage."""
    stages = results["measured"]
    figure = Figure(figsize=(8, 1.9 * len(stages)), layout="constrained")
    for panel, (name, stage) in zip(figure.subplots(len(stages), 1, squeeze=False)[:, 0], stages.items(), strict=True):
        costs = torch.tensor(stage["price"])[:, None, None]
        window = results["settings"]["window"]
        plots.price(Price("", window, 0, None, tuple(stage["layers"]), torch.zeros(1, 1), costs, ()), ax=panel)
        panel.set_title(f"{written(name)}: if one layer had the window")
    return figure


def together(results: dict[str, Any]) -> Figure:
    """The increase of the loss over the layers that have the window, by price and by screen."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for (marks, colour), (name, stage) in zip(STYLES, results["measured"].items(), strict=False):
        counts = [len(some["layers"]) for some in stage["together"]]
        panel.plot(counts, [s["increase"] for s in stage["together"]], marks, color=colour, label=written(name))
        by_screen = [some["increase_by_screen"] for some in stage["together"]]
        panel.plot(counts, by_screen, marks[0], color=colour, markerfacecolor="none", label="chosen by the screen")
    panel.set_yscale("symlog", linthresh=0.01)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set(xlabel="layers with the window, the cheapest first", ylabel="more loss, nats a token")
    panel.legend(frameon=False, ncols=2, fontsize="small")
    return figure


def answers(results: dict[str, Any]) -> Iterator[str]:
    """Whether screens rank layers as prices do, how stable these are, and what several layers cost."""
    found, stages = correlations(results), list(results["measured"])
    least = min(found[SCREEN])
    hold = "Yes" if least >= RANKS else "No" if max(found[SCREEN]) < RANKS else "On some"
    best = max(found, key=lambda name: mean(map(abs, found[name])))
    rows = [[name, *(f"{each:+.2f}" for each in numbers)] for name, numbers in found.items()]
    yield (
        "## Does one pass tell what a window costs?\n\n"
        f"**{hold}**, by the screen that `qkv see` printed ({SCREEN}): its rank correlation with the prices is "
        f"{least:.2f} to {max(found[SCREEN]):.2f}, where {RANKS} and more counts. The largest in the mean is that "
        f"of: {best}; `qkv see` ranks layers by the change of output since. Rank correlations (Spearman) of numbers by "
        "layer with the increase of the loss if it alone has "
        f"the window:\n\n{table(('by layer', *map(written, stages)), rows)}\n\n![Prices by layer](price.svg)"
    )
    rows = [[written(one), written(other), f"{number:+.2f}"] for one, other, number in between_stages(results)]
    yield (
        "## Do texts and sinks agree on the order of layers?\n\nRank correlations of the prices themselves:\n\n"
        f"{table(('prices', 'and prices', 'rank correlation'), rows, words=2)}"
    )
    yield several(results)


def several(results: dict[str, Any]) -> str:
    """Loss and bytes of the cheapest layers together."""
    stages, rows, worse = results["measured"], [], []
    for name, stage in stages.items():
        for some in stage["together"]:
            both = some["increase"], some["increase_by_screen"]
            if len(some["layers"]) < len(stage["layers"]):
                worse.append(both[1] <= max(WORSE * both[0], 0))
            share = f"{readable_bytes(some['cache_bytes'])} ({some['cache_bytes'] / stage['cache_bytes']:.0%})"
            rows.append([written(name), str(len(some["layers"])), share, *(f"{each:+.4f}" for each in both)])
    titles = ("text", "layers", "keys and values", "more loss, by price", "by the screen")
    return (
        f"## Several layers\n\nIn {sum(worse)} of {len(worse)} choices, the layers that the screen calls cheapest cost "
        f"at most {WORSE} times what those cost that are cheapest by price. Increase of the loss in nats a token, "
        f"before training; keys and values in 16 bits.\n\n![More loss over layers](together.svg)\n\n"
        f"{table(titles, rows)}"
    )


def training(results: dict[str, Any]) -> Iterator[str]:
    """What training wins back, for the models that were trained."""
    done, s = results["trained"], results["settings"]
    if ORIGINAL not in done:
        return
    rows, words = [], []
    for name in (ORIGINAL, HALF, ALL):
        losses = done[name]["losses"]
        rows.append([name, f"{losses['converted']:.4f}", f"{losses['uptrained']:.4f}"])
        if name != ORIGINAL:
            before, after = closed(results, name, ORIGINAL)
            words.append(f"{name[0].upper()}{name[1:]}: {before:+.4f} nats before training, {after:+.4f} after it.")
    one = done[ORIGINAL]
    yield (
        f"## Training\n\n{one['steps']} steps, {one['tokens']:,} tokens of Shakespeare's works, "
        f"`{' '.join(s['training'])}`, as many as the model with windows in all layers does in {s['minutes']:g} "
        "minutes. The original is trained as well, since the text differs from the model's training data. The "
        f"cheapest half, by price on the first text without sinks: {as_ranges(half_of(results))}. Losses of "
        f"{one['held_out_tokens']:,} held-out tokens of King "
        f"Lear in blocks of that length:\n\n{table(('model', 'loss', 'loss, trained'), rows)}\n\n"
        f"The gap to the original. {' '.join(words)}"
    )


def written(stage: str) -> str:
    """The name of a stage in words."""
    text, _, sinks = stage.rpartition(", ")
    return f"{text}, no sinks" if sinks == "0" else f"{text}, {sinks} sinks"


def machine(results: dict[str, Any]) -> str:
    """The machine and versions, in a sentence."""
    m = results["machine"]
    return (
        f"{m['date']}, {m['threads']} threads on {m['cores']} cores of {m['cpu']}, kernel for {m['kernel']}, "
        f"qkv {m['qkv']}, torch {m['torch']}."
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
