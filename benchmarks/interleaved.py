"""Attention between matrix products, as in a model, against attention alone.

    python benchmarks/interleaved.py      measures, prints, and writes results/PROCESSOR/interleaved.json

This shows whether the kernel's threads compete with torch's. A product also evicts keys and values from the CPU caches,
which no kernel can avoid, so attention is also timed after only reading the product's weights.
"""

import argparse
import time
from collections.abc import Callable

import torch
from harness import machine
from harness.case import DTYPES, Case
from torch import Tensor

from qkv.bench.attention_call import PreparedCall, qkv_call, torch_call
from qkv.bench.timing import Spread, spread

SECONDS = 4.0
"""Per library and case."""

CASES = [
    Case("short, 16", 16, 16),
    Case("causal, 512", 512, 512, "causal"),
    Case("causal, 2048", 2048, 2048, "causal"),
    Case("decoding, 4096 keys, 32 heads on 8", 1, 4096, "causal", heads=32, kv_heads=8, head_dim=128),
]


def alone_and_between(call: PreparedCall, x: Tensor, weight: Tensor) -> dict[str, Spread]:
    """The time of attention after attention, after a projection of its tokens, and after reading that one's weights.

    Interleaved in blocks of ten calls.
    """
    before: dict[str, Callable[[], object]] = {
        "alone": lambda: None,
        "between products": lambda: x @ weight,
        "after reading": weight.sum,
    }
    times: dict[str, list[float]] = {name: [] for name in before}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["alone"]) < 10:
        for name, values in times.items():
            for index in range(10):
                before[name]()
                start = time.perf_counter()
                call()
                if index:  # The first call of a block follows another kind.
                    values.append((time.perf_counter() - start) * 1e6)
    return {name: spread(values) for name, values in times.items()}


def main() -> None:
    """Measures every case in fp32 and bf16."""
    argparse.ArgumentParser(description="Attention between matrix products against attention alone.").parse_args()
    print(f"{'case':<38} {'dtype':<5} {'library':<7} {'alone us':>10} {'between us':>10} {'ratio':>6} {'read us':>10}")
    results = []
    for case in CASES:
        for dtype in ("fp32", "bf16"):
            q, k, v = case.inputs(DTYPES[dtype])
            x = torch.randn(case.lq, 4096).to(q.dtype)
            weight = torch.randn(4096, case.heads * case.head_dim).to(q.dtype)
            for library, prepare in (("qkv", qkv_call), ("torch", torch_call)):
                times = alone_and_between(prepare(q, k, v, case.as_mask(), case.offset), x, weight)
                results.append({"case": case.name, "dtype": dtype, "library": library, "times": times})
                alone, between, read = (found["median_us"] for found in times.values())
                columns = f"{alone:>10.1f} {between:>10.1f} {between / alone:>6.2f} {read:>10.1f}"
                print(f"{case.name:<38} {dtype:<5} {library:<7} {columns}", flush=True)
    machine.save("interleaved", {"measurements": results})


if __name__ == "__main__":
    main()
