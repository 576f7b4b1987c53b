"""The native kernel against torch's own, in one process, interleaved.

    python benchmarks/kernel.py [NAME ...]      measures the cases whose name holds NAME, or all

Prints a table; with all cases it writes benchmarks/results/kernel.json. Useful work only: what a mask hides does not
count as arithmetic. Decoding is measured in the bytes of keys and values that a step must read.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from timing import interleaved

import qkv
from qkv import Mask, kernels
from qkv.masks import FULL

RESULTS = Path(__file__).parent / "results" / "kernel.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call: batch 1, 8 heads of 64 unless said otherwise."""

    name: str
    lq: int
    lk: int
    mask: Mask = FULL
    heads: int = 8
    kv_heads: int = 8
    width: int = 64

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randn(1, self.heads, self.lq, self.width).to(dtype)
        k, v = (torch.randn(1, self.kv_heads, self.lk, self.width).to(dtype) for _ in range(2))
        return q, k, v

    def operations(self) -> float:
        """Multiplications and additions of both products, over what the mask shows."""
        offset = self.lk - self.lq
        right = self.lk if self.mask.right is None else self.mask.right
        left = self.lk if self.mask.left is None else self.mask.left
        positions = range(offset, offset + self.lq)
        shown = sum(min(self.lk - 1, p + right) - max(0, p - left) + 1 for p in positions)
        return 4.0 * self.heads * self.width * shown

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all keys and values."""
        return 2 * self.kv_heads * self.lk * self.width * dtype.itemsize


CASES = [
    Case("full, 2048", 2048, 2048),
    Case("causal, 512", 512, 512, Mask.causal()),
    Case("causal, 2048", 2048, 2048, Mask.causal()),
    Case("causal, 8192", 8192, 8192, Mask.causal()),
    Case("causal window of 512, 16384", 16384, 16384, Mask.causal(window=512)),
    Case("decoding, 4096 keys, 32 heads on 32", 1, 4096, Mask.causal(), 32, 32, 128),
    Case("decoding, 4096 keys, 32 heads on 8", 1, 4096, Mask.causal(), 32, 8, 128),
    Case("decoding, 4096 keys, 32 heads on 1", 1, 4096, Mask.causal(), 32, 1, 128),
    *(Case(f"decoding, 4096 keys, groups of {g}", 1, 4096, Mask.causal(), 8 * g, 8, 128) for g in (3, 4, 5, 6, 7)),
    Case("short, 16", 16, 16),
    Case("short, 128", 128, 128),
]


def measure(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds, rates and the ratio to torch."""
    q, k, v = case.inputs(dtype)
    options = {"mask": case.mask, "offset": case.lk - case.lq}
    candidates: dict[str, Callable[[], object]] = {
        backend: lambda backend=backend: qkv.attention(q, k, v, **options, backend=backend)  # type: ignore[misc]
        for backend in ("native", "sdpa")
    }
    times = {name: row["median_us"] for name, row in interleaved(candidates, rounds=9).items()}
    return {
        "native_us": times["native"],
        "torch_us": times["sdpa"],
        "ratio": round(times["sdpa"] / times["native"], 2),
        "native_gflops": round(case.operations() / times["native"] / 1e3, 1),
        "native_kv_gb_per_s": round(case.kv_bytes(dtype) / times["native"] / 1e3, 1),
    }


def read_bandwidth() -> float:
    """GB/s of summing 256 MB."""
    x = torch.ones(1 << 26)
    return round(x.nbytes / interleaved({"sum": lambda: x.sum()}, rounds=9)["sum"]["median_us"] / 1e3, 1)


def matmul_rate() -> float:
    """GF/s of torch's fp32 matrix product, a practical peak."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return round(2 * 2048**3 / interleaved({"mm": lambda: a @ b}, rounds=9)["mm"]["median_us"] / 1e3, 1)


@torch.no_grad()
def main() -> None:
    """Measures the cases asked for."""
    names = sys.argv[1:]
    limits = {"read_gb_per_s": read_bandwidth(), "fp32_matmul_gflops": matmul_rate()}
    print(f"{kernels.loaded().isa}, {limits}")
    print(f"{'case':<38} {'dtype':<5} {'native us':>11} {'torch us':>11} {'ratio':>6} {'GF/s':>7} {'KV GB/s':>8}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        for label, dtype in DTYPES.items():
            row = results.setdefault(case.name, {})[label] = measure(case, dtype)
            print(
                f"{case.name:<38} {label:<5} {row['native_us']:>11.1f} {row['torch_us']:>11.1f} {row['ratio']:>6.2f} "
                f"{row['native_gflops']:>7.1f} {row['native_kv_gb_per_s']:>8.1f}",
                flush=True,
            )
    if not names:
        RESULTS.parent.mkdir(exist_ok=True)
        record = {"machine": machine.describe() | {"kernel": kernels.loaded().isa}, "limits": limits, "cases": results}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
