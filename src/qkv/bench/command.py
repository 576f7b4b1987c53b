"""`qkv bench`: benchmarks the seven mechanisms against torch's attention. It needs torch alone."""

import json
import os
from typing import Annotated

import torch

import qkv
from qkv.bench.mechanisms import LIBRARIES, Mechanism, Sizes, mechanisms
from qkv.bench.options import Dtype, Option, WrongUsageError
from qkv.bench.peak_memory import peak_memory
from qkv.bench.report import BenchReport, Row, as_json, as_text
from qkv.bench.timing import Spread, interleaved
from qkv.models.progress import Progress, offset_progress


def bench(
    length: Annotated[int, Option("Sequence length: number of keys, and of queries.", "TOKENS")] = 2048,
    batch: Annotated[int, Option("Batch size.", "SEQUENCES")] = 1,
    heads: Annotated[int, Option("Query heads.", "HEADS")] = 8,
    kv_heads: Annotated[
        int | None, Option("KV heads of grouped-query attention. Default: a quarter of the query heads.", "HEADS")
    ] = None,
    head_dim: Annotated[int, Option("Width of a head.", "WIDTH")] = 64,
    window: Annotated[int, Option("Sliding window, the query's own key included.", "TOKENS")] = 512,
    dtype: Annotated[Dtype, Option("Dtype of queries, keys and values.")] = Dtype.float32,
    threads: Annotated[
        int | None, Option("Threads of both libraries. Default: torch's.", "THREADS", most=os.cpu_count() or 1)
    ] = None,
    rounds: Annotated[int, Option("Measurements of each library.", "ROUNDS", least=2, why=", for quartiles")] = 9,
    decode: Annotated[bool, Option("One query, at the end of the sequence.")] = False,
    backward: Annotated[bool, Option("Forward and backward pass.")] = False,
    as_document: Annotated[bool, Option("Print only a JSON document on standard output.", names=("--json",))] = False,
) -> None:
    """Benchmark the seven mechanisms against torch's attention.

    Calls both libraries in turns, torch's scaled_dot_product_attention with the fastest arguments for each mask. Prints
    the median time and the peak memory of a call, the size of its KV cache, and the backend that qkv chose. Scaled
    dot-product attention has a single head; cross-attention reads a context of half the length; multi-query and
    grouped-query attention are causal.
    """
    if kv_heads is None:
        kv_heads = next(divisor for divisor in range(max(1, heads // 4), 0, -1) if heads % divisor == 0)
    if heads % kv_heads:
        raise WrongUsageError(f"it must divide --heads, {heads}; got {kv_heads}.", "'--kv-heads'")
    if decode and backward:
        raise WrongUsageError("decoding has no backward pass; give only one of the two.", "'--decode' / '--backward'")
    if threads is not None:
        torch.set_num_threads(threads)
    torch_dtype: torch.dtype = getattr(torch, dtype.value)
    sizes = Sizes(batch, length, heads, kv_heads, head_dim, window, torch_dtype, decode, backward)
    chosen, progress = mechanisms(sizes), Progress()
    # Memory first: calls that run out of memory end a separate process instead of this one.
    peaks = _peaks(chosen, progress)
    rows = [
        Row(mechanism, _backend(mechanism), times, peak)
        for mechanism, times, peak in zip(chosen, _times(chosen, rounds, progress), peaks, strict=True)
    ]
    report = BenchReport(sizes, rounds, torch.get_num_threads(), rows)
    print(json.dumps(as_json(report), indent=2, allow_nan=False) if as_document else as_text(report))


def _backend(mechanism: Mechanism) -> str | None:
    """The backend that ``auto`` chooses."""
    return qkv.explain(*mechanism.inputs(), mask=mechanism.mask, offset=mechanism.offset).chosen


def _peaks(chosen: list[Mechanism], progress: Progress) -> list[dict[str, int | None]]:
    """The peak memory of each mechanism, by library."""
    peaks: list[dict[str, int | None]] = [{} for _ in chosen]
    with progress.step("measuring memory", len(chosen) * len(LIBRARIES), "calls") as on_progress:
        for done, (mechanism, peak) in enumerate(zip(chosen, peaks, strict=True)):
            for count, library in enumerate(LIBRARIES, start=1):
                peak[library] = peak_memory(mechanism, library)
                on_progress(done * len(LIBRARIES) + count)
    return peaks


def _times(chosen: list[Mechanism], rounds: int, progress: Progress) -> list[dict[str, Spread]]:
    """The times of each mechanism, by library."""
    times = []
    with progress.step("measuring time", len(chosen) * rounds, "rounds") as on_progress:
        for done, mechanism in enumerate(chosen):
            inputs = mechanism.inputs()
            calls = {library: mechanism.prepare(library, inputs) for library in LIBRARIES}
            times.append(interleaved(calls, rounds=rounds, on_progress=offset_progress(on_progress, done * rounds)))
    return times
