"""Caches of keys and values. A cache is passed to each call of a layer; layers own none."""

import torch

from qkv.cache.base import Cache as Cache
from qkv.cache.base import Keys as Keys
from qkv.cache.base import Owner as Owner
from qkv.cache.buffer import AppendBuffer
from qkv.cache.cross import CrossKVCache as CrossKVCache
from qkv.cache.format import Format
from qkv.cache.int8 import Int8
from qkv.cache.int8 import quantize as quantize
from qkv.cache.kv import Int8KVCache as Int8KVCache
from qkv.cache.kv import KVCache as KVCache
from qkv.cache.latent import LatentKVCache as LatentKVCache
from qkv.cache.latent import Latents
from qkv.cache.model import Caches as Caches
from qkv.cache.paged import PagedKVCache as PagedKVCache
from qkv.cache.pool import PagePool as PagePool
from qkv.cache.pool import PageTable
from qkv.cache.rows import Rows
from qkv.cache.sliding import SlidingKVCache as SlidingKVCache
from qkv.pages import Pages as Pages

__all__ = [
    "Cache",
    "Caches",
    "CrossKVCache",
    "Int8KVCache",
    "KVCache",
    "Keys",
    "LatentKVCache",
    "Owner",
    "PagePool",
    "PagedKVCache",
    "Pages",
    "SlidingKVCache",
    "quantize",
]

torch.serialization.add_safe_globals(
    [
        *(AppendBuffer, Rows, PageTable, Owner, Format, Int8, Latents),
        *(KVCache, Int8KVCache, SlidingKVCache, CrossKVCache, LatentKVCache, PagedKVCache, Caches),
    ]
)
