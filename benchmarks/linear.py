"""Rows through a linear layer of an accelerated model, against F.linear and the layer's own call, on 72 shapes.

    python benchmarks/linear.py [THREADS]     measures, prints, and writes results/PROCESSOR/linear.json

Weights are read from memory, as in a model: copies of more than the caches hold take turns. The bandwidth of reading is
measured before and after by harness/limits.cpp, and beside each shape by adding up a tensor of the weight's size.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import limits, machine, reading
from harness.case import DTYPES
from torch import Tensor, nn

from qkv import kernels
from qkv.bench.timing import interleaved
from qkv.layers.projection import ProjectedForward

ROWS = (1, 2, 4, 8, 16, 64)
WEIGHTS = (
    *((64, 64), (256, 256), (576, 192), (576, 576), (64, 2048), (2048, 64)),
    *((576, 1536), (1024, 1024), (2048, 2048), (4096, 1024), (4096, 4096), (16384, 2048)),
)
"""in_features and out_features"""
BYTES = 96 << 20
"""of all copies of a weight, at most `COPIES` of them"""
COPIES = 256


def in_turn(call: Callable[[nn.Linear], object], layers: list[nn.Linear]) -> Callable[[], object]:
    """The call of the next layer each time."""
    following: Iterator[nn.Linear] = itertools.cycle(layers)
    return lambda: call(next(following))


def measure(columns: int, features: int, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """The times of a weight with each number of rows."""
    size = columns * features * dtype.itemsize
    layers = [nn.Linear(columns, features, bias=False, dtype=dtype) for _ in range(max(1, min(COPIES, BYTES // size)))]
    forwards = {layer: ProjectedForward(layer) for layer in layers}
    for rows in ROWS:
        x = torch.randn(rows, columns).to(dtype)

        def by_torch(layer: nn.Linear, x: Tensor = x) -> Tensor:
            return F.linear(x, layer.weight)

        def by_qkv(layer: nn.Linear, x: Tensor = x) -> Tensor:
            return forwards[layer].call(x)

        def read(layer: nn.Linear) -> Tensor:
            return layer.weight.view(torch.int32).sum(dtype=torch.int32)

        def by_call(layer: nn.Linear, x: Tensor = x) -> Tensor:
            out: Tensor = layer(x)
            return out

        calls = {
            "F.linear": in_turn(by_torch, layers),
            "nn.Linear": in_turn(by_call, layers),
            "qkv": in_turn(by_qkv, layers),
            reading.NAME: in_turn(read, layers),
        }
        times = interleaved(calls, rounds=5, seconds_per_round=0.002)
        yield {
            "rows": rows,
            "columns": columns,
            "features": features,
            "by kernel": kernels.is_faster(x, layers[0].weight),
            "gb_per_s": round(size / times["qkv"]["median_us"] / 1e3, 2),
            "ratio": round(times["F.linear"]["median_us"] / times["qkv"]["median_us"], 3),
            "ratio of the call": round(times["nn.Linear"]["median_us"] / times["qkv"]["median_us"], 3),
            "times": times,
        }


@torch.no_grad()
def main() -> None:
    """Measures all shapes."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads()
    torch.set_num_threads(threads)
    bounds = limits.measure(threads)
    results = []
    for name in ("fp32", "bf16", "fp16"):
        for columns, features in WEIGHTS:
            for found in measure(columns, features, DTYPES[name]):
                results.append({"dtype": name, **found})
                shape = f"{found['rows']:>2} x {columns} x {features}"
                ratios = f"{found['ratio']:6.2f} {found['ratio of the call']:6.2f}"
                print(f"{name}  {shape:<20} {ratios} {found['gb_per_s']:7.1f} GB/s", flush=True)
    machine.save("linear", {"limits": limits.larger(bounds, limits.measure(threads)), "measurements": results})


if __name__ == "__main__":
    main()
