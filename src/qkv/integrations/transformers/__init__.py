"""qkv in models of transformers: attention (`register`), KV caches (`QKVCache`), decoding from latents
(`latent`), unpadded batches (`unpad`) and rotary embedding (`apply_rotary_pos_emb`).

`QKVCache` is imported lazily, since it imports transformers.
"""

from typing import TYPE_CHECKING, Any

from qkv.integrations.transformers.attention import register as register
from qkv.integrations.transformers.attention import unregister as unregister
from qkv.integrations.transformers.latent import latent as latent
from qkv.integrations.transformers.steps.rotary import apply_rotary_pos_emb as apply_rotary_pos_emb
from qkv.integrations.transformers.unpadding import unpad as unpad

if TYPE_CHECKING:
    from qkv.integrations.transformers.cache import QKVCache as QKVCache

__all__ = [
    "QKVCache",
    "apply_rotary_pos_emb",
    "latent",
    "register",
    "unpad",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name == "QKVCache":
        from qkv.integrations.transformers.cache import QKVCache

        return QKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
