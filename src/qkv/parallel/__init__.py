"""Attention over the ranks of a ``torch.distributed`` mesh."""

import typing

if typing.TYPE_CHECKING:
    from qkv.parallel.heads import Heads as Heads

__all__ = ["Heads"]


def __getattr__(name: str) -> typing.Any:
    """`Heads`, whose base class takes torch a second to import."""
    if name == "Heads":
        from qkv.parallel.heads import Heads

        return Heads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
