"""Whether a function is a copy of a known one: libraries of models copy forwards from file to file."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def is_copy_of(function: object, known: Callable[..., Any]) -> bool:
    """Whether calling the function does what ``known`` does, up to names of arguments: bytecode, names of attributes
    and constants are equal, and its file means the same by the modules that ``known`` names.
    """
    assert isinstance(known, FunctionType)
    if type(function) is not FunctionType or _essence(function) != _essence(known):
        return False
    names = known.__globals__.keys() & known.__code__.co_names
    return all(function.__globals__.get(name) is known.__globals__[name] for name in names)


def _essence(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    return (
        *(code.co_code, code.co_names, repr(code.co_consts), code.co_flags, getattr(code, "co_exceptiontable", b"")),
        *(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, len(code.co_varnames)),
        *(code.co_freevars, code.co_cellvars, function.__defaults__, function.__kwdefaults__),
    )
