"""Writes a page of tables and plots for each processor from its folder in benchmarks/results.

python benchmarks/page.py
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grid import describe
from harness import machine as machines
from harness.limits import Limits
from harness.measurement import OURS, Measurement
from harness.peers import PEERS
from harness.plots import plot_grid, plot_rates
from kernel import skips

from qkv.bench.report import readable_time

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
START, END = "<!-- From here on written by page.py. -->", "<!-- To here. -->"


def load(folder: Path, name: str) -> Any:
    """The results of one benchmark; None where it was not measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 3) -> str:
    """A Markdown table; the first ``words`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def machine(record: Any) -> str:
    """The machine and versions, in a sentence."""
    m = record["machine"]
    kernel = f", kernel for {m['kernel']}" if "kernel" in m else ""
    peers = "".join(f", {name} {m[name]}" for name in ("onnxruntime", "openvino") if name in m)
    return (
        f"{m['date']}, {m['threads']} threads on {m['cores']} cores of {m['cpu']}{kernel}, "
        f"qkv {m['qkv']}, torch {m['torch']}{peers}."
    )


def limits(bounds: Limits) -> str:
    """The limits of the machine, in a sentence."""
    parts = {"fp32_gflops": "{} GF/s in fp32", "bf16_gflops": "{} GF/s in bf16", "read_gb_per_s": "{} GB/s read"}
    known = [words.format(bounds[name]) for name, words in parts.items() if bounds[name] is not None]  # type: ignore[literal-required]
    return f"Limits of the machine: {', '.join(known) or 'not measured'}."


def share_of_reading(rate: float, row: dict[str, Any], bounds: Limits) -> str:
    """A rate beside that of reading memory in turns with it; in older results, beside the limit of the run."""
    read = row.get("reading_gb_per_s", bounds["read_gb_per_s"])
    return "-" if read is None else f"{rate / read:.0%}"


def rates(rows: list[Measurement], bounds: Limits) -> str:
    """A table with a row for each case and dtype."""
    unit = "GB/s" if rows[0].case.is_decoding else "GF/s"
    present = [peer.NAME for peer in PEERS if any(peer.NAME in row.times for row in rows)]
    titles = ["case", "dtype", "backend", OURS, "quartiles", unit, "of the limit", *present]
    return table(titles, (_cells(row, bounds, present) for row in rows))


def _cells(row: Measurement, bounds: Limits, peers: list[str]) -> list[str]:
    time, share = row.times[OURS], row.share(bounds)
    ratios = [row.ratio(peer) for peer in peers]
    return [
        row.case.name,
        row.dtype,
        str(row.backend),
        readable_time(time["median_us"]),
        f"{readable_time(time['low_us'])} to {readable_time(time['high_us'])}",
        f"{row.rate(OURS):.0f}",
        "-" if share is None else f"{share:.0%}",
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
    ]


def kernel_section(folder: Path) -> list[str]:
    """Every case against every peer."""
    record = load(folder, "kernel")
    if record is None:
        return []
    rows = [Measurement.from_json(fields) for fields in record["measurements"]]
    bounds: Limits = record["limits"]
    kinds = {
        "Forward": [row for row in rows if row.case.lq > 128 and not row.case.backward],
        "Forward and backward": [row for row in rows if row.case.backward],
        "Decoding": [row for row in rows if row.case.is_decoding],
        "Short calls": [row for row in rows if 1 < row.case.lq <= 128],
    }
    parts = [f"## Against its peers\n\n{machine(record)} {limits(bounds)} Peers: their time relative to qkv."]
    for title, kind in kinds.items():
        parts.append(f"### {title}")
        if title != "Short calls":  # Their rates are meaningless; the ratios are in the table.
            name = title.lower().replace(" ", "-")
            plot_rates(kind, bounds, folder / "plots" / f"{name}.svg")
            parts.append(f"![{title}](plots/{name}.svg)")
        parts.append(rates(kind, bounds))
    return [*parts, "Not measured:", "\n".join(f"- {reason}" for reason in skips(rows))]


def grid_section(folder: Path) -> list[str]:
    """Summary of the random shapes, and a list of those where torch is faster."""
    record = load(folder, "grid")
    if record is None:
        return []
    rows = [Measurement.from_json(fields) for fields in record["measurements"]]
    plot_grid(rows, folder / "plots" / "grid.svg")
    slow = [row for row in rows if (row.ratio("torch") or 0) < record["slow"]]
    words = f"{len(slow)} of {len(rows)} take more than 1 / {record['slow']} of torch's time."
    mean = f"torch takes {record['geometric_mean']:.2f} times as long in the geometric mean; {words}"
    parts = [f"## A hundred random shapes\n\n{machine(record)}", f"![Random shapes](plots/grid.svg)\n\n{mean}"]
    return [*parts, "```\n" + "\n".join(map(describe, slow)) + "\n```"] if slow else parts


def avx2_section(folder: Path) -> list[str]:
    """Both libraries restricted to AVX2."""
    record = load(folder, "avx2")
    if record is None:
        return []
    rows = [Measurement.from_json(fields) for fields in record["measurements"]]
    return [f"## Restricted to AVX2\n\n{machine(record)} {limits(record['limits'])}", rates(rows, record["limits"])]


def interleaved_section(folder: Path) -> list[str]:
    """Attention between matrix products."""
    record = load(folder, "interleaved")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        alone, between, read = (found["median_us"] for found in row["times"].values())
        return [
            row["case"],
            row["dtype"],
            row["library"],
            *map(readable_time, (alone, between)),
            f"{between / alone:.2f}",
            readable_time(read),
            f"{between / read:.2f}",
        ]

    titles = ["case", "dtype", "library", "alone", "between products", "ratio", "after reading", "ratio"]
    return [f"## Between matrix products\n\n{machine(record)}", table(titles, map(cells, record["measurements"]))]


def overhead_section(folder: Path) -> list[str]:
    """The cost of a call, long windows and the import."""
    record = load(folder, "overhead")
    if record is None:
        return []
    calls = [
        (
            name,
            mode,
            readable_time(times["median_us"]),
            f"{readable_time(times['low_us'])} to {readable_time(times['high_us'])}",
        )
        for mode, rows in (*record["call"].items(), ("kernel that does nothing", record.get("entry points", {})))
        for name, times in rows.items()
    ]
    windows = [
        (f"{row['length']} tokens", "forward and backward", f"{row['seconds']:.2f} s", f"{row['peak_gib']:.2f} GiB")
        for row in record["window"]
    ]
    return [
        f"## The cost of a call\n\n{machine(record)} 8 heads of 64 on 16 tokens; layers of width 64.",
        table(["call", "mode", "time", "quartiles"], calls, words=2),
        "### Sliding windows of 512, a layer of 8 heads of 64",
        table(["text", "passes", "time", "peak of the process"], windows, words=2),
        f"`import qkv` takes {record['import']['median_seconds'] * 1e3:.0f} ms after `import torch`.",
    ]


def against(run: dict[str, float], kind: str) -> tuple[str, str]:
    """The time of an encoder, and the time on transformers' attention relative to it."""
    return (f"{run[kind]:.0f} ms", f"{run['transformers'] / run[kind]:.2f}") if kind in run else ("", "")


