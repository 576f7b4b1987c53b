"""The report of `qkv demo`, as a JSON document and as text."""

import textwrap
from collections import Counter
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import qkv
from qkv.cli.printing import counted, print_table
from qkv.models.comparison import OURS, REFERENCE, ROUNDS, Comparison
from qkv.models.generation import fastest
from qkv.models.kv_cache_size import CacheSize, LayerShape, readable_bytes

TITLES = {REFERENCE: "sdpa (transformers' attention)", OURS: "qkv"}


class DemoReport(NamedTuple):
    """The results of `qkv demo`."""

    model: str
    dtype: str
    prompt: str
    layers: tuple[LayerShape, ...]
    comparison: Comparison
    texts: dict[str, str]
    """By attention implementation."""
    length: int
    window: int
    cache_sizes: list[CacheSize]

    @property
    def prompt_tokens(self) -> int:
        return self.comparison.runs[REFERENCE][0].prompt_tokens


def as_json(report: DemoReport) -> dict[str, Any]:
    """The report for `json.dumps`; sizes in bytes, rates in tokens per second."""
    from transformers import __version__ as transformers_version

    return {
        "versions": {"qkv": qkv.__version__, "torch": torch.__version__, "transformers": transformers_version},
        "model": report.model,
        "dtype": report.dtype,
        "attention": [
            {"num_layers": count, **shape._asdict(), "group_size": shape.group_size}
            for shape, count in Counter(report.layers).items()
        ],
        "prompt": report.prompt,
        "prompt_tokens": report.prompt_tokens,
        "identical": report.comparison.identical,
        "first_difference": report.comparison.first_difference,
        "generations": {name: _generation_as_json(report, name) for name in TITLES},
        "kv_cache": {
            "length": report.length,
            "window": report.window,
            "sizes": [size._asdict() for size in report.cache_sizes],
        },
    }


def _generation_as_json(report: DemoReport, implementation: str) -> dict[str, Any]:
    runs = report.comparison.runs[implementation]
    prefill, decode = fastest(runs)
    return {
        "text": report.texts[implementation],
        "tokens": list(runs[0].tokens),
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }


def print_report(report: DemoReport, console: Console) -> None:
    """Prints the report as text."""
    shapes = [_describe(shape, count) for shape, count in Counter(report.layers).items()]
    _print_text(f"{report.model} in {report.dtype}", "\n".join(shapes), console)
    _print_text(f"Prompt ({counted(report.prompt_tokens, 'token')})", report.prompt, console)
    for name, title in TITLES.items():
        _print_text(title, report.texts[name] or "(empty: the model generated no text)", console)
    console.print(Text(verdict(report), style="green" if report.comparison.identical else "red"), soft_wrap=True)
    console.print()
    title = f"Tokens per second, best of {ROUNDS} interleaved runs after a warm-up"
    print_table(title, _speed_table(report), console)
    console.print()
    title = f"Size of the KV cache of {counted(report.length, 'token')} in {report.dtype}"
    print_table(title, _cache_table(report), console)


def _print_text(title: str, text: str, console: Console) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, 2)))
    else:
        # Not wrapped: the output may be parsed.
        console.print(Text(textwrap.indent(text, "  ")), soft_wrap=True)
    console.print()


def verdict(report: DemoReport) -> str:
    """A sentence that says whether the texts are identical."""
    comparison = report.comparison
    if comparison.identical:
        count = counted(len(comparison.runs[REFERENCE][0].tokens), "token")
        return f"The texts are identical: {count}, greedy, in {report.dtype}."
    where = f"The texts DIFFER, from new token {(comparison.first_difference or 0) + 1} on, in {report.dtype}."
    if report.dtype == "float32":
        return f"{where} This is a bug: please report the model and the prompt."
    return f"{where} Rounding can flip the choice between nearly equally likely tokens; in float32 it should not."


def _describe(shape: LayerShape, count: int) -> str:
    kinds = {1: "multi-query", shape.num_heads: "multi-head"}
    width = f"head width {shape.head_dim}"
    if shape.value_dim != shape.head_dim:
        width = f"key width {shape.head_dim}, value width {shape.value_dim}"
    window = "no window" if shape.window is None else f"a window of {shape.window}"
    kv_heads = counted(shape.num_kv_heads, "KV head")
    groups = f"{counted(shape.num_kv_heads, 'group')} of {shape.group_size}"
    return (
        f"{counted(count, 'layer')} of {kinds.get(shape.num_kv_heads, 'grouped-query')} attention: "
        f"{counted(shape.num_heads, 'query head')}, {kv_heads} ({groups}), {width}, {window}"
    )


def _speed_table(report: DemoReport) -> Table:
    table = Table("", box=None, pad_edge=False)
    table.add_column("prefill", justify="right")
    table.add_column("decoding", justify="right")
    for name in TITLES:
        prefill, decode = fastest(report.comparison.runs[name])
        table.add_row(f"  {name}", f"{prefill:.1f}", "-" if decode is None else f"{decode:.1f}")
    return table


def _cache_table(report: DemoReport) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("KV heads", f"all {report.length}", "of MHA", f"window {report.window}", "of MHA"):
        table.add_column(title, justify="right", no_wrap=True)
    most = report.cache_sizes[0].num_bytes
    for size in report.cache_sizes:
        table.add_row(
            f"  {size.attention} (this model)" if size.is_model else f"  {size.attention}",
            ", ".join(map(str, size.num_kv_heads)),
            readable_bytes(size.num_bytes),
            f"{size.num_bytes / most:.1%}",
            readable_bytes(size.window_bytes),
            f"{size.window_bytes / most:.1%}",
        )
    return table
