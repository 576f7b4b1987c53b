"""What `qkv bench` measured, as a JSON document and as text for people."""

from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qkv
from qkv import kernels
from qkv.bench.mechanisms import LIBRARIES, OURS, STOCK, Mechanism, Sizes
from qkv.bench.timing import Spread
from qkv.models.kv_cache_size import readable_bytes


class Row(NamedTuple):
    """One mechanism."""

    mechanism: Mechanism
    backend: str | None
    """What qkv's ``auto`` chose."""
    times: dict[str, Spread]
    """By library."""
    peaks: dict[str, int | None]
    """Bytes, by library."""

    @property
    def ratio(self) -> float:
        """How many times as long as qkv torch takes."""
        return self.times[STOCK]["median_us"] / self.times[OURS]["median_us"]


class BenchReport(NamedTuple):
    """Everything that is printed."""

    sizes: Sizes
    rounds: int
    threads: int
    rows: list[Row]


def as_json(report: BenchReport) -> dict[str, Any]:
    """The report in numbers and strings that `json.dumps` takes; times in microseconds, memory in bytes."""
    return {
        "versions": {"qkv": qkv.__version__, "torch": torch.__version__},
        "kernel": kernels.absence() or kernels.loaded().isa,
        "threads": report.threads,
        "rounds": report.rounds,
        "sizes": report.sizes._asdict() | {"dtype": _dtype(report)},
        "mechanisms": [_row_as_json(row) for row in report.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    mechanism = row.mechanism
    return {
        "mechanism": mechanism.name,
        "num_heads": mechanism.num_heads,
        "num_kv_heads": mechanism.num_kv_heads,
        "num_queries": mechanism.num_queries,
        "num_keys": mechanism.num_keys,
        "mask": repr(mechanism.mask),
        "kv_bytes": mechanism.kv_bytes(),
        "backend": row.backend,
        "ratio": row.ratio,
        **{library: {**row.times[library], "peak_bytes": row.peaks[library]} for library in LIBRARIES},
    }


def print_report(report: BenchReport, console: Console) -> None:
    """Prints the report for people."""
    sizes = report.sizes
    passes = "decoding one token" if sizes.decode else "forward and backward" if sizes.backward else "forward"
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    texts = "1 text" if sizes.batch == 1 else f"{sizes.batch} texts"
    print_line = (
        f"{texts} of {sizes.length} tokens, heads of {sizes.head_dim}, {_dtype(report)}, {passes}, on {threads}"
    )
    console.print(Text(print_line, style="bold"), soft_wrap=True)
    kernel = kernels.absence() or f"kernel for {kernels.loaded().isa}"
    console.print(Text(f"qkv {qkv.__version__} ({kernel}) against torch {torch.__version__}"), soft_wrap=True)
    console.print()
    title = f"Time of a call, the median of {report.rounds} rounds in turns"
    _print_table(title, _time_table(report), console)
    console.print()
    title = "Memory: keys and values that a cache holds, and what a call takes beside its inputs at its peak"
    _print_table(title, _memory_table(report), console)


def _dtype(report: BenchReport) -> str:
    return str(report.sizes.dtype).removeprefix("torch.")


def _print_table(title: str, table: Table, console: Console) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _time_table(report: BenchReport) -> Table:
    table = _table("heads", "keys", "backend", OURS, STOCK, f"{STOCK} / {OURS}")
    for row in report.rows:
        mechanism = row.mechanism
        table.add_row(
            f"  {mechanism.name}",
            f"{mechanism.num_heads} on {mechanism.num_kv_heads}",
            str(mechanism.num_keys),
            str(row.backend),
            *(readable_time(row.times[library]["median_us"]) for library in (OURS, STOCK)),
            Text(f"{row.ratio:.2f}", style="green" if row.ratio >= 1 else "red"),
        )
    return table


def _memory_table(report: BenchReport) -> Table:
    table = _table("keys and values", f"peak of {OURS}", f"peak of {STOCK}")
    for row in report.rows:
        peaks = (row.peaks[library] for library in (OURS, STOCK))
        table.add_row(
            f"  {row.mechanism.name}",
            readable_bytes(row.mechanism.kv_bytes()),
            *("-" if peak is None else readable_bytes(peak) for peak in peaks),
        )
    return table


def readable_time(microseconds: float) -> str:
    """A time in the largest unit that leaves at least one of it.

    Example:
        >>> readable_time(27.31), readable_time(133_856.0), readable_time(2_400_000.0)
        ('27.3 us', '133.9 ms', '2.40 s')
    """
    if microseconds < 1e3:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"