def models_section(folder: Path) -> list[str]:
    """Real models on the attention and cache of transformers, and on qkv's."""
    record = load(folder, "models")
    if record is None:
        return []
    decoders = [
        (
            dtype,
            kind,
            f"{run['prefill_seconds']:.2f} s",
            f"{run['step_ms']:.1f} ms",
            f"{run['peak_mib']:.0f} MiB",
            f"{run['perplexity']:.3f}" if "perplexity" in run else "-",
        )
        for dtype in ("float32", "bfloat16")
        for kind, run in record[f"decoder, {dtype}"].items()
    ]
    encoders = [
        (name, f"{run['transformers']:.0f} ms", *against(run, "qkv"), *against(run, "qkv, unpadded"))
        for name, run in record["encoder"].items()
    ]
    what = (
        "transformers: its sdpa and default cache. Memory: peak of prefill and 24 steps above the loaded model, median "
        "of three processes, which vary a lot. Perplexity: on 16,384 tokens of Shakespeare in chunks of 2048."
    )
    return [
        f"## Models\n\n{machine(record)}",
        "### SmolLM2-135M-Instruct, 4096 tokens of context",
        table(["dtype", "attention and cache", "prefill", "a step", "peak memory", "perplexity"], decoders, 2),
        what,
        "### all-MiniLM-L6-v2",
        table(
            ["texts", "transformers", "qkv", "transformers / qkv", "unpadded", "transformers / unpadded"],
            encoders,
            words=1,
        ),
        "Sentences are in batches of 32, a third of which is padding; texts have no padding.",
    ]


