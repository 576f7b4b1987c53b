"""Attention layers: every mechanism of the standard family, as one design of three independent choices.

Shapes, everywhere: B batch, H query heads, Hkv key/value heads (a divisor of H), Lq queries, Lk keys, D width of a
query and a key, Dv width of a value, E width of a model. Tensors of heads are (B, heads, length, width).
"""

import typing

from qkv import starting as starting  # first, since importing the others takes a second

# isort: split
from qkv.backends import BackendError as BackendError
from qkv.cache import Caches as Caches
from qkv.cache import CrossKVCache as CrossKVCache
from qkv.cache import Int8KVCache as Int8KVCache
from qkv.cache import KVCache as KVCache
from qkv.cache import LatentKVCache as LatentKVCache
from qkv.cache import PagedKVCache as PagedKVCache
from qkv.cache import PagePool as PagePool
from qkv.cache import SlidingKVCache as SlidingKVCache
from qkv.functional import attention as attention
from qkv.functional import attention_weights as attention_weights
from qkv.functional import attention_with_lse as attention_with_lse
from qkv.functional import explain as explain
from qkv.functional import merge as merge
from qkv.integrations.report import report as report
from qkv.integrations.torch.accelerate import accelerate as accelerate
from qkv.integrations.transformers.attention import register as register
from qkv.integrations.transformers.attention import unregister as unregister
from qkv.integrations.transformers.unpadding import unpad as unpad
from qkv.layers import Attention as Attention
from qkv.layers import CausalAttention as CausalAttention
from qkv.layers import ContinuousWindowPositionBias as ContinuousWindowPositionBias
from qkv.layers import CrossAttention as CrossAttention
from qkv.layers import CrossLayerAttention as CrossLayerAttention
from qkv.layers import DifferentialAttention as DifferentialAttention
from qkv.layers import GroupedQueryAttention as GroupedQueryAttention
from qkv.layers import LatentAttention as LatentAttention
from qkv.layers import MultiHeadAttention as MultiHeadAttention
from qkv.layers import MultiQueryAttention as MultiQueryAttention
from qkv.layers import RelativePositionBias as RelativePositionBias
from qkv.layers import RotaryEmbedding as RotaryEmbedding
from qkv.layers import RotaryEmbedding2d as RotaryEmbedding2d
from qkv.layers import RotaryScaling as RotaryScaling
from qkv.layers import ScaledDotProductAttention as ScaledDotProductAttention
from qkv.layers import SlidingWindowAttention as SlidingWindowAttention
from qkv.layers import WindowPositionBias as WindowPositionBias
from qkv.masks import Mask as Mask

if typing.TYPE_CHECKING:
    from qkv.integrations.transformers.cache import QKVCache as QKVCache

__all__ = [
    "Attention",
    "BackendError",
    "Caches",
    "CausalAttention",
    "ContinuousWindowPositionBias",
    "CrossAttention",
    "CrossKVCache",
    "CrossLayerAttention",
    "DifferentialAttention",
    "GroupedQueryAttention",
    "Int8KVCache",
    "KVCache",
    "LatentAttention",
    "LatentKVCache",
    "Mask",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "PagePool",
    "PagedKVCache",
    "QKVCache",
    "RelativePositionBias",
    "RotaryEmbedding",
    "RotaryEmbedding2d",
    "RotaryScaling",
    "ScaledDotProductAttention",
    "SlidingKVCache",
    "SlidingWindowAttention",
    "WindowPositionBias",
    "accelerate",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "explain",
    "merge",
    "register",
    "report",
    "unpad",
    "unregister",
]

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> typing.Any:
    """`QKVCache`, a subclass of transformers', which importing qkv does not import."""
    if name == "QKVCache":
        from qkv.integrations.transformers.cache import QKVCache

        return QKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
