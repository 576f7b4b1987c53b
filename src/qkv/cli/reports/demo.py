"""The report of `qkv demo`, as a JSON document and as text."""

import textwrap
from collections import Counter
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import qkv
from qkv import kernels
from qkv.bench.machine import processor
from qkv.cli.printing import counted, print_line, print_table
from qkv.models.comparison import DECODINGS, NAMES, OURS, REFERENCE, Comparison
from qkv.models.kv_cache_size import CacheSize, LayerShape, readable_bytes


class Measurement(NamedTuple):
    """The results in one dtype."""

    comparison: Comparison
    texts: dict[str, str]
    """By implementation."""
    layers: tuple[LayerShape, ...]
    cache_sizes: list[CacheSize]


class DemoReport(NamedTuple):
    """The results of `qkv demo`."""

    model: str
    text: str | None
    """Name of the file that was read before the prompt."""
    prompt: str
    length: int
    window: int
    measurements: dict[str, Measurement]
    """By dtype."""

    @property
    def first(self) -> Measurement:
        """That of the first dtype, for what all have in common."""
        return next(iter(self.measurements.values()))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of text and prompt."""
        return self.first.comparison.runs[REFERENCE].prompt_tokens


def as_json(report: DemoReport) -> dict[str, Any]:
    """The report for `json.dumps`; sizes in bytes, rates in tokens per second."""
    from transformers import __version__ as transformers_version

    return {
        "versions": {"qkv": qkv.__version__, "torch": torch.__version__, "transformers": transformers_version},
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "kernel": _isa()},
        "model": report.model,
        "attention": [
            {"num_layers": count, **shape._asdict(), "group_size": shape.group_size}
            for shape, count in Counter(report.first.layers).items()
        ],
        "text": report.text,
        "prompt": report.prompt,
        "prompt_tokens": report.prompt_tokens,
        "taken": report.first.comparison.taken,
        "measurements": {dtype: _measurement_as_json(found) for dtype, found in report.measurements.items()},
        "kv_cache": {
            "length": report.length,
            "window": report.window,
            "sizes": {
                dtype: [size._asdict() for size in found.cache_sizes] for dtype, found in report.measurements.items()
            },
        },
    }


def _measurement_as_json(found: Measurement) -> dict[str, Any]:
    comparison = found.comparison
    return {
        "identical": comparison.identical,
        "first_difference": comparison.first_difference,
        "times_as_fast": {"prefill": comparison.prefill_ratio, "decode": comparison.decode_ratio},
        "generations": {
            name: {
                "text": found.texts[name],
                "tokens": list(runs.tokens),
                "prefill_tokens_per_second": runs.prefill_rate,
                "decode_tokens_per_second": runs.decode_rate,
            }
            for name, runs in comparison.runs.items()
        },
    }


def print_report(report: DemoReport, console: Console) -> None:
    """Prints the report as text."""
    shapes = [_describe(shape, count) for shape, count in Counter(report.first.layers).items()]
    console.print(Text(report.model, style="bold"), soft_wrap=True)
    for shape in shapes:
        print_line(f"  {shape}", console)
    console.print()
    title = "Prompt" if report.text is None else f"Question on {report.text}"
    _print_text(f"{title} ({counted(report.prompt_tokens, 'token')})", report.prompt, console)
    for dtype, found in report.measurements.items():
        _print_answers(dtype, found, console)
    title = f"Tokens per second on {_machine()}, median of {DECODINGS} decodings in turns"
    print_table(title, _speed_table(report), console)
    console.print()
    print_line(f"qkv.accelerate(model) took: {', '.join(report.first.comparison.taken)}.", console)
    console.print()
    window = f"a window of {report.window} in {list(report.measurements)[-1]}"
    title = f"Size of the KV cache of {counted(report.length, 'token')}, and with {window}"
    print_table(title, _cache_table(report), console)


def _print_answers(dtype: str, found: Measurement, console: Console) -> None:
    """The texts of both, once where they are the same, and whether they are."""
    identical = found.comparison.identical
    texts = {" and ".join(NAMES): found.texts[REFERENCE]} if identical else found.texts
    for name, text in texts.items():
        _print_text(f"Answer of {name} in {dtype}", text or "(empty: the model generated no text)", console)
    print_line(verdict(dtype, found.comparison), console, "green" if identical else "red")
    console.print()


def _print_text(title: str, text: str, console: Console) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, 2)))
    else:
        # Not wrapped: the output may be parsed.
        console.print(Text(textwrap.indent(text, "  ")), soft_wrap=True)
    console.print()


def verdict(dtype: str, comparison: Comparison) -> str:
    """A sentence that says whether the texts are identical."""
    if comparison.identical:
        count = counted(len(comparison.runs[REFERENCE].tokens), "token")
        return f"The texts are identical: {count}, greedy, in {dtype}."
    where = f"The texts DIFFER, from new token {(comparison.first_difference or 0) + 1} on, in {dtype}."
    if dtype == "float32":
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


def _isa() -> str | None:
    """The instruction set of the kernel; None without one."""
    return None if kernels.absence() else kernels.loaded().isa


def _machine() -> str:
    return f"{counted(torch.get_num_threads(), 'thread')} of {processor() or 'this processor'}, {_isa() or 'no kernel'}"


def _speed_table(report: DemoReport) -> Table:
    """In Markdown."""
    table = Table(box=box.MARKDOWN)
    for title in ("dtype", "run by"):
        table.add_column(title)
    for title in ("prefill", "times as fast", "decoding", "times as fast"):
        table.add_column(title, justify="right")
    for dtype, found in report.measurements.items():
        comparison = found.comparison
        ratios = (f"{comparison.prefill_ratio:.2f}", _number(comparison.decode_ratio, ".2f"))
        for name, runs in comparison.runs.items():
            prefill, decode = ratios if name == OURS else ("", "")
            table.add_row(dtype, name, f"{runs.prefill_rate:.1f}", prefill, _number(runs.decode_rate, ".1f"), decode)
    return table


def _number(number: float | None, digits: str) -> str:
    return "-" if number is None else format(number, digits)


def _cache_table(report: DemoReport) -> Table:
    """In Markdown."""
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for title in ("KV heads", *report.measurements, "int8", "window"):
        table.add_column(title, justify="right", no_wrap=True)
    for sizes in zip(*(found.cache_sizes for found in report.measurements.values()), strict=True):
        size = sizes[-1]
        table.add_row(
            f"{size.attention} (this model)" if size.is_model else size.attention,
            ", ".join(map(str, size.num_kv_heads)),
            *(readable_bytes(each.num_bytes) for each in sizes),
            readable_bytes(size.int8_bytes),
            readable_bytes(size.window_bytes),
        )
    return table