def layer_section(folder: Path) -> list[str]:
    """Cache update and attention of one layer."""
    record = load(folder, "layer")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        times = [readable_time(row["times"][part]["median_us"]) for part in ("update", "attention", "both")]
        return [row["dtype"], row["where"], row["kind"], *times]

    titles = ["dtype", "where", "attention and cache", "update", "attention", "both"]
    return [
        f"### A layer of SmolLM2-135M in decoding, 4096 tokens of context\n\n{machine(record)}",
        table(titles, map(cells, record["measurements"])),
    ]


def linear_section(folder: Path) -> list[str]:
    """Few rows through a linear layer."""
    record = load(folder, "linear")
    if record is None:
        return []
    by_weight: dict[tuple[str, int, int], list[Any]] = {}
    for row in record["measurements"]:
        by_weight.setdefault((row["dtype"], row["columns"], row["features"]), []).append(row)
    counts = [row["rows"] for row in next(iter(by_weight.values()))]
    rows = [
        (
            dtype,
            f"{columns} x {features}",
            *(f"{row['gb_per_s']:.1f} ({row['ratio']:.2f}, {row['ratio of the call']:.2f})" for row in found),
        )
        for (dtype, columns, features), found in by_weight.items()
    ]
    bounds: Limits = record["limits"]
    what = (
        "GB/s of weights, read from memory; in brackets, the time of `F.linear` relative to it. Columns are rows of x."
    )
    return [
        f"## Few rows through a linear layer\n\n{machine(record)} {limits(bounds)} {what}",
        table(["dtype", "weight", *map(str, counts)], rows, words=2),
    ]


def sequences_section(folder: Path) -> list[str]:
    """Packed sequences and pages."""
    record = load(folder, "sequences")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        ours = row["times"][OURS]["median_us"]
        peers = (f"{name} {found['median_us'] / ours:.2f}" for name, found in row["times"].items() if name != OURS)
        return [row["case"], row["dtype"], readable_time(ours), "; ".join(peers)]

    return [
        f"## Packed sequences and pages\n\n{machine(record)} Decoding has 32 heads on 8 of 128, packed texts 12 of 64.",
        table(["case", "dtype", OURS, "times as long"], map(cells, record["measurements"]), words=2),
    ]


def step_section(folder: Path) -> list[str]:
    """Whole layers."""
    record = load(folder, "step")
    if record is None:
        return []
    bounds: Limits = record["limits"]

    def of_steps(row: Any) -> list[str]:
        width, heads, kv_heads = row["layer"]
        share = share_of_reading(row["gb_per_s"], row, bounds)
        time = readable_time(row["times"]["step"]["median_us"])
        return [f"{width}, {heads} on {kv_heads}", row["dtype"], time, f"{row['gb_per_s']:.1f}", share]

    def beside(row: Any, what: str) -> list[str]:
        (ours, found), *others = row["times"].items()
        peers = (f"{name} {time['median_us'] / found['median_us']:.2f}" for name, time in others)
        return [what, row["dtype"], ours, readable_time(found["median_us"]), "; ".join(peers)]

    rows = [beside(row, f"a step of (512, 8 on 2), {row['tokens']} tokens behind it") for row in record["by_hand"]]
    rows += [beside(row, "16 tokens of (64, 8)") for row in record["short"]]
    rows += [beside(row, "2048 tokens of (2048, 32 on 8)") for row in record["forward"]]
    what = "A step with 4096 tokens behind it, in GB/s of weights and cache; few MB stay in the last-level cache."
    return [
        f"## Whole layers\n\n{machine(record)} {limits(bounds)} {what}",
        table(["layer", "dtype", "step", "GB/s", "of reading"], map(of_steps, record["steps"]), words=2),
        table(["case", "dtype", "of", "time", "times as long"], rows, words=3),
    ]


