"""Multi-query and grouped-query attention: bytes of the cache, the time of a decoding step, and equal layers."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from settings import Settings

import qkv
from qkv.bench.timing import interleaved
from qkv.convert import convert_layer


@torch.no_grad()
def shared_heads(settings: Settings) -> dict[str, Any]:
    """A decoding step over a bf16 cache by number of KV heads, in qkv and in torch; bytes of the caches."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, keys = settings.decode_heads, settings.decode_dim, settings.decode_keys
    q = torch.randn(1, heads, 1, dim, generator=generator).bfloat16()
    steps, sizes = {}, {}
    for kv_heads in settings.decode_kv_heads:
        k, v = (torch.randn(1, kv_heads, keys, dim, generator=generator).bfloat16() for _ in range(2))
        cache = qkv.KVCache(capacity=keys)
        cache.append(k, v)
        sizes[str(kv_heads)] = cache.nbytes
        steps[f"qkv {kv_heads}"] = partial(qkv.attention, q, k, v)
        steps[f"torch {kv_heads}"] = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=kv_heads < heads)
    times = interleaved(steps, rounds=settings.rounds, seconds_per_round=settings.seconds_per_round)
    return {
        "cache_bytes": sizes,
        "step_us": {library: {n: times[f"{library} {n}"] for n in sizes} for library in ("qkv", "torch")},
    }


@torch.no_grad()
def between(settings: Settings) -> dict[str, Any]:
    """Whether grouped-query attention has multi-head and multi-query attention at its ends, bit for bit; conversion."""
    heads, width = 8, 8
    x = torch.randn(2, 30, heads * width, generator=torch.Generator().manual_seed(0))
    ends = {}
    for name, kv_heads, layer in (
        ("multi-head", heads, qkv.MultiHeadAttention(heads * width, heads)),
        ("multi-query", 1, qkv.MultiQueryAttention(heads * width, heads)),
    ):
        grouped = qkv.GroupedQueryAttention(heads * width, heads, kv_heads)
        grouped.load_state_dict(layer.state_dict())
        ends[name] = torch.equal(grouped(x), layer(x))
    whole = qkv.MultiHeadAttention(heads * width, heads)
    pooled = convert_layer(whole, 2)
    means = whole.k_proj.weight.view(2, 4, width, -1).mean(1).flatten(0, 1)
    return {"equal_bits": ends, "pooling_error": (pooled.k_proj.weight - means).abs().max().item()}
