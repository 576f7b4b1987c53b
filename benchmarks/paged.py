"""A decoding step from a paged cache against one that is contiguous: the cache update and attention, and a whole layer.

    python benchmarks/paged.py      measures, prints, and writes results/PROCESSOR/paged.json

8 query heads on 2 of 64, in one thread. Both caches take the same prompt and then as many tokens one by one, so rows of
a batch take their pages in turns. Times are those that the thread spent computing, which other processes change less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from harness import machine

import qkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, KV_HEADS, WIDTH, PAGE_SIZE = 8, 2, 64, 16
SECONDS = 3.0

Call = Callable[[], object]


def calls(kind: str, dtype: torch.dtype, batch: int, tokens: int) -> dict[str, Call]:
    """A step of each cache, with ``tokens`` in it."""
    generator = torch.Generator().manual_seed(0)
    layer = qkv.CausalAttention(HEADS * WIDTH, HEADS, num_kv_heads=KV_HEADS, dtype=dtype).eval()
    x = torch.randn(batch, 1, HEADS * WIDTH, generator=generator).to(dtype)
    q, k = (torch.randn(batch, heads, 1, WIDTH, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS))
    text, mask = torch.randn(batch, KV_HEADS, tokens, WIDTH, generator=generator).to(dtype), qkv.Mask.causal()
    caches: dict[str, qkv.KVCache | qkv.PagedKVCache]
    caches = {"contiguous": qkv.KVCache(), "paged": qkv.PagedKVCache(page_size=PAGE_SIZE)}
    for cache in caches.values():
        for part in text.split([tokens // 2, *[1] * (tokens - tokens // 2)], dim=2):
            cache.append(part, part)

    def attend(cache: qkv.KVCache | qkv.PagedKVCache) -> object:
        keys = cache.append(k, k)
        return qkv.attention(q, keys.k, keys.v, mask=mask, **keys.options())

    if kind == "layer":
        return {name: lambda cache=cache: layer(x, cache=cache) for name, cache in caches.items()}  # type: ignore[misc]
    return {name: lambda cache=cache: attend(cache) for name, cache in caches.items()}  # type: ignore[misc]


def measure(candidates: dict[str, Call]) -> dict[str, float]:
    """Median microseconds of each, called in turns."""
    times: dict[str, list[int]] = {name: [] for name in candidates}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, call in candidates.items():
            start = time.thread_time_ns()
            call()
            times[name].append(time.thread_time_ns() - start)
    return {name: statistics.median(found) / 1e3 for name, found in times.items()}


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16, one row and eight."""
    argparse.ArgumentParser(
        description="A decoding step from a paged cache against one that is contiguous."
    ).parse_args()
    torch.set_num_threads(1)
    results = []
    for batch, name, tokens, kind in product((1, 8), DTYPES, (512, 2048, 16384), ("update and attention", "layer")):
        times = measure(calls(kind, DTYPES[name], batch, tokens))
        results.append({"batch": batch, "dtype": name, "tokens": tokens, "what": kind, "median_us": times})
        ratio = times["paged"] / times["contiguous"]
        print(
            f"batch {batch} {name} {tokens:>6} {kind:<21} {times['contiguous']:>9.1f} us, in pages {ratio:.2f}",
            flush=True,
        )
    machine.save("paged", {"measurements": results})


if __name__ == "__main__":
    main()
