"""qkv in models of transformers: its attention, its cache, and batches without their padding.

`QKVCache` is loaded when it is asked for, and transformers with it.
"""

from typing import TYPE_CHECKING, Any

from qkv.integrations.transformers.attention import register as register
from qkv.integrations.transformers.unpadding import unpad as unpad

if TYPE_CHECKING:
    from qkv.integrations.transformers.cache import QKVCache as QKVCache


def __getattr__(name: str) -> Any:
    if name == "QKVCache":
        from qkv.integrations.transformers.cache import QKVCache

        return QKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
