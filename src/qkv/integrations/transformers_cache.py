"""The former name of `qkv.integrations.transformers.cache`, until 0.1.0 is released."""

from qkv.integrations.transformers.cache import QKVCache as QKVCache
