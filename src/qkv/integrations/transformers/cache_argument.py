"""The argument with the cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

Forwards that take it are wrapped since, by transformers' ``deprecate_kwarg``, which replaces the former name. Here such
a forward is read, and changed, within its wrapper.
"""

import functools
from types import CellType, CodeType, FunctionType
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the argument with the cache, and of the output with it, the newest first."""


@functools.cache
def cache_name() -> str:
    """The name of the argument in the models of this release."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model; None if it has none."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


@functools.lru_cache(maxsize=1024)
def wrapped(forward: Any) -> Any:
    """The forward within wrappers that replace former names of arguments: the same for calls without such a name."""
    cells = _cells(forward)
    return forward if cells is None else wrapped(cells["func"].cell_contents)


@functools.lru_cache(maxsize=1024)
def former_names(forward: Any) -> frozenset[str]:
    """The names of arguments that the wrappers of a forward replace."""
    cells = _cells(forward)
    if cells is None:
        return frozenset()
    return former_names(cells["func"].cell_contents) | {str(cells["old_name"].cell_contents)}


def with_wrapped(forward: FunctionType, inner: FunctionType) -> FunctionType:
    """A forward with another one in its wrappers."""
    cells = _cells(forward)
    if cells is None:
        return inner
    cells["func"] = CellType(with_wrapped(cells["func"].cell_contents, inner))
    copied = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(cells.values())
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _cells(forward: Any) -> dict[str, CellType] | None:
    """The variables of a wrapper; None of what is none."""
    if type(forward) is not FunctionType or forward.__code__ is not _code_of_wrappers():
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells if {"func", "old_name"} <= cells.keys() else None


@functools.cache
def _code_of_wrappers() -> CodeType | None:
    """The code that all wrappers share; None for releases without them. Forwards are then read as they are."""
    try:
        from transformers.utils.deprecation import deprecate_kwarg

        code = deprecate_kwarg("former", "1000.0", new_name="name")(lambda name: name).__code__
    except (ImportError, AttributeError, TypeError):
        return None
    return code if isinstance(code, CodeType) else None
