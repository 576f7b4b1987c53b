"""Overhead of a call, sliding windows over long sequences, and import time.

python benchmarks/overhead.py             measures, prints, and writes results/PROCESSOR/overhead.json
python benchmarks/overhead.py window N    one window measurement, as a separate process for its peak memory
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from harness import machine

import qkv
from qkv import kernels
from qkv.backends import native
from qkv.bench.timing import interleaved
from qkv.problem import make_problem


def call_cost() -> dict[str, object]:
    """`qkv.attention` and `MultiHeadAttention` against torch's on tiny inputs."""
    q, k, v = (torch.randn(1, 8, 16, 64) for _ in range(3))
    x = torch.randn(1, 16, 64)
    causal = qkv.Mask.causal()
    theirs, ours = torch.nn.MultiheadAttention(64, 8, batch_first=True).eval(), qkv.MultiHeadAttention(64, 8).eval()
    functions: dict[str, Callable[[], object]] = {
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "qkv.attention": lambda: qkv.attention(q, k, v),
        "scaled_dot_product_attention, causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "qkv.attention, causal": lambda: qkv.attention(q, k, v, mask=causal),
    }
    layers: dict[str, Callable[[], object]] = {
        "nn.MultiheadAttention": lambda: theirs(x, x, x),
        "nn.MultiheadAttention, need_weights=False": lambda: theirs(x, x, x, need_weights=False),
        "qkv.MultiHeadAttention": lambda: ours(x),
    }
    with torch.no_grad():
        inference = interleaved(functions) | interleaved(layers)
    return {"inference": inference, "recording gradients": interleaved(layers)}


def entry_point_cost() -> dict[str, object]:
    """What each entry point of qkv.kernels.forward costs, with a kernel that does nothing."""
    q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 16, 64)
    call = native.call_of(make_problem("overhead", q, k, k, mask=qkv.Mask.causal(), offset=15))
    learned = call._replace(q=q.clone().requires_grad_())
    functions: dict[str, Callable[[], object]] = {
        "fast_forward": lambda: kernels.fast_forward(
            q, k, k, None, None, None, None, None, None, None, 0, 0, 15, 0.125
        ),
        "forward": lambda: kernels.forward(call, wants_lse=False, needs_grad=False),
        "forward, gradients": lambda: kernels.forward(learned, wants_lse=False, needs_grad=True),
        "torch.ops.qkv.forward, gradients": lambda: torch.ops.qkv.forward(*learned),
    }

    def nothing(*arguments: object) -> int:
        return 0

    with kernels.use(kernels.loaded()._replace(forward=nothing, fast_forward=nothing)):
        return dict(interleaved(functions))


def window_once(length: int) -> dict[str, float]:
    """Time and peak memory of forward and backward with a window of 512, batch 1, 8 heads of 64, fp32."""
    layer = qkv.SlidingWindowAttention(512, 8, window=512)
    x = torch.randn(1, length, 512, requires_grad=True)
    times = []
    for _ in range(4):
        x.grad = None
        layer.zero_grad()
        start = time.perf_counter()
        layer(x).sum().backward()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"length": length, "seconds": round(median(times[1:]), 3), "peak_gib": round(peak, 3)}


def windows() -> list[dict[str, float]]:
    """`window_once` for each length, in separate processes."""
    lengths = (8192, 16384, 32768, 65536)
    command = [sys.executable, __file__, "window"]
    runs = [subprocess.run([*command, str(n)], check=True, capture_output=True, text=True) for n in lengths]
    return [json.loads(run.stdout) for run in runs]


def import_cost() -> dict[str, float]:
    """Seconds that ``import qkv`` takes after ``import torch``."""
    code = "import torch, time; start = time.perf_counter(); import qkv; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(9)]
    return {"median_seconds": round(median(float(run.stdout) for run in runs), 4)}


def main() -> None:
    """Measures everything, in order."""
    if sys.argv[1:2] == ["window"]:
        print(json.dumps(window_once(int(sys.argv[2]))))
        return
    results = {"call": call_cost(), "entry points": entry_point_cost(), "window": windows(), "import": import_cost()}
    machine.save("overhead", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
