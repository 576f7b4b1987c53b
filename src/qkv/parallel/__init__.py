"""Attention over the ranks of a ``torch.distributed`` mesh."""

import typing

from qkv.parallel.attention import attention as attention
from qkv.parallel.attention import attention_with_lse as attention_with_lse
from qkv.parallel.context import over as over
from qkv.parallel.explaining import explain as explain
from qkv.parallel.merging import merge as merge
from qkv.parallel.sharded_cache import ShardedKVCache as ShardedKVCache
from qkv.parallel.tokens import WHOLE as WHOLE
from qkv.parallel.tokens import Tokens as Tokens

if typing.TYPE_CHECKING:
    from qkv.parallel.heads import Heads as Heads
    from qkv.parallel.style import Context as Context

__all__ = [
    "WHOLE",
    "Context",
    "Heads",
    "ShardedKVCache",
    "Tokens",
    "attention",
    "attention_with_lse",
    "explain",
    "merge",
    "over",
]


def __getattr__(name: str) -> typing.Any:
    """`Context` and `Heads`, whose base class takes torch a second to import."""
    if name == "Context":
        from qkv.parallel.style import Context

        return Context
    if name == "Heads":
        from qkv.parallel.heads import Heads

        return Heads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
