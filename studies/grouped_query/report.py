"""Writes the page of the study and its figure from the results."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from findings import PAPER_ORDER, Findings, of, verdict

from qkv.models.kv_cache_size import readable_bytes

START = "<!-- From here on written by report.py. -->"
FIGURE = "loss.svg"
COLOURS = {"mean": "#1f5fa8", "first": "#e07b39", "random": "#8c8c8c", "aligned": "#7a9e7e"}

STYLE = {
    "svg.hashsalt": "qkv",  # The same numbers give the same file.
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

plt.switch_backend("svg")


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the figure, and the part of the page below START."""
    findings = Findings(results)
    with plt.rc_context(STYLE):
        draw(findings, folder / FIGURE)
    page = folder / "README.md"
    by_hand, _, _ = page.read_text().partition(START)
    parts = [sizes(results), answers(findings), numbers(findings), speed(results), machine(results)]
    page.write_text("\n\n".join([by_hand + START, *parts]) + "\n")


def draw(findings: Findings, path: Path) -> None:
    """Plots gaps over uptraining: one panel per number of heads, one line per method with its range over seeds."""
    percents = findings.percents
    bigram = [findings.bigram_loss - mean(findings.multi_head_loss(percent)) for percent in percents]
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
        panel.plot(percents, bigram, color="black", linewidth=0.8, linestyle=":", label="bigram model")
        # symlog, since gaps can be negative.
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
    """The sizes of model and training, in a paragraph."""
    s, text = results["settings"], results["text"]
    tokens = s["steps"] * s["batch"] * s["length"]
    return (
        f"## What was trained\n\n{len(s['seeds'])} seeds; {s['num_layers']} layers of {s['num_heads']} heads of width "
        f"{s['head_dim']}, {s['vocabulary']} tokens of vocabulary; {s['steps']:,} steps of {s['batch']} sequences of "
        f"{s['length']} tokens, which is {tokens / text['train_tokens']:.1f} times the {text['train_tokens']:,} tokens "
        f"of the training text. {text['held_out_tokens']:,} tokens are held out. Losses are in nats per token, "
        "with minimum and maximum over the seeds in brackets."
    )


def answers(findings: Findings) -> str:
    """The paper's claims and our results, claim by claim."""
    parts = ["## The paper's claims, and our results", *methods(findings), *at_once(findings), *uptraining(findings)]
    return "\n\n".join(parts)


def methods(findings: Findings) -> list[str]:
    """Compares the pooling methods."""
    after, order = findings.percents[1], " < ".join(PAPER_ORDER)
    every, own_case = findings.better(PAPER_ORDER, after), findings.better(PAPER_ORDER, after, [1])
    orders = [*pairwise(PAPER_ORDER), PAPER_ORDER, ("aligned", "mean")]
    rows = ([" < ".join(o), *(of(findings.better(o, percent)) for percent in findings.percents)] for o in orders)
    words = (
        f"**{order}?** {verdict(every)} comparisons of losses after {after}% of uptraining, one for each seed and "
        f"number of KV heads. For multi-query attention, the case of the paper: in {of(own_case)} seeds."
    )
    return [words, table(["loss", *titles(findings)], rows)]


def at_once(findings: Findings) -> list[str]:
    """Evaluates models without uptraining."""
    first, after = findings.percents[:2]

    def works(heads: int, percent: int) -> list[bool]:
        return [kept > 0.5 for kept in findings.kept(heads, "mean", percent)]

    grouped = [each for heads in findings.num_kv_heads if heads > 1 for each in works(heads, first)]
    only_later = [later and not now for now, later in zip(works(1, first), works(1, after), strict=True)]
    words = (
        f"**Does grouped-query attention work at once?** {verdict(grouped)} comparisons. A model counts as working "
        "if it keeps more than half of the multi-head model's advantage over a bigram model, whose loss is "
        f"{findings.bigram_loss:.3f}. **And multi-query attention after {after}% only?** {verdict(only_later)} seeds. "
        "Both are for mean pooling. Share of the advantage that is kept (negative: worse than the bigram model):"
    )
    return [words, by_percent(findings, ("mean", "aligned"), findings.kept, "{:.0%}")]


def uptraining(findings: Findings) -> list[str]:
    """Evaluates how much uptraining recovers."""
    after, later = findings.percents[1:]
    shares = [
        share
        for heads in findings.num_kv_heads
        for share in zip(findings.closed(heads, "mean", after), findings.closed(heads, "mean", later), strict=True)
    ]
    words = (
        f"**Does {after}% close most of the gap?** {verdict([share > 0.5 for share, _ in shares])} comparisons: more "
        "than half of the gap between mean pooling and the equally trained multi-head model. **Do the "
        f"next {later - after}% add less?** {verdict([both - share < share for share, both in shares])} comparisons. "
        "Share of the gap that is closed:"
    )
    return [words, by_percent(findings, ("mean", "aligned"), findings.closed, "{:.0%}")]


def numbers(findings: Findings) -> str:
    """All losses, and all gaps to the multi-head model."""
    multi_head = [str(findings.multi_head), "-", *(spread(findings.multi_head_loss(p)) for p in findings.percents)]
    return "\n\n".join(
        [
            f"## All losses\n\n![Gaps over uptraining]({FIGURE})",
            f"Losses; {findings.multi_head} KV heads: the multi-head model, trained for as many additional steps.",
            by_percent(findings, findings.methods, findings.loss, first=[multi_head]),
            "Gaps to the equally trained multi-head model of the same seed:",
            by_percent(findings, findings.methods, findings.gap),
        ]
    )


def speed(results: dict[str, Any]) -> str:
    """Time of a decoding step and cache size."""
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
    columns = ["KV heads", "step", "quartiles", "speedup", "KV cache per token", f"for {context:,} tokens"]
    return (
        f"## Decoding\n\nOne step of the attention layers with projections, in fp32, with {context:,} cached tokens; "
        f"medians of interleaved rounds.\n\n{table(columns, rows)}"
    )


def machine(results: dict[str, Any]) -> str:
    """The machine and versions, in a sentence."""
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
    """A table of ``value`` by percent of uptraining, with a row per number of heads and method."""
    rows = [
        [str(heads), how, *(spread(value(heads, how, percent), form) for percent in findings.percents)]
        for heads, how in product(findings.num_kv_heads, methods)
    ]
    return table(["KV heads", "method", *titles(findings)], [*first, *rows], words=2)


def titles(findings: Findings) -> list[str]:
    """Column titles: percent of uptraining."""
    return [f"{percent}%" for percent in findings.percents]


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean, minimum and maximum."""
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
