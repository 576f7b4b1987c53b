"""The report of `qkv bench`, as a JSON document and as text."""

import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

import qkv
from qkv import kernels
from qkv.bench.mechanisms import LIBRARIES, OURS, TORCH, Mechanism, Sizes
from qkv.bench.timing import Spread
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


def as_text(report: BenchReport) -> str:
    """The report as text of 80 columns."""
    sizes = report.sizes
    passes = "decoding one token" if sizes.decode else "forward and backward" if sizes.backward else "forward"
    what = f"{_counted(sizes.batch, 'sequence')} of {_counted(sizes.length, 'token')}, head_dim {sizes.head_dim}"
    kernel = kernels.absence() or f"kernel for {kernels.loaded().isa}"
    return "\n".join(
        [
            _wrapped(f"{what}, {_dtype(report)}, {passes}, {_counted(report.threads, 'thread')}"),
            _wrapped(f"qkv {qkv.__version__} ({kernel}) against torch {torch.__version__}"),
            "",
            f"Time of a call, median of {report.rounds} interleaved rounds",
            *_table(["", "heads", "keys", "backend", OURS, TORCH, f"{TORCH} / {OURS}"], map(_time_row, report.rows)),
            "",
            "Memory: the KV cache, and the peak of a call without its inputs",
            *_table(["", "KV cache", f"peak of {OURS}", f"peak of {TORCH}"], map(_memory_row, report.rows)),
        ]
    )


def _dtype(report: BenchReport) -> str:
    return str(report.sizes.dtype).removeprefix("torch.")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _table(titles: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    lines = [titles, *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))])
        for name, *cells in lines
    ]


def _time_row(row: Row) -> list[str]:
    mechanism = row.mechanism
    return [
        f"  {mechanism.name}",
        f"{mechanism.num_heads} on {mechanism.num_kv_heads}",
        str(mechanism.num_keys),
        str(row.backend),
        *(readable_time(row.times[library]["median_us"]) for library in (OURS, TORCH)),
        f"{row.ratio:.2f}",
    ]


def _memory_row(row: Row) -> list[str]:
    peaks = (row.peaks[library] for library in (OURS, TORCH))
    cells = ("-" if peak is None else readable_bytes(peak) for peak in peaks)
    return [f"  {row.mechanism.name}", readable_bytes(row.mechanism.kv_bytes()), *cells]


def readable_time(microseconds: float) -> str:
    """A time in the largest unit in which it is at least 1.

    Example:
        >>> readable_time(27.31), readable_time(133_856.0), readable_time(2_400_000.0)
        ('27.3 us', '133.9 ms', '2.40 s')
    """
    if microseconds < 1e3:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"
