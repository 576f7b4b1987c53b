"""What `qkv see` takes on SmolLM2-135M: a recording and the prices of a window, beside a forward pass of the same text.

    python benchmarks/see.py      measures, prints, and writes results/PROCESSOR/see.json

4096 tokens of Shakespeare's King Lear and The Tempest. Each task is a process of its own, so that the peak of memory is
its own; a forward pass is timed before and after the others.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import machine

from qkv.analysis import price, record
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.shakespeare import works
from qkv.models.source import gguf_source

TOKENS, WINDOWS, SINK_TOKENS = 4096, [64, 128, 256, 512, 1024, 2048], 4
TASKS: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "forward": lambda model, token_ids: model(token_ids),
    "record": lambda model, token_ids: record(model, token_ids, windows=WINDOWS, sink_tokens=SINK_TOKENS),
    "price": lambda model, token_ids: price(model, token_ids, window=WINDOWS[2], sink_tokens=SINK_TOKENS),
}
ORDER = ["forward", "record", "price", "forward"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def run(task: str, dtype: str) -> None:
    """Prints the seconds of a task, after a short one of the same kind, and the peak of memory before and after it."""
    progress = Progress()
    language_model = load(gguf_source(cached_weights(SMOLLM2_135M, progress)), DTYPES[dtype], progress)
    _, held_out = works()
    token_ids = language_model.tokenizer(held_out[: 8 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS]
    assert token_ids.shape[1] == TOKENS
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    TASKS["forward"](language_model.model, token_ids[:, :64])
    start = time.perf_counter()
    TASKS[task](language_model.model, token_ids)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"task": task, "dtype": dtype, "seconds": seconds, "loaded_kb": loaded, "peak_kb": peak}))


def main() -> None:
    """Measures fp32 and bf16."""
    results = []
    for dtype in DTYPES:
        for task in ORDER:
            done = subprocess.run(
                [sys.executable, __file__, task, dtype], check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{dtype} {task:<8} {found['seconds']:7.1f} s, peak {found['peak_kb'] / 2**20:.2f} GiB", flush=True)
            results.append(found)
    machine.save("see", {"tokens": TOKENS, "windows": WINDOWS, "sink_tokens": SINK_TOKENS, "measurements": results})


if __name__ == "__main__":
    run(*sys.argv[1:]) if len(sys.argv) > 1 else main()
