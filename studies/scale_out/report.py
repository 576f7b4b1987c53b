"""Writes the page of the study and its figures from the results."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from calls import SCHEMES, sent
from findings import ALIKE, NEAR, busiest, chosen, half, off_line, ratios, times
from matplotlib.figure import Figure
from simulating import HEADS, KV_HEADS, WIDTH, calls_of, costs, line, machines, points, settings_of

from qkv import plots

START = "<!-- From here on written by report.py. -->"
STYLES = {"gather": ("o-", "#0072B2"), "heads": ("s--", "#D55E00"), "merge": ("^-.", "#009E73")}


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the figures, and the part of the page below START."""
    for name, draw in (("links", link_times), ("ranks", many_ranks)):
        with own_style():
            (folder / f"{name}.svg").write_text(plots.svg(draw(results)))
    page = folder / "README.md"
    by_hand, _, _ = page.read_text().partition(START)
    parts = [by_hand + START, wire(results), seconds(results), simulation(results), machine(results)]
    page.write_text("\n\n".join(parts) + "\n")


@contextmanager
def own_style() -> Iterator[None]:
    """The settings that matplotlib comes with and a few of ours, whatever the machine's are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
        yield


def link_times(results: dict[str, Any]) -> Figure:
    """Time over the bytes of the busiest rank, by rate."""
    rates = list(results["measured"]["links"])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for panel, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        found = times(results, rate)
        for scheme, (marks, colour) in STYLES.items():
            of_scheme = {busiest(call) / 1e6: s * 1e3 for call, s in found.items() if call.scheme == scheme}
            panel.plot(of_scheme.keys(), of_scheme.values(), marks[0], color=colour, label=scheme)
        start, bandwidth = line(results, rate)
        ends = 0.0, max(points(results, rate)[0])
        panel.plot([end / 1e6 for end in ends], [(start + end / bandwidth) * 1e3 for end in ends], color="grey", lw=0.8)
        panel.set(title=f"links of {rate} Gbit/s", xlabel="MB that the busiest rank sends or receives", ylabel="ms")
        panel.legend(frameon=False, fontsize="small")
    return figure


def many_ranks(results: dict[str, Any]) -> Figure:
    """Time of a layer over ranks, for a million tokens under a causal mask, by machine."""
    settings, kinds = settings_of(results), machines(results)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for number, scheme in enumerate(SCHEMES):
            marks, colour = STYLES[scheme]
            found = [costs("causal", 10**6, ranks, kind, settings)[number] for ranks in settings.simulated_ranks]
            panel.plot(settings.simulated_ranks, [one.seconds for one in found], marks, color=colour, label=scheme)
            panel.plot(settings.simulated_ranks, [one.sending for one in found], ":", color=colour, lw=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(title=kind.name, xlabel="ranks", ylabel="s a layer")
    panel.legend(frameon=False, fontsize="small")
    return figure


def wire(results: dict[str, Any]) -> str:
    """Bytes against formulas."""
    found = ratios(results)
    worst = max(abs(ratio - 1) for _, ratio in found)
    verdict = "Yes" if worst <= NEAR else "No"
    rows = []
    for (call, ratio), (_, backward) in zip(found, results["measured"]["wire"], strict=True):
        back = "" if backward is None else f"{backward / sum(sent(call)):.3f}"
        numbers = f"{call.tokens:,}", f"{call.heads}/{call.kv_heads}", f"{sum(sent(call)):,.0f}"
        rows.append([call.scheme, call.what, *numbers, f"{ratio:.4f}", back])
    titles = ("scheme", "mask", "tokens", "heads", "bytes by the formula", "forward", "backward")
    s = settings_of(results)
    long, ratio = found[-1]
    boundary = sum(sent(long)) / (s.ranks - 1) / (2 * long.kv_heads * long.width * long.size)
    return (
        f"## Are the formulas what is sent?\n\n**{verdict}**: bytes of a forward pass on the wire differ from the "
        f"formulas by at most {worst:.2%}, headers of packets included. All {s.ranks} ranks together, in fp32; forward "
        "and backward are the bytes on the loopback device over those of the formula of the forward pass. A window of "
        f"{s.window} keys in {long.tokens:,} tokens sends {ratio * boundary:.1f} keys a boundary, where "
        f"{s.window - 1} are seen from the other side.\n\n{table(titles, rows, words=2)}"
    )


def seconds(results: dict[str, Any]) -> str:
    """Times over links."""
    words, picks, rows = [], [], []
    rates = list(results["measured"]["links"])
    for rate in rates:
        start, bandwidth = line(results, rate)
        shares = " and ".join(f"{one:.2f}" for one in half(results, rate))
        words.append(
            f"At {rate} Gbit/s the line is {start * 1e3:.2f} ms and {bandwidth * 8e-9:.2f} Gbit/s, and the farthest "
            f"call {off_line(results, rate):.0%} from it; a causal gather over even runs takes {shares} of the time of "
            "a full one, with half its bytes."
        )
        right = [ratio <= ALIKE for _, _, ratio in chosen(results, rate)]
        picks.append(f"{sum(right)} of {len(right)} at {rate} Gbit/s")
    for call in calls_of(results):
        took = [times(results, rate)[call] * 1e3 for rate in rates]
        rows.append(
            [call.scheme, call.what, f"{call.heads}/{call.kv_heads}", f"{busiest(call) / 1e6:.2f}",
             *(f"{one:.1f}" for one in took)]
        )  # fmt: skip
    titles = ("scheme", "mask", "heads", "MB of the busiest rank", *(f"ms, {rate} Gbit/s" for rate in rates))
    gain = ""
    if len(rates) > 1:
        ratio = median(times(results, rates[0])[call] / times(results, rates[-1])[call] for call in calls_of(results))
        gain = f" From {rates[0]} to {rates[-1]} Gbit/s, calls become {ratio:.1f} times as fast in the median."
    return (
        "## Does time follow bytes?\n\nExchanges alone, attention replaced by zeros; the slowest rank of the fastest "
        f"of {results['settings']['repeats']} calls, over the bytes of the rank that sends or receives most. "
        f"{busy(results)}{' '.join(words)}{gain} The scheme whose busiest rank moves least is the fastest, or takes at "
        f"most {ALIKE} times as long, in {', '.join(picks)}.\n\n![Times over bytes](links.svg)\n\n"
        f"{table(titles, rows, words=2)}"
    )


def busy(results: dict[str, Any]) -> str:
    """What must be said of times that were measured while others computed."""
    load, cores = results["load"], results["machine"]["cores"]
    if load <= cores:
        return ""
    return (
        f"**The machine was busy**: its load average was {load:.0f} on {cores} cores, so these times, and the links of "
        "the simulation, are those of ranks that wait for a processor; `run.py` replaces them on an idle one. "
    )


def simulation(results: dict[str, Any]) -> str:
    """Which scheme, for many ranks."""
    settings, parts = settings_of(results), []
    for kind in machines(results):
        rows = []
        for mask in ("causal", "window"):
            for tokens in settings.simulated_tokens:
                cells = []
                for ranks in settings.simulated_ranks:
                    found = [one for one in costs(mask, tokens, ranks, kind, settings) if one.fits]
                    best = min(found, key=lambda one: one.seconds, default=None)
                    share = best and best.sending / best.seconds
                    cells.append(f"{best.scheme} {length(best.seconds)}, {share:.0%}" if best else "none fits")
                rows.append([mask, f"{tokens:.0e}".replace("e+0", "e"), *cells])
        titles = ("mask", "tokens", *(f"{ranks} ranks" for ranks in settings.simulated_ranks))
        speed = f"{kind.operations:.2g} operations and {kind.bandwidth:.2g} bytes a second"
        parts.append(f"{kind.name[0].upper()}{kind.name[1:]}, {speed}:\n\n{table(titles, rows, words=2)}")
    return (
        f"## Many ranks\n\nBy simulation: a forward pass of one layer, {HEADS} heads of width {WIDTH} on {KV_HEADS} KV "
        "heads, in 16 bits; zigzag under the causal mask, even under a window of "
        f"{settings.simulated_window:,}. The fastest scheme of those whose buffers fit "
        f"({', '.join(memories(results))}), "
        "its time, and the share of it that is sending: the busiest rank sends or receives, then the busiest computes, "
        "and nothing overlaps.\n\n" + "\n\n".join(parts) + "\n\nOf 10^6 tokens under the causal mask, all schemes, "
        "whether they fit or not; sending dotted:\n\n![Time over ranks](ranks.svg)"
    )


def memories(results: dict[str, Any]) -> list[str]:
    """The memory of the machines, in words."""
    return list(
        dict.fromkeys(f"{kind.memory / 1e9:.0f} GB of {kind.name.partition(',')[0]}" for kind in machines(results))
    )


def length(seconds: float) -> str:
    """A time in a unit that suits it."""
    for limit, unit, size in ((1e-3, "µs", 1e-6), (1.0, "ms", 1e-3), (3600.0, "s", 1.0), (86400.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.0f} d"


def machine(results: dict[str, Any]) -> str:
    """The machine and versions, in a sentence."""
    m = results["machine"]
    return (
        f"{m['date']}, {m['cores']} cores of {m['cpu']} for all ranks, kernel for {m['kernel']}, qkv {m['qkv']}, "
        f"torch {m['torch']}."
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
