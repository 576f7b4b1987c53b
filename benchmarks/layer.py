"""One layer of a decoding step in transformers: the cache update and attention.

    python benchmarks/layer.py      measures, prints, and writes results/PROCESSOR/layer.json

Thirty layers of the size of SmolLM2-135M with 4096 cached tokens. Each is measured between the products with its own
weights, which evict keys, values and code from the CPU caches as in a model, and alone, repeatedly.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import models
import torch
from harness import machine
from models import CONTEXT, STEPS
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig

from qkv.bench.timing import Spread, spread
from qkv.integrations.transformers.attention import register

LAYERS = 30
HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 576, 1536, 9, 3, 64

KINDS = {kind: made for kind, made in models.KINDS.items() if kind != "without attention"}
"""Attention implementation and cache, by name."""


class Layer(nn.Module):
    """The weights of a layer, and the attributes that transformers' attention functions read."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal = True
        before = [(HIDDEN, HEADS * WIDTH), (HIDDEN, KV_HEADS * WIDTH), (HIDDEN, KV_HEADS * WIDTH)]
        after = [(HEADS * WIDTH, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
        self.before, self.after = ([torch.randn(*shape).to(dtype) for shape in shapes] for shapes in (before, after))


def heads(dtype: torch.dtype, number: int, tokens: int) -> Tensor:
    """Random heads ``(1, number, tokens, WIDTH)`` in the memory order of layers, (1, tokens, number, WIDTH)."""
    return torch.randn(1, tokens, number, WIDTH).to(dtype).transpose(1, 2)


def steps(layers: list[Layer], kind: str, dtype: torch.dtype, *, alone: bool) -> Iterator[tuple[float, float]]:
    """Microseconds of the cache update and of attention, for each layer of each step."""
    implementation, new_cache = KINDS[kind]
    attend: Any = AttentionInterface()[implementation]
    cache = new_cache(LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS))
    for index in range(LAYERS):
        cache.update(heads(dtype, KV_HEADS, CONTEXT), heads(dtype, KV_HEADS, CONTEXT), index)
    tokens = {size: torch.randn(1, size).to(dtype) for size in (HIDDEN, HEADS * WIDTH, INNER)}
    new = [heads(dtype, number, 1) for number in (HEADS, KV_HEADS, KV_HEADS)]
    while True:
        for index in [0] * LAYERS if alone else range(LAYERS):
            layer = layers[index]
            for weight in [] if alone else layer.before:
                tokens[weight.shape[0]] @ weight
            start = time.perf_counter()
            keys, values = cache.update(new[1], new[2], index)
            updated = time.perf_counter()
            attend(layer, new[0], keys, values, None, dropout=0.0, scaling=WIDTH**-0.5)
            yield (updated - start) * 1e6, (time.perf_counter() - updated) * 1e6
            for weight in [] if alone else layer.after:
                tokens[weight.shape[0]] @ weight


def measure(dtype: torch.dtype, *, alone: bool) -> dict[str, dict[str, Spread]]:
    """Measures all kinds, interleaved by step."""
    layers = [Layer(dtype) for _ in range(LAYERS)]
    running = {kind: steps(layers, kind, dtype, alone=alone) for kind in KINDS}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for index in range(1 + STEPS):
        for kind, run in running.items():
            found = [next(run) for _ in range(LAYERS)]
            times[kind] += found if index else []
    return {
        kind: {
            "update": spread([update for update, _ in found]),
            "attention": spread([attention for _, attention in found]),
            "both": spread([update + attention for update, attention in found]),
        }
        for kind, found in times.items()
    }


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16."""
    argparse.ArgumentParser(
        description="One layer of a decoding step in transformers: the cache update and attention."
    ).parse_args()
    register()
    print(f"{'dtype':<6} {'where':<16} {'kind':<10} {'update us':>10} {'attention us':>13} {'both us':>9}")
    results = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for where in ("between weights", "alone"):
            for kind, times in measure(dtype, alone=where == "alone").items():
                results.append({"dtype": name, "where": where, "kind": kind, "times": times})
                update, attention, both = (times[part]["median_us"] for part in ("update", "attention", "both"))
                print(f"{name:<6} {where:<16} {kind:<10} {update:>10.1f} {attention:>13.1f} {both:>9.1f}", flush=True)
    machine.save("layer", {"measurements": results})


if __name__ == "__main__":
    main()
