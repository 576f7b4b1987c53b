"""A Llama of SmolLM2-135M's sizes with random weights, as transformers computes it and after `qkv.accelerate(model)`.

    python benchmarks/one_line.py      measures, prints, and writes results/PROCESSOR/one_line.json

The prompt is computed once by each, the steps that follow in turns. Both have transformers' default settings.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from harness import limits, machine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import qkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = (64, 1024)
STEPS = 24


def model(dtype: torch.dtype) -> Any:
    """30 layers of 576, 9 heads on 3, an MLP of 1536 and 49,152 words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(models: dict[str, Any], prompt: Tensor) -> dict[str, dict[str, float]]:
    """Seconds of the prompt and, in the median, of a step, by model."""
    found: dict[str, dict[str, float]] = {}
    caches, steps = {}, {name: [] for name in models}  # type: ignore[var-annotated]
    for name, each in models.items():
        prefill, out = seconds(lambda each=each: each(prompt, use_cache=True))  # type: ignore[misc]
        found[name], caches[name] = {"prefill": prefill}, out.past_key_values
    for _ in range(STEPS):
        for name, each in models.items():
            options = {"past_key_values": caches[name], "use_cache": True}
            steps[name].append(seconds(lambda each=each, options=options: each(prompt[:, :1], **options))[0])  # type: ignore[misc]
    for name, times in steps.items():
        found[name]["step"] = statistics.median(times)
    return found


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16, short prompts and long ones."""
    transformers.logging.set_verbosity_error()
    bounds, results = limits.measure(torch.get_num_threads()), []
    for name, dtype in DTYPES.items():
        stock = model(dtype)
        models = {"transformers": stock, "accelerated": qkv.accelerate(copy.deepcopy(stock))}
        for tokens in PROMPTS:
            measure(models, torch.randint(49152, (1, 16)))
            found = measure(models, torch.randint(49152, (1, tokens)))
            results.append({"dtype": name, "tokens": tokens, "seconds": found})
            theirs, ours = found["transformers"], found["accelerated"]
            ratios = {part: round(theirs[part] / ours[part], 2) for part in theirs}
            print(f"{name} {tokens:>5} tokens: transformers {theirs}, times as fast {ratios}", flush=True)
    machine.save("one_line", {"limits": bounds, "measurements": results})


if __name__ == "__main__":
    main()