def one_line_section(folder: Path) -> list[str]:
    """Models before and after `qkv.accelerate`."""
    record = load(folder, "one_line")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        theirs, ours = row["seconds"]["transformers"], row["seconds"]["accelerated"]
        times = [readable_time(ours[part] * 1e6) for part in ("prefill", "step")]
        ratios = [f"{theirs[part] / ours[part]:.2f}" for part in ("prefill", "step")]
        rate = row["step_bytes"] / ours["step"] / 1e9
        share = share_of_reading(rate, row, record["limits"])
        case = [row["model"], row["dtype"], str(row["tokens"])]
        return [*case, times[0], ratios[0], times[1], ratios[1], f"{rate:.1f}", share]

    def encoder_cells(row: Any) -> list[str]:
        times = row["seconds"]
        stock = times["transformers"]
        ours = [f"{stock / times[kind]:.2f}" for kind in ("accelerated", "accelerated, unpadded")]
        return [row["model"], row["dtype"], f"{row['padding']:.0%}", readable_time(stock * 1e6), *ours]

    late = "transformers, times as long"
    titles = ["model", "dtype", "prompt", "prefill", late, "step", late, "GB/s", "of reading"]
    what = "Random weights. A step in GB/s of weights and cache."
    parts = [
        f"## `qkv.accelerate(model)`\n\n{machine(record)} {limits(record['limits'])} {what}",
        table(titles, map(cells, record["measurements"]), words=2),
    ]
    titles = ["model", "dtype", "padding", "transformers", "times as fast", "times as fast, `unpad=True`"]
    encoders = [table(titles, map(encoder_cells, record["encoders"]), words=2)] if record["encoders"] else []
    return [*parts, *encoders]


def llamacpp_section(folder: Path) -> list[str]:
    """A model on llama.cpp and accelerated."""
    record = load(folder, "llamacpp")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        ours, peers = row["seconds"]["qkv"], [times for name, times in row["seconds"].items() if name != "qkv"]
        found = [row["dtype"], str(row["tokens"])]
        for part in ("prefill", "step"):
            best = min(times[part] for times in peers)
            found += [readable_time(ours[part] * 1e6), f"{best / ours[part]:.2f}"]
        return [*found, f"{row['difference']:.1e}"]

    version = f"llama-cpp-python {record['llama_cpp_python']}"
    titles = [
        "dtype",
        "prompt",
        "prefill",
        "llama.cpp, times as long",
        "step",
        "llama.cpp, times as long",
        "difference",
    ]
    what = f"{version}, the better of flash attention on and off. Difference: of logits, relative to their norm."
    return [
        f"## SmolLM2-135M-Instruct beside llama.cpp\n\n{machine(record)} {limits(record['limits'])} {what}",
        table(titles, map(cells, record["measurements"]), words=1),
    ]


def compiled_section(folder: Path) -> list[str]:
    """Steps under torch.compile."""
    record = load(folder, "compiled")
    if record is None:
        return []

    def cells(name: str, ways: Any) -> list[str]:
        steps = [f"{found['step'] * 1e3:.1f} ms" for found in ways.values()]
        return [name, *steps, *(f"{found['first text']:.0f} s" for way, found in ways.items() if "compiled" in way)]

    titles = ["model", "transformers", "compiled", "qkv", "compiled", "compiling transformers", "compiling qkv"]
    what = (
        "A step with 64 to 88 tokens behind it. Compiled: transformers with its static cache, and after `accelerate`."
    )
    return [
        f"## Steps under torch.compile\n\n{machine(record)} {what}",
        table(titles, (cells(name, ways) for name, ways in record["results"].items()), words=1),
    ]


def training_section(folder: Path) -> list[str]:
    """A small GPT on both attentions."""
    record = load(folder, "train_gpt")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        rates = [row["tokens"] / row["seconds"][peer] for peer in ("torch", "qkv")]
        losses = [f"{row[kind][peer]:.4f}" for kind in ("loss", "held_out") for peer in ("torch", "qkv")]
        return [
            row["dtype"],
            str(row["steps"]),
            *(f"{rate:,.0f}" for rate in rates),
            f"{rates[1] / rates[0]:.2f}",
            *losses,
        ]

    titles = ["dtype", "steps", "torch", "qkv", "times as fast"]
    titles += [f"{kind}, {peer}" for kind in ("last loss", "held out") for peer in ("torch", "qkv")]
    what = "Tokens a second, the whole step with the optimizer; losses in nats a byte. 6 layers of 384, 16 x 256 bytes."
    return [
        f"## Training a small GPT\n\n{machine(record)} {what}",
        table(titles, map(cells, record["measurements"]), words=1),
    ]


