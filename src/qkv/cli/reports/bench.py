"""The report of `qkv bench`, as a JSON document and as text."""

from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qkv
from qkv import kernels
from qkv.bench.mechanisms import LIBRARIES, OURS, TORCH, Mechanism, Sizes
from qkv.bench.timing import Spread
from qkv.cli.printing import counted, print_line, print_table
from qkv.models.kv_cache_size import readable_bytes


class Row(NamedTuple):
    """The measurements of one mechanism."""

    mechanism: Mechanism
    backend: str | None
    """The backend that qkv's ``auto`` chose."""
    times: dict[str, Spread]
    """By library."""
    peaks: dict[str, int | None]
    """Bytes, by library."""

    @property
    def ratio(self) -> float:
        """Median time of torch over that of qkv."""
        return self.times[TORCH]["median_us"] / self.times[OURS]["median_us"]


class BenchReport(NamedTuple):
    """The results of `qkv bench`."""

    sizes: Sizes
    rounds: int
    threads: int
    rows: list[Row]


def as_json(report: BenchReport) -> dict[str, Any]:
    """The report for `json.dumps`; times in microseconds, memory in bytes."""
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
    """Prints the report as text."""
    sizes = report.sizes
    passes = "decoding one token" if sizes.decode else "forward and backward" if sizes.backward else "forward"
    sequences = f"{counted(sizes.batch, 'sequence')} of {counted(sizes.length, 'token')}"
    threads = counted(report.threads, "thread")
    line = f"{sequences}, head_dim {sizes.head_dim}, {_dtype(report)}, {passes}, {threads}"
    print_line(line, console, "bold")
    kernel = kernels.absence() or f"kernel for {kernels.loaded().isa}"
    print_line(f"qkv {qkv.__version__} ({kernel}) against torch {torch.__version__}", console)
    console.print()
    title = f"Time of a call, median of {report.rounds} interleaved rounds"
    print_table(title, _time_table(report), console)
    console.print()
    title = "Memory: the KV cache, and the peak of a call without its inputs"
    print_table(title, _memory_table(report), console)


def _dtype(report: BenchReport) -> str:
    return str(report.sizes.dtype).removeprefix("torch.")


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _time_table(report: BenchReport) -> Table:
    table = _table("heads", "keys", "backend", OURS, TORCH, f"{TORCH} / {OURS}")
    for row in report.rows:
        mechanism = row.mechanism
        table.add_row(
            f"  {mechanism.name}",
            f"{mechanism.num_heads} on {mechanism.num_kv_heads}",
            str(mechanism.num_keys),
            str(row.backend),
            *(readable_time(row.times[library]["median_us"]) for library in (OURS, TORCH)),
            Text(f"{row.ratio:.2f}", style="green" if row.ratio >= 1 else "red"),
        )
    return table


def _memory_table(report: BenchReport) -> Table:
    table = _table("KV cache", f"peak of {OURS}", f"peak of {TORCH}")
    for row in report.rows:
        peaks = (row.peaks[library] for library in (OURS, TORCH))
        table.add_row(
            f"  {row.mechanism.name}",
            readable_bytes(row.mechanism.kv_bytes()),
            *("-" if peak is None else readable_bytes(peak) for peak in peaks),
        )
    return table


def readable_time(microseconds: float) -> str:
    """A time in the largest unit in which it is at least 1.

    Example:
        >>> readable_time(27.31), readable_time(133_856.0), readable_time(2_400_000.0)
        ('27.3 us', '133.9 ms', '2.40 s')
    """
    if microseconds < 1e3:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"
