"""`decoding`: time of a decoding step and size of the KV cache, by number of key/value heads."""

from functools import partial
from typing import TypedDict

import torch
from model import LanguageModel, converted
from settings import Settings

import qkv
from qkv.bench.timing import interleaved


class Step(TypedDict):
    """A decoding step: median and quartiles of its time, and cache bytes per token over all layers."""

    median_us: float
    low_us: float
    high_us: float
    kv_bytes_per_token: int


@torch.no_grad()
def decoding(settings: Settings) -> dict[str, Step]:
    """Measures a step of all attention layers in fp32 on random caches, for each number of key/value heads."""
    original = LanguageModel(settings)
    x = torch.randn(1, 1, settings.width)

    def step(layers: list[qkv.Attention], caches: list[qkv.KVCache]) -> None:
        for layer, cache in zip(layers, caches, strict=True):
            layer(x, cache=cache)
            cache.crop(settings.context)

    candidates, sizes = {}, {}
    for heads in (settings.num_heads, *settings.num_kv_heads):
        layers = converted(original, heads, "mean", seed=0).attentions
        caches = [_filled(heads, settings) for _ in layers]
        candidates[str(heads)] = partial(step, layers, caches)
        sizes[str(heads)] = sum(cache.nbytes for cache in caches) // (settings.context + 1)
    times = interleaved(candidates)
    return {heads: {**times[heads], "kv_bytes_per_token": sizes[heads]} for heads in candidates}


def _filled(heads: int, settings: Settings) -> qkv.KVCache:
    """A cache with ``context`` tokens and capacity for one more."""
    cache = qkv.KVCache(capacity=settings.context + 1)
    keys = torch.randn(1, heads, settings.context, settings.head_dim)
    cache.append(keys, keys)
    return cache
