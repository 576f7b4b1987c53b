"""Writes the page of the study and its figures from the results."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from findings import Sentence, power, sentences
from matplotlib.figure import Figure

from qkv import plots
from qkv.bench.mechanisms import Sizes, mechanisms
from qkv.models.kv_cache_size import readable_bytes

START = "<!-- From here on written by report.py. -->"
PICTURED = Sizes(1, 10, 6, 2, 64, 4, torch.bfloat16, decode=False, backward=False)
"""The sizes of the seven mechanisms in their picture."""
BLUE, VERMILION = "#0072B2", "#D55E00"


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the figures, and the part of the page below START."""
    for name, draw in FIGURES.items():
        with own_style():
            (folder / f"{name}.svg").write_text(plots.svg(draw(results)))
    page = folder / "README.md"
    by_hand, _, _ = page.read_text().partition(START)
    parts = [summary(results), *chapters(results), machine(results)]
    page.write_text("\n\n".join([by_hand + START, *parts]) + "\n")


@contextmanager
def own_style() -> Iterator[None]:
    """The settings that matplotlib comes with and a few of ours, whatever the machine's are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
        yield


def seven(results: dict[str, Any]) -> Figure:
    """Who sees whom, and who shares keys and values, in each mechanism."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    every = mechanisms(PICTURED)
    grid = figure.subplots(2, len(every), height_ratios=[3, 1])
    for n, mechanism in enumerate(every):
        above, below = grid[:, n]
        plots.mask(mechanism.mask, mechanism.num_queries, mechanism.num_keys, offset=mechanism.offset, ax=above)
        plots.groups(mechanism.num_heads, mechanism.num_kv_heads, ax=below)
        above.set_title(mechanism.name, fontweight="bold")
        above.set_xlim(-0.5, PICTURED.length - 0.5)  # as wide for a short context, whose missing keys are not drawn
        above.patch.set_visible(False)
        below.set(xlim=(-0.6, PICTURED.num_heads - 0.4), title=f"{mechanism.num_heads} on {mechanism.num_kv_heads}")
        if n:
            above.set_ylabel("")
            below.set_yticks([])
    return figure


def scale(results: dict[str, Any]) -> Figure:
    """The gradient that reaches scores, and the largest weight, by the width of keys."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    rows = results["scaled dot-product"]["saturation"]
    widths = [row["width"] for row in rows]
    for panel, number, title in zip(
        figure.subplots(1, 2), ("gradient", "largest"), ("gradient at the scores", "largest weight"), strict=True
    ):
        for kind, style, colour in (("scaled", "o-", BLUE), ("unscaled", "s--", VERMILION)):
            label = {"scaled": "divided by the root of d_k", "unscaled": "not divided"}[kind]
            panel.plot(widths, [row[f"{kind}_{number}"] for row in rows], style, color=colour, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(widths, [f"{width:,}" for width in widths])
        panel.set(xlabel="d_k", title=title, ylim=(0, None))
        panel.minorticks_off()
    figure.axes[0].legend(frameon=False)
    return figure


def reach(results: dict[str, Any]) -> Figure:
    """How far layers reach, expected and found."""
    settings = results["settings"]
    found = results["sliding-window"]["reach"]["causal"]["gradients"]
    return plots.reach([settings["window"]] * settings["depth"], measured=found)


def cost(results: dict[str, Any]) -> Figure:
    """Time over the length, and peak memory."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    found = results["sliding-window"]["cost"]
    lengths, (left, right) = found["lengths"], figure.subplots(1, 2)
    kinds = {"window": (f"a window of {results['settings']['long_window']}", "o-", BLUE)}
    kinds["causal"] = ("all earlier keys", "s--", VERMILION)
    for kind, (label, style, colour) in kinds.items():
        times = [each["median_us"] / 1e3 for each in found["time_us"][f"{kind} both"]]
        left.plot(lengths, times, style, color=colour, label=f"{label}: power {power(lengths, times):.2f}")
        peaks = found["peak_bytes"][kind]
        if all(peak is not None for peak in peaks):
            right.plot(lengths, [peak / 2**20 for peak in peaks], style, color=colour, label=label)
    for panel, title in ((left, "ms, forward and backward"), (right, "peak memory, MiB, forward and backward")):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set(xlabel="tokens", title=title)
        panel.legend(frameon=False)
    return figure


