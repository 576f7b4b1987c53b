"""A decoding step under torch.compile: transformers with its static cache, and after `qkv.accelerate`; both eager too.

    python benchmarks/compiled.py      measures, prints, and writes results/PROCESSOR/compiled.json

A Llama of 8 layers of 256 on one thread, and of the sizes of SmolLM2-135M on two; steps in turns, with 64 to 88 tokens.
The first text compiles; its processor time is that of compiling, and graphs are counted. The last text is timed.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from harness import limits, machine
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import qkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, STEPS = 64, 24
MODELS = {
    "8 layers of 256": (
        1,
        {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 1000,
        },
    ),
    "SmolLM2-135M": (
        2,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
}
"""Threads and sizes."""

Way = tuple[Any, Callable[[], Any]]
"""What computes a step, and what makes its cache."""


def ways(sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Way]:
    """Random weights of these sizes, in four ways."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes)
    stock = LlamaForCausalLM(config).to(dtype).eval()
    ours = qkv.accelerate(copy.deepcopy(stock))
    return {
        "stock": (stock.forward, lambda: DynamicCache(config=config)),
        "stock, compiled": (torch.compile(stock.forward), lambda: StaticCache(config, max_cache_len=256)),
        "qkv": (ours.forward, lambda: qkv.QKVCache(ours)),
        "qkv, compiled": (torch.compile(ours.forward), lambda: qkv.QKVCache(ours)),
    }


def measure(models: dict[str, Way], prompt: Tensor) -> dict[str, dict[str, float]]:
    """Of each way: median seconds of a step, processor seconds of the first text, and graphs compiled."""
    found: dict[str, dict[str, float]] = {name: {"first text": 0.0, "graphs": 0} for name in models}
    times: dict[str, list[float]] = {}
    for text in range(3):
        caches = {name: make() for name, (_, make) in models.items()}
        times = {name: [] for name in models}
        for step in range(STEPS + 1):
            stop = PROMPT + step
            for name, (forward, _) in models.items():
                before, start, used = counters["stats"]["unique_graphs"], time.perf_counter(), time.process_time()
                forward(
                    input_ids=prompt if step == 0 else prompt[:, :1],
                    attention_mask=torch.ones(1, stop, dtype=torch.int64),
                    position_ids=torch.arange(0 if step == 0 else stop - 1, stop)[None],
                    past_key_values=caches[name],
                    use_cache=True,
                    logits_to_keep=1,
                )
                times[name].append(time.perf_counter() - start)
                found[name]["graphs"] += counters["stats"]["unique_graphs"] - before
                found[name]["first text"] += (time.process_time() - used) * (text == 0)
    return {name: {"step": statistics.median(times[name][1:]), **found[name]} for name in models}


def main() -> None:
    """Measures both models in fp32 and bf16."""
    argparse.ArgumentParser(description="A decoding step of a Llama under torch.compile.").parse_args()
    results: dict[str, Any] = {}
    for model, (threads, sizes) in MODELS.items():
        torch.set_num_threads(threads)
        prompt = torch.randint(1000, (1, PROMPT))
        for name, dtype in DTYPES.items():
            torch.compiler.reset()
            with torch.no_grad():
                found = results[f"{model}, {name}"] = measure(ways(sizes, dtype), prompt)
            for way, numbers in found.items():
                print(
                    f"{model}  {name}  {way:16}  {numbers['step'] * 1e3:6.2f} ms a step, "
                    f"{found['stock']['step'] / numbers['step']:5.2f} times stock  {numbers['graphs']:.0f} graphs, "
                    f"{numbers['first text']:.0f} s",
                    flush=True,
                )
    of_machine = limits.measure(threads=2)
    machine.save("compiled", {"transformers": transformers.__version__, "limits": of_machine, "results": results})


if __name__ == "__main__":
    main()
