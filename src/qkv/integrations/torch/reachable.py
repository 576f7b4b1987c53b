"""`reaches_attention`: whether the code of a module may call torch's attention, as far as names in it tell.

Linear layers in wrappers, as of adapters, are called often and attend to nothing. Code that calls attention without a
name that says so is taken for code that does not; then torch computes it.
"""

import functools
import sys
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from qkv.layers.instance_forward import InstanceForward

_WORDS = ("attention", "attn", "sdpa")
"""Parts of names of functions that attend, of torch and of others."""

_CALLED = ("forward", "__call__", "__init__")
"""The methods that run where an object or its class is called."""


def reaches_attention(module: nn.Module) -> bool:
    """Whether the code of a module itself, not of modules within, names attention or calls code that does."""
    kind: Any = type(module)
    if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return True
    if kind.__module__.startswith("torch.nn."):
        return False
    if kind.__module__.startswith("torch."):  # programs, whose code is not Python's
        return True
    own = [value for value in vars(module).values() if callable(value) and not isinstance(value, InstanceForward)]
    return (
        any(map(_says_so, own)) or any(_reaches(kind, kind.forward)) or any(any(_reaches(None, call)) for call in own)
    )


def _reaches(kind: type | None, call: Any) -> Iterator[bool]:
    """For each function that a call runs, as far as names tell, whether it names attention. ``kind``: of its self."""
    seen: set[object] = set()
    waiting: list[tuple[type | None, Any]] = [(kind, call)]
    while waiting:
        kind, call = waiting.pop()
        for owner, function in _functions(kind, call):
            if (owner, function) not in seen and not _is_foreign(function.__module__):
                seen.add((owner, function))
                names = _names(function.__code__)
                values = list(_values(owner, function, names))
                yield any(map(_is_attention, names)) or any(_says_so(value) for _, value in values)
                waiting += values


def _functions(kind: type | None, call: Any) -> Iterator[tuple[type | None, FunctionType]]:
    """The functions in Python that a call runs, with the classes of their ``self``."""
    if isinstance(call, MethodType):
        kind, call = type(call.__self__), call.__func__
    if isinstance(call, functools.partial):
        yield from _functions(None, call.func)
    elif isinstance(call, FunctionType):
        yield kind, call
        if hasattr(call, "__wrapped__"):
            yield from _functions(kind, call.__wrapped__)
    elif callable(call):
        owner = call if isinstance(call, type) else type(call)
        methods = (getattr(owner, name, None) for name in _CALLED)
        yield from ((owner, method) for method in methods if isinstance(method, FunctionType))


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


def _values(kind: type | None, function: FunctionType, names: frozenset[str]) -> Iterator[tuple[type | None, Any]]:
    """What can be called of the values of names: methods, globals, what modules and tables among these have, and
    variables outside of a function.
    """
    for base in () if kind is None else kind.__mro__:  # all, for calls of super()
        for name in names & vars(base).keys():
            method = vars(base)[name]
            yield kind, getattr(method, "__func__", getattr(method, "fget", method))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    found += [_content(cell) for cell in function.__closure__ or ()]
    for value in found:
        if isinstance(value, ModuleType) and not _is_foreign(value.__name__):
            yield from ((None, vars(value)[name]) for name in names & vars(value).keys())  # imports nothing
        elif type(value) is dict:
            yield from ((None, each) for each in value.values())
        else:
            yield None, value


def _content(cell: CellType) -> Any:
    """What a variable outside of a function is; None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _says_so(value: Any) -> bool:
    return callable(value) and _is_attention(str(getattr(value, "__name__", "")))


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in _WORDS)


def _is_foreign(module: str | None) -> bool:
    """Whether a module is torch's or Python's own, whose names alone tell."""
    package = str(module).partition(".")[0]
    return package in ("torch", "numpy") or package in sys.stdlib_module_names
