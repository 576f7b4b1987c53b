"""Caches in other processes: for each start method, they have the tokens and are independent."""

from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import transformers

import qkv
from qkv.integrations.transformers.cache import QKVCache, SlidingLayer

LENGTH = 5


def tokens(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count).float()[None, None, :, None].expand(2, 3, -1, 4) / 64


def caches() -> dict[str, Any]:
    """Each kind of cache, with tokens 0 to 4."""
    ours = [qkv.KVCache(), qkv.Int8KVCache(), qkv.SlidingKVCache(4), qkv.CrossKVCache()]
    ours += [qkv.SlidingKVCache(4, dtype="int8"), qkv.PagedKVCache(page_size=2), qkv.PagedKVCache(dtype="int8")]
    for cache in ours:
        cache.append(tokens(0, LENGTH), tokens(0, LENGTH))
    latent = qkv.LatentKVCache()
    latent.append(tokens(0, LENGTH)[:, :1], tokens(0, LENGTH)[:, :1])
    config = transformers.LlamaConfig(num_hidden_layers=1)
    whole = [QKVCache(config), QKVCache(config, dtype=torch.int8)]
    for cache in whole:
        cache.update(tokens(0, LENGTH), tokens(0, LENGTH), 0)
    layer = SlidingLayer(4)
    layer.update(tokens(0, LENGTH), tokens(0, LENGTH))
    names = [
        "kv",
        "int8",
        "sliding",
        "cross",
        "sliding in int8",
        "paged",
        "paged in int8",
        "latent",
        "transformers",
        "transformers in int8",
        "transformers' window",
    ]
    return dict(zip(names, [*ours, latent, *whole, layer], strict=True))


def last_keys(cache: Any, start: int) -> list[float]:
    """One number of each key, after the token ``start`` is appended."""
    new = tokens(start, 1), tokens(start, 1)
    if isinstance(cache, qkv.CrossKVCache):
        return [round(x * 64) for x in cache.keys().k[0, 0, :, 0].tolist()]
    if isinstance(cache, qkv.LatentKVCache):
        return [round(x * 64) for x in cache.append(*(x[:, :1] for x in new)).k[0, 0, :, 0].tolist()]
    if isinstance(cache, qkv.KVCache | qkv.SlidingKVCache | qkv.PagedKVCache):
        keys = cache.append(*new).gathered()
        k = keys.k if keys.k_scale is None else keys.k.float() * keys.k_scale[..., None]
    else:
        k = cache.update(*new, 0)[0].clone()
    return [round(x * 64) for x in k[0, 0, :, 0].tolist()]


@torch.no_grad()
def answer(sent: dict[str, Any], results: Connection) -> None:
    """The other process: appends to each cache and sends it back."""
    results.send({name: last_keys(cache, LENGTH) for name, cache in sent.items()})
    results.close()


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.long)])
@torch.no_grad()
def test_a_process_appends_to_the_caches_that_it_is_sent(method: str) -> None:
    context, sent = get_context(method), caches()
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sent, theirs))
    process.start()
    theirs.close()
    got = mine.recv()
    process.join()
    assert process.exitcode == 0
    assert got == {name: last_keys(cache, LENGTH) for name, cache in caches().items()}
    assert got["kv"] == [0, 1, 2, 3, 4, 5]
    # The caches of this process are unchanged.
    assert got == {name: last_keys(cache, LENGTH) for name, cache in sent.items()}
