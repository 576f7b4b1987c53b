"""KV caches for transformers' models that append in place."""

from qkv.integrations.transformers.cache.append_layers import AppendLayer as AppendLayer
from qkv.integrations.transformers.cache.append_layers import LatentLayer as LatentLayer
from qkv.integrations.transformers.cache.append_layers import SlidingLayer as SlidingLayer
from qkv.integrations.transformers.cache.int8_layers import Int8Layer as Int8Layer
from qkv.integrations.transformers.cache.int8_layers import Int8SlidingLayer as Int8SlidingLayer
from qkv.integrations.transformers.cache.qkv_cache import QKVCache as QKVCache
from qkv.integrations.transformers.cache.qkv_cache import adopt as adopt
from qkv.integrations.transformers.cache.qkv_cache import asks_for as asks_for
from qkv.integrations.transformers.cache.qkv_cache import is_ours as is_ours
from qkv.integrations.transformers.cache.qkv_cache import is_replaced as is_replaced
