"""Whole layers on few tokens and on many: a decoding step, a short call and a forward pass, beside what bounds them.

    python benchmarks/step.py      measures, prints, and writes results/PROCESSOR/step.json

- A step of a layer with rotary and 4096 tokens behind it: its time, and the rate at which it reads weights and cache,
  beside that of reading memory in turns with it.
- A step of the README's first layer at 64, 512 and 4096 tokens against the same written by hand in torch: cached tables
  of rotary, ``torch.cat`` and ``scaled_dot_product_attention``.
- A call of 16 tokens against the fused inference of ``nn.MultiheadAttention``.
- A forward pass of 2048 tokens against its four products and its attention, timed alone.

All are called in turns. Between two calls, nothing else runs; weights larger than the caches come from memory.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import limits, machine, reading
from torch import Tensor, nn

import qkv
from qkv.bench.timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = ((576, 9, 3), (2048, 32, 8), (4096, 32, 8))
CONTEXT = 4096
SPARE = 64
"""Steps from one context to the next."""
ROUNDS = 15

Call = Callable[[], object]


def causal(width: int, heads: int, kv_heads: int, dtype: torch.dtype) -> qkv.CausalAttention:
    """A layer with rotary and without biases, as in Llama."""
    torch.manual_seed(0)
    rotary = qkv.RotaryEmbedding(width // heads)
    layer = qkv.CausalAttention(width, heads, num_kv_heads=kv_heads, rotary=rotary, bias=False, dtype=dtype)
    return layer.eval()


def step(layer: qkv.Attention, tokens: int) -> Call:
    """A decoding step with so many tokens behind it."""
    cache, dtype = qkv.KVCache(capacity=tokens + SPARE), layer.q_proj.weight.dtype
    for part in torch.randn(1, tokens, layer.embed_dim).to(dtype).split(512, dim=1):
        layer(part, cache=cache)
    x = torch.randn(1, 1, layer.embed_dim).to(dtype)

    def call() -> Tensor:
        if cache.length == tokens + SPARE:
            cache.crop(tokens)
        return layer(x, cache=cache)

    return call


def step_by_hand(layer: qkv.Attention, tokens: int) -> Call:
    """The same in twenty lines of torch, with the weights of the layer."""
    heads, kv_heads, width = layer.num_heads, layer.num_kv_heads, layer.head_dim
    dtype = layer.q_proj.weight.dtype
    angles = torch.arange(tokens + 1)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    cos, sin = (table.to(dtype).repeat(1, 2) for table in (angles.cos(), angles.sin()))
    keys, values = torch.randn(2, 1, kv_heads, tokens, width).to(dtype)
    x = torch.randn(1, 1, layer.embed_dim).to(dtype)

    def rotate(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * cos[-1:] + torch.cat([-second, first], dim=-1) * sin[-1:]

    def call() -> Tensor:
        q = F.linear(x, layer.q_proj.weight).view(1, 1, heads, width).transpose(1, 2)
        k = F.linear(x, layer.k_proj.weight).view(1, 1, kv_heads, width).transpose(1, 2)
        v = F.linear(x, layer.v_proj.weight).view(1, 1, kv_heads, width).transpose(1, 2)
        k, v = torch.cat([keys, rotate(k)], dim=2), torch.cat([values, v], dim=2)
        out = F.scaled_dot_product_attention(rotate(q), k, v, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), layer.out_proj.weight)

    return call


def short_calls(dtype: torch.dtype) -> dict[str, Call]:
    """16 tokens through a multi-head layer, and its attention alone."""
    theirs = nn.MultiheadAttention(64, 8, batch_first=True, dtype=dtype).eval()
    ours, x = qkv.MultiHeadAttention.from_torch(theirs).eval(), torch.randn(1, 16, 64).to(dtype)
    q = torch.randn(1, 8, 16, 64).to(dtype)
    return {
        "layer": functools.partial(ours, x),
        "nn.MultiheadAttention": lambda: theirs(x, x, x, need_weights=False),
        "attention": functools.partial(qkv.attention, q, q, q),
        "scaled_dot_product_attention": functools.partial(F.scaled_dot_product_attention, q, q, q),
    }


def forward_calls(layer: qkv.Attention, tokens: int) -> dict[str, Call]:
    """A forward pass, and the sum of its products and its attention."""
    dtype = layer.q_proj.weight.dtype
    x = torch.randn(1, tokens, layer.embed_dim).to(dtype)
    q, k = (torch.randn(1, n, tokens, layer.head_dim).to(dtype) for n in (layer.num_heads, layer.num_kv_heads))
    weights = [linear.weight for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)]

    def parts() -> None:
        for weight in weights:
            F.linear(x, weight)
        qkv.attention(q, k, k, mask=qkv.Mask.causal())

    return {"layer": functools.partial(layer, x), "its parts": parts}


def times(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, Any]:
    """The results of `interleaved`, in microseconds."""
    return interleaved(calls, rounds=rounds)


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16."""
    argparse.ArgumentParser(description="Whole layers on few tokens and on many, beside what bounds them.").parse_args()
    bounds = limits.measure(torch.get_num_threads())
    read_memory = reading.Reading()
    results: dict[str, list[Any]] = {"steps": [], "by_hand": [], "short": [], "forward": []}
    for name, dtype in DTYPES.items():
        for sizes in STEPS:
            layer = causal(*sizes, dtype)
            found = times({"step": step(layer, CONTEXT), reading.NAME: read_memory})
            read = sum(parameter.nbytes for parameter in layer.parameters())
            read += 2 * CONTEXT * layer.num_kv_heads * layer.head_dim * dtype.itemsize
            rate = read / found["step"]["median_us"] / 1e3
            limit = read_memory.gb_per_s(found[reading.NAME]["median_us"])
            case = {"layer": sizes, "dtype": name, "times": found}
            results["steps"].append({**case, "gb_per_s": rate, "reading_gb_per_s": limit})
            took = found["step"]["median_us"]
            print(f"step {sizes} {name} {took:9.1f} us, {rate:5.1f} GB/s, {rate / limit:.0%} of reading", flush=True)
        layer = causal(512, 8, 2, dtype)
        for tokens in (64, 512, 4096):
            found = times({"layer": step(layer, tokens), "by hand": step_by_hand(layer, tokens)}, rounds=5 * ROUNDS)
            results["by_hand"].append({"tokens": tokens, "dtype": name, "times": found})
            ours, theirs = (found[key]["median_us"] for key in ("layer", "by hand"))
            print(f"README's layer at {tokens} {name} {ours:9.1f} us, by hand {theirs / ours:.2f} as long", flush=True)
        found = times(short_calls(dtype), rounds=5 * ROUNDS)
        results["short"].append({"dtype": name, "times": found})
        print("16 tokens", name, {key: round(each["median_us"], 1) for key, each in found.items()}, flush=True)
        found = times(forward_calls(causal(2048, 32, 8, dtype), 2048), rounds=5)
        results["forward"].append({"layer": (2048, 32, 8), "tokens": 2048, "dtype": name, "times": found})
        ratio = found["layer"]["median_us"] / found["its parts"]["median_us"]
        print(f"forward of 2048 tokens {name}: {ratio:.3f} of its parts", flush=True)
    machine.save("step", {"limits": bounds, **results})


if __name__ == "__main__":
    main()
