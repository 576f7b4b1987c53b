"""Packed sequences and paged KV caches: one call of qkv against gathering and padding.

    python benchmarks/sequences.py      measures, prints, and writes results/PROCESSOR/sequences.json

A decoding step over pages is compared with gathering them first, on qkv and on torch; packed sequences with torch's
attention over a padded batch, without the time of padding.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import Any

import torch
import torch.nn.functional as F
from harness import machine
from torch import Tensor

from qkv.bench.timing import interleaved
from qkv.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

OURS = "qkv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 15
REST_SECONDS = 0.02

Candidate = Callable[[], Any]


def step_over_pages(dtype: torch.dtype, batch: int, tokens: int, page_size: int) -> dict[str, Candidate]:
    """A decoding step of 32 heads on 8 of 128; pages are in random order in the pool."""
    pages = batch * tokens // page_size
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, pages, page_size, 8, 128, generator=generator).to(dtype)
    q = torch.randn(batch, 1, 32, 128, generator=generator).to(dtype)
    table = torch.randperm(pages, generator=generator).view(batch, -1)

    def gather(pool: Tensor) -> Tensor:
        return pool[table].flatten(1, 2)

    def torch_call() -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (q, gather(k), gather(v)))
        return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True).transpose(1, 2)

    options: dict[str, Any] = {"cache_seqlens": torch.full((batch,), tokens), "causal": True}
    candidates: dict[str, Candidate] = {
        OURS: lambda: flash_attn_with_kvcache(q, k, v, block_table=table, **options),
        "gathered first": lambda: flash_attn_with_kvcache(q, gather(k), gather(v), **options),
        "torch, gathered first": torch_call,
    }
    for call in candidates.values():
        torch.testing.assert_close(call(), torch_call(), rtol=0.05, atol=0.05)
    return candidates


def packed(dtype: torch.dtype, lengths: list[int], *, backward: bool) -> dict[str, Candidate]:
    """Packed sequences with 12 heads of 64, as in BERT; returns the output, or the gradient of q with backward."""
    longest, total = max(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = torch.randn(4, total, 12, 64, generator=generator).to(dtype)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def padded(x: Tensor) -> Tensor:
        memory = torch.zeros(len(lengths), longest, 12, 64, dtype=dtype)
        memory[real] = x
        return memory.transpose(1, 2)

    queries, keys, values, d_batch = (padded(x) for x in (q, k, v, d_out))
    for x in (q, k, v, queries, keys, values):
        x.requires_grad_(backward)
    mask = None if real.all() else real[:, None, None]

    def ours() -> Tensor:
        out = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, (q, k, v), d_out)[0] if backward else out

    def theirs() -> Tensor:
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return torch.autograd.grad(out, (queries, keys, values), d_batch)[0] if backward else out

    # Padding and unpadding are not timed.
    torch.testing.assert_close(ours(), theirs().transpose(1, 2)[real], rtol=0.05, atol=0.05)
    return {OURS: ours, "torch, padded": theirs}


def cases() -> Iterator[tuple[str, str, dict[str, Candidate]]]:
    """Name, dtype and candidates of each case, created on demand."""
    mixed = torch.randint(1, 129, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = {"64 of 16": [16] * 64, "1024 of 16": [16] * 1024, "64 of 1 to 128": mixed}
    for name, dtype in DTYPES.items():
        for batch, tokens, page_size in product((1, 8), (512, 4096), (16, 64, 256)):
            words = f"decoding, batch {batch}, {tokens} tokens in pages of {page_size}"
            yield words, name, step_over_pages(dtype, batch, tokens, page_size)
        for (words, lengths), backward in product(texts.items(), (False, True)):
            yield f"packed, {words}{', backward' * backward}", name, packed(dtype, lengths, backward=backward)


def main() -> None:
    """Measures every case in fp32 and bf16."""
    argparse.ArgumentParser(
        description="Packed sequences and paged KV caches against gathering and padding."
    ).parse_args()
    results = []
    for name, dtype, candidates in cases():
        times = interleaved(candidates, rounds=ROUNDS, rest_seconds=REST_SECONDS)
        results.append({"case": name, "dtype": dtype, "times": times})
        ours = times[OURS]["median_us"]
        peers = (f"{peer} {found['median_us'] / ours:.2f}" for peer, found in times.items() if peer != OURS)
        print(f"{name:<52} {dtype:<5} {ours:>10.1f} us; times as long: {', '.join(peers)}", flush=True)
    machine.save("sequences", {"measurements": results})


if __name__ == "__main__":
    main()