def decoding(results: dict[str, Any]) -> Figure:
    """The time of a decoding step over the bytes of keys and values."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel, found = figure.subplots(), results["multi-query"]
    sizes = [size / 2**20 for size in found["cache_bytes"].values()]
    for library, style, colour in (("qkv", "o-", BLUE), ("torch", "s--", VERMILION)):
        times = [each["median_us"] / 1e3 for each in found["step_us"][library].values()]
        panel.plot(sizes, times, style, color=colour, label=library)
    for size, heads in zip(sizes, found["cache_bytes"], strict=True):
        panel.annotate(
            heads, (size, found["step_us"]["qkv"][heads]["median_us"] / 1e3), (4, -11), textcoords="offset points"
        )
    bound = results["limits"]["read_gb_per_s"]
    if bound is not None:
        times = [size * 2**20 / bound / 1e6 for size in sizes]
        panel.plot(sizes, times, ":", color="black", linewidth=1, label=f"memory at {bound:.0f} GB/s")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set(xlabel="MiB of keys and values", ylabel="ms a step", title="A decoding step, by number of KV heads")
    panel.legend(frameon=False)
    return figure


def cache(results: dict[str, Any]) -> Figure:
    """Bytes of caches over the length, by formula, at the sizes of the decoding step."""
    settings = results["settings"]
    heads, dim = settings["decode_heads"], settings["decode_dim"]
    return plots.cache(heads, heads // 4, dim, window=settings["cache_window"], mark=settings["decode_keys"])


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "mechanisms": seven,
    "scale": scale,
    "reach": reach,
    "cost": cost,
    "decoding": decoding,
    "cache": cache,
}


def summary(results: dict[str, Any]) -> str:
    """How many sentences hold, and the picture of all mechanisms."""
    found = sentences(results)
    held = sum(each.holds for each in found)
    words = f"Of {len(found)} sentences, the measurements show {held}."
    failed = [f"{each.mechanism}: {each.says}" for each in found if not each.holds]
    if failed:
        words += " Not shown:\n\n" + "\n".join(f"- {line}" for line in failed)
    return (
        f"{words}\n\n![The seven mechanisms](mechanisms.svg)\n\nAbove, a line a query and a column a key: blue where "
        "the query sees the key, a dot at its own. Below, query heads joined to the KV head that they read."
    )


def chapters(results: dict[str, Any]) -> Iterator[str]:
    """A table of sentences for each mechanism, with what belongs to it."""
    found = sentences(results)
    for name in dict.fromkeys(each.mechanism for each in found):
        rows = [_row(each) for each in found if each.mechanism == name]
        part = f"## {name[0].upper()}{name[1:]}\n\n{table(('the review', 'measured', 'shown'), rows, words=3)}"
        yield "\n\n".join([part, *(extra(results) for extra in EXTRAS.get(name, ()))])


def _row(sentence: Sentence) -> tuple[str, str, str]:
    return sentence.says, sentence.measured, "yes" if sentence.holds else "**no**"


def widths(results: dict[str, Any]) -> str:
    """Saturation by width."""
    rows = [
        (
            f"{row['width']:,}",
            *(
                f"{row[f'{kind}_{number}']:.3f}"
                for kind in ("scaled", "unscaled")
                for number in ("gradient", "largest")
            ),
        )
        for row in results["scaled dot-product"]["saturation"]
    ]
    titles = ("d_k", "gradient", "largest weight", "gradient, not divided", "largest weight, not divided")
    return (
        "![Gradients and weights over the width](scale.svg)\n\nThe gradient of a sum of outputs, with random signs, by "
        f"the {results['settings']['scored']} scores of a query, in the mean over queries; queries, keys and values "
        f"are standard normal.\n\n{table(titles, rows)}"
    )


def layers(results: dict[str, Any]) -> str:
    """Reach by layer."""
    kinds = results["sliding-window"]["reach"]
    rows = [
        (str(n + 1), *(str(kinds[kind][number][n]) for kind in kinds for number in NUMBERS))
        for n in range(results["settings"]["depth"])
    ]
    titles = [f"{kind}: {what}" for kind in kinds for what in NUMBERS.values()]
    return (
        "![Reach by layers](reach.svg)\n\nA token is changed, and hidden states are compared in bits, in fp32, where "
        "small changes far away may be lost beside the residual; gradients are in fp64.\n\n"
        f"{table(('layers', *titles), rows)}"
    )


NUMBERS = {
    "expected": "tokens by the formula",
    "gradients": "with a gradient",
    "bits_inside": "that change, within",
    "bits_outside": "and beyond",
}


def lengths(results: dict[str, Any]) -> str:
    """Time and memory by length."""
    found, s = results["sliding-window"]["cost"], results["settings"]
    rows = []
    for n, length in enumerate(found["lengths"]):
        times = [found["time_us"][f"{kind} {passes}"][n]["median_us"] / 1e3 for kind in KINDS for passes in PASSES]
        peaks = [found["peak_bytes"][kind][n] for kind in KINDS]
        memory = ["not measured" if peak is None else readable_bytes(peak) for peak in peaks]
        rows.append((f"{length:,}", *(f"{time:.1f} ms" for time in times), *memory))
    titles = [f"{kind}, {passes}" for kind in KINDS.values() for passes in PASSES.values()]
    titles += [f"{kind}, peak" for kind in KINDS.values()]
    return (
        f"![Time and memory over the length](cost.svg)\n\n{s['num_heads']} heads of {s['head_dim']}, fp32; medians of "
        f"interleaved rounds, and the growth of a process's peak in one call with gradients. Without a window, memory "
        f"is linear here too, since weights are never written out.\n\n{table(('tokens', *titles), rows)}"
    )


KINDS = {"window": "window", "causal": "all keys"}
PASSES = {"forward": "forward", "both": "with backward"}


def steps(results: dict[str, Any]) -> str:
    """A decoding step by number of KV heads."""
    found, s, bound = results["multi-query"], results["settings"], results["limits"]["read_gb_per_s"]
    rows = []
    for heads, size in found["cache_bytes"].items():
        ours, theirs = (found["step_us"][library][heads]["median_us"] for library in ("qkv", "torch"))
        rate = size / ours / 1e3
        share = "not measured" if bound is None else f"{rate / bound:.0%}"
        rows.append(
            (heads, readable_bytes(size), f"{ours / 1e3:.2f} ms", f"{rate:.1f} GB/s", share, f"{theirs / 1e3:.2f} ms")
        )
    titles = ("KV heads", "keys and values", "step", "read", "of the machine's limit", "step on torch")
    return (
        f"![A decoding step over its bytes](decoding.svg)\n\n{s['decode_heads']} query heads of {s['decode_dim']} on "
        f"{s['decode_keys']:,} keys, bf16; medians of interleaved rounds. Few KV heads may fit into the caches of the "
        f"processor, which are faster than its memory.\n\n{table(titles, rows)}\n\n"
        "![Bytes of caches over the length](cache.svg)"
    )


EXTRAS: dict[str, Sequence[Callable[[dict[str, Any]], str]]] = {
    "scaled dot-product": (widths,),
    "sliding-window": (layers, lengths),
    "multi-query": (steps,),
}


def machine(results: dict[str, Any]) -> str:
    """The machine and versions, in a sentence."""
    m = results["machine"]
    return (
        f"{m['date']}, {m['threads']} threads on {m['cores']} cores of {m['cpu']}, kernel for {m['kernel']}, "
        f"qkv {m['qkv']}, torch {m['torch']}."
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """A Markdown table; the first ``words`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
