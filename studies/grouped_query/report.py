"""The page of the study and its figure, from what was measured."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from findings import SUPPOSED, Findings, of, verdict

from qkv.models.kv_cache_size import readable_bytes

START = "<!-- From here on written by report.py. -->"
FIGURE = "loss.svg"
COLOURS = {"mean": "#1f5fa8", "first": "#e07b39", "random": "#8c8c8c", "aligned": "#7a9e7e"}

plt.switch_backend("svg")
plt.rcParams.update(
    {
        "svg.hashsalt": "qkv",  # The same numbers give the same file.
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the figure, and the page below what people wrote of it."""
    findings = Findings(results)
    draw(findings, folder / FIGURE)
    page = folder / "README.md"
    by_hand, _, _ = page.read_text().partition(START)
    parts = [sizes(results), answers(findings), numbers(findings), speed(results), machine(results)]
    page.write_text("\n\n".join([by_hand + START, *parts]) + "\n")


def draw(findings: Findings, path: Path) -> None:
    """The gaps over uptraining: a panel for each number of heads, a line for each method, its spread over the seeds."""
    percents = findings.percents
    useless = [findings.pairs_loss - mean(findings.multi_head_loss(percent)) for percent in percents]
    figure, panels = plt.subplots(
        1, len(findings.num_kv_heads), figsize=(10, 4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, heads in zip(panels[0], findings.num_kv_heads, strict=True):
        for how in findings.methods:
            gaps = [findings.gap(heads, how, percent) for percent in percents]
            colour = COLOURS[how]
            panel.plot(percents, list(map(mean, gaps)), marker="o", markersize=3, color=colour, label=how)
            panel.fill_between(
                percents, list(map(min, gaps)), list(map(max, gaps)), color=colour, alpha=0.2, linewidth=0
            )
        panel.plot(percents, useless, color="black", linewidth=0.8, linestyle=":", label="counted pairs of tokens")
        # A converted model may do better than the multi-head model, which a logarithm could not show.
        panel.set_yscale("symlog", linthresh=0.01)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title("1 KV head" if heads == 1 else f"{heads} KV heads")
        panel.set(xticks=percents, xlabel="uptraining, % of the steps")
    panels[0][0].set_ylabel("nats a token above the multi-head model")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(handles), frameon=False, loc="outside upper center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def sizes(results: dict[str, Any]) -> str:
    """What was trained, in a paragraph."""
    s, text = results["settings"], results["text"]
    tokens = s["steps"] * s["batch"] * s["length"]
    return (
        f"## What was trained\n\n{len(s['seeds'])} seeds; {s['num_layers']} layers of {s['num_heads']} heads of width "
        f"{s['head_dim']}, {s['vocabulary']} tokens of vocabulary; {s['steps']:,} steps of {s['batch']} sequences of "
        f"{s['length']} tokens, which is {tokens / text['train_tokens']:.1f} times the {text['train_tokens']:,} tokens "
        f"of the training text. {text['held_out_tokens']:,} tokens are held out. The loss is in nats a token; brackets "
        "hold the least and the most over the seeds."
    )


def answers(findings: Findings) -> str:
    """The paper's claims and what was found, claim by claim."""
    parts = ["## What the paper says, and what came out", *methods(findings), *at_once(findings), *uptraining(findings)]
    return "\n\n".join(parts)


def methods(findings: Findings) -> list[str]:
    """Which method is better."""
    after, order = findings.percents[1], " < ".join(SUPPOSED)
    every, own_case = findings.better(SUPPOSED, after), findings.better(SUPPOSED, after, [1])
    orders = [*pairwise(SUPPOSED), SUPPOSED, ("aligned", "mean")]
    rows = ([" < ".join(o), *(of(findings.better(o, percent)) for percent in findings.percents)] for o in orders)
    words = (
        f"**{order}?** {verdict(every)} comparisons of losses after {after}% of uptraining, one for each seed and "
        f"number of KV heads. The paper compares the methods for multi-query attention: there in {of(own_case)} seeds."
    )
    return [words, table(["loss", *titles(findings)], rows)]


def at_once(findings: Findings) -> list[str]:
    """What works without uptraining."""
    first, after = findings.percents[:2]

    def works(heads: int, percent: int) -> list[bool]:
        return [kept > 0.5 for kept in findings.kept(heads, "mean", percent)]

    grouped = [each for heads in findings.num_kv_heads if heads > 1 for each in works(heads, first)]
    only_later = [later and not now for now, later in zip(works(1, first), works(1, after), strict=True)]
    words = (
        f"**Does grouped-query attention work at once?** {verdict(grouped)} comparisons. A model works, we say, if it "
        "keeps more than half of what the multi-head model gains over counted pairs of tokens, whose loss is "
        f"{findings.pairs_loss:.3f}. **And multi-query attention after {after}% only?** {verdict(only_later)} seeds. "
        "Both are about mean pooling. Of that gain is kept (less than nothing is worse than counted pairs):"
    )
    return [words, by_percent(findings, ("mean", "aligned"), findings.kept, "{:.0%}")]


def uptraining(findings: Findings) -> list[str]:
    """What a little training gives back."""
    after, later = findings.percents[1:]
    shares = [
        share
        for heads in findings.num_kv_heads
        for share in zip(findings.closed(heads, "mean", after), findings.closed(heads, "mean", later), strict=True)
    ]
    words = (
        f"**Does {after}% close most of the gap?** {verdict([share > 0.5 for share, _ in shares])} comparisons: more "
        "than half of the gap that mean pooling leaves to the multi-head model after as much more training. **Do the "
        f"next {later - after}% add less?** {verdict([both - share < share for share, both in shares])} comparisons. "
        "Of the gap is closed:"
    )
    return [words, by_percent(findings, ("mean", "aligned"), findings.closed, "{:.0%}")]


def numbers(findings: Findings) -> str:
    """Every loss, and its gap to the multi-head model."""
    multi_head = [str(findings.multi_head), "-", *(spread(findings.multi_head_loss(p)) for p in findings.percents)]
    return "\n\n".join(
        [
            f"## All losses\n\n![Gaps over uptraining]({FIGURE})",
            f"Losses; {findings.multi_head} KV heads are the multi-head model itself, trained on:",
            by_percent(findings, findings.methods, findings.loss, first=[multi_head]),
            "Gaps to the multi-head model of the same seed after as much more training:",
            by_percent(findings, findings.methods, findings.gap),
        ]
    )


def speed(results: dict[str, Any]) -> str:
    """Time and bytes of decoding."""
    steps, context = results["decoding"], results["settings"]["context"]
    most = next(iter(steps.values()))
    rows = (
        [
            heads,
            f"{step['median_us'] / 1e3:.2f} ms",
            f"{step['low_us'] / 1e3:.2f} to {step['high_us'] / 1e3:.2f} ms",
            f"{most['median_us'] / step['median_us']:.2f}",
            readable_bytes(step["kv_bytes_per_token"]),
            readable_bytes(step["kv_bytes_per_token"] * context),
        ]
        for heads, step in steps.items()
    )
    columns = ["KV heads", "a step", "quartiles", "times as fast", "KV cache of a token", f"of {context:,} tokens"]
    return (
        f"## Decoding\n\nA step of the attention layers, projections included, in fp32, with {context:,} tokens in the "
        f"caches; medians of rounds in which the models take turns.\n\n{table(columns, rows)}"
    )


def machine(results: dict[str, Any]) -> str:
    """What was measured on, in a sentence."""
    m = results["machine"]
    return (
        f"{m['date']}, {m['threads']} threads on {m['cores']} cores of {m['cpu']}, kernel for {m['kernel']}, "
        f"qkv {m['qkv']}, torch {m['torch']}."
    )


def by_percent(
    findings: Findings,
    methods: Iterable[str],
    value: Callable[[int, str, int], list[float]],
    form: str = "{:.3f}",
    first: Sequence[list[str]] = (),
) -> str:
    """A table of a number after each share of uptraining, for every number of heads and these methods."""
    rows = [
        [str(heads), how, *(spread(value(heads, how, percent), form) for percent in findings.percents)]
        for heads, how in product(findings.num_kv_heads, methods)
    ]
    return table(["KV heads", "method", *titles(findings)], [*first, *rows], words=2)


def titles(findings: Findings) -> list[str]:
    """Of the columns for each share of uptraining."""
    return [f"{percent}%" for percent in findings.percents]


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """The mean, the least and the most."""
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; the first columns are words, the others numbers."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