def rotary_section(folder: Path) -> list[str]:
    """Rotary embedding, alone and in a layer."""
    record = load(folder, "rotary")
    if record is None:
        return []

    def cells(what: str, times: Any) -> list[str]:
        return [what, *(readable_time(times[way]["median_us"]) for way in ("by hand", "operators", "kernel"))]

    parts = [(f"rotation, {name}", times) for name, times in record["rotation alone"].items()]
    parts += [(f"a step with {name}", times) for name, times in record["step"].items()]
    parts.append(("a prompt of 2048 tokens", record["prefill of 2048"]))
    what = "The first layer of the README, fp32. By hand: torch's SDPA, with tables made once. Operators: torch's."
    return [
        f"## Rotary embedding\n\n{machine(record)} {what}",
        table(["case", "by hand", "operators", "kernel"], (cells(*part) for part in parts), words=1),
    ]


def latent_section(folder: Path) -> list[str]:
    """Steps of latent attention."""
    record = load(folder, "latent")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        theirs, ours, attention = (times["median_us"] for times in row["times"].values())
        found = [readable_time(time) for time in (ours, attention, theirs)]
        return [row["dtype"], *found, f"{theirs / ours:.0f}", f"{row['read_gb_per_s']:.1f}"]

    titles = ["dtype", "step", "attention of it", "transformers", "times as long", "GB/s of latents"]
    what = "Sizes of DeepSeek-V2-Lite, 4096 tokens in the cache."
    return [
        f"## A step of latent attention\n\n{machine(record)} {limits(record['limits'])} {what}",
        table(titles, map(cells, record["measurements"]), words=1),
    ]


def paged_section(folder: Path) -> list[str]:
    """Steps from pages."""
    record = load(folder, "paged")
    if record is None:
        return []

    def cells(row: Any) -> list[str]:
        times, what = row["median_us"], f"batch {row['batch']}, {row['tokens']} tokens, {row['what']}"
        return [what, row["dtype"], readable_time(times["contiguous"]), f"{times['paged'] / times['contiguous']:.2f}"]

    titles = ["case", "dtype", "contiguous", "in pages of 16, times as long"]
    return [
        f"## Steps from a paged cache\n\n{machine(record)}",
        table(titles, map(cells, record["measurements"]), words=2),
    ]


def see_section(folder: Path) -> list[str]:
    """Recording and prices."""
    record = load(folder, "see")
    if record is None:
        return []
    rows = record["measurements"]

    def cells(row: Any) -> list[str]:
        plain = [one for one in rows if one["task"] == "forward" and one["dtype"] == row["dtype"]]
        seconds = row["seconds"] / min(one["seconds"] for one in plain)
        memory = row["peak_kb"] / max(one["peak_kb"] for one in plain)
        return [row["task"], row["dtype"], f"{row['seconds']:.1f} s", f"{seconds:.1f}", f"{memory:.2f}"]

    what = (
        f"{record['tokens']} tokens. A recording with windows of {', '.join(map(str, record['windows']))} and "
        f"{record['sink_tokens']} sink tokens; the prices of a window of {record['windows'][2]} in each of 30 layers."
    )
    titles = ["task", "dtype", "time", "in forward passes", "peak of memory, of a forward pass"]
    return [
        f"## What `qkv see` takes on SmolLM2-135M\n\n{machine(record)} {what}",
        table(titles, map(cells, rows), words=2),
    ]


SECTIONS = (
    *(kernel_section, grid_section, avx2_section, interleaved_section),
    *(overhead_section, models_section, one_line_section, compiled_section, llamacpp_section, training_section),
    *(layer_section, step_section, rotary_section, linear_section, latent_section, sequences_section),
    *(paged_section, see_section),
)
"""In the order of a page. Each returns nothing where its benchmark was not run."""


def main() -> None:
    """Writes the pages, the plots, and the list of pages in README.md."""
    argparse.ArgumentParser(
        description="Write a page of tables and plots for each processor in benchmarks/results."
    ).parse_args()
    pages = []
    for folder in sorted({path.parent for path in machines.RESULTS.glob("*/*.json")}):
        (folder / "plots").mkdir(exist_ok=True)
        parts = [part for section in SECTIONS for part in section(folder)]
        m = json.loads(min(folder.glob("*.json")).read_text())["machine"]
        name = m["cpu"] or folder.name
        (folder / "README.md").write_text("\n\n".join([f"# Benchmarks on {name}", *parts]) + "\n")
        pages.append(f"- [{name}]({folder.relative_to(HERE)}/README.md), {m['date']}")
    head = PAGE.read_text().split(START)[0]
    PAGE.write_text("\n\n".join([f"{head}{START}", "\n".join(pages), f"{END}\n"]))


if __name__ == "__main__":
    main()
