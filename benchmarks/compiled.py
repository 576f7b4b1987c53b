"""A decoding step of a small Llama under torch.compile: transformers with its static cache, and after `qkv.accelerate`.

    python benchmarks/compiled.py      measures, prints, and writes results/PROCESSOR/compiled.json

On one thread, steps in turns. Compiling takes minutes; it is counted in graphs, not in seconds.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from harness import machine
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import qkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, STEPS = 100, 64

Way = tuple[Any, Callable[[], Any]]
"""What computes a step, and what makes its cache."""


def ways(dtype: torch.dtype) -> dict[str, Way]:
    """8 layers of 256, 8 heads on 4, an MLP of 688."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    stock = LlamaForCausalLM(config).to(dtype).eval()
    ours = qkv.accelerate(copy.deepcopy(stock))
    return {
        "stock, compiled": (torch.compile(stock.forward), lambda: StaticCache(config, max_cache_len=256)),
        "qkv": (ours, lambda: qkv.QKVCache(ours)),
        "qkv, compiled": (torch.compile(ours.forward), lambda: qkv.QKVCache(ours)),
    }


def measure(models: dict[str, Way], prompt: Tensor) -> dict[str, dict[str, float]]:
    """Median seconds of a step and the number of graphs compiled, by way; the second of two texts is timed."""
    found: dict[str, dict[str, float]] = {}
    graphs = dict.fromkeys(models, 0)
    for _ in range(2):
        caches = {name: make() for name, (_, make) in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for step in range(STEPS + 1):
            stop = PROMPT + step
            for name, (forward, _) in models.items():
                before, start = counters["stats"]["unique_graphs"], time.perf_counter()
                forward(
                    input_ids=prompt if step == 0 else prompt[:, :1],
                    attention_mask=torch.ones(1, stop, dtype=torch.int64),
                    position_ids=torch.arange(0 if step == 0 else stop - 1, stop)[None],
                    past_key_values=caches[name],
                    use_cache=True,
                    logits_to_keep=1,
                )
                times[name].append(time.perf_counter() - start)
                graphs[name] += counters["stats"]["unique_graphs"] - before
        found = {name: {"step": statistics.median(times[name][1:]), "graphs": graphs[name]} for name in models}
    return found


def main() -> None:
    """Measures fp32 and bf16."""
    argparse.ArgumentParser(description="A decoding step of a small Llama under torch.compile.").parse_args()
    torch.set_num_threads(1)
    prompt = torch.randint(1000, (1, PROMPT))
    results: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        torch.compiler.reset()
        with torch.no_grad():
            results[name] = measure(ways(dtype), prompt)
        for way, numbers in results[name].items():
            print(
                f"{name}  {way:16}  {numbers['step'] * 1e3:6.2f} ms a step  {numbers['graphs']:.0f} graphs", flush=True
            )
    machine.save("compiled", {"transformers": transformers.__version__, "results": results})


if __name__ == "__main__":
    main()
