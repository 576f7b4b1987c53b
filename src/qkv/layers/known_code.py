"""Whether a function is a copy of a known one: libraries of models copy forwards from file to file."""

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


def is_copy_of(function: object, known: Callable[..., Any]) -> bool:
    """Whether calling the function does what ``known`` does, up to names of variables: bytecode, names of attributes
    and constants are equal, and its file means the same by the modules that ``known`` names.
    """
    assert isinstance(known, FunctionType)
    if type(function) is not FunctionType or _called_with(function) != _called_with(known):
        return False
    names = known.__globals__.keys() & known.__code__.co_names
    return all(function.__globals__.get(name) is known.__globals__[name] for name in names)


def _called_with(function: FunctionType) -> tuple[Any, ...]:
    return essence(function.__code__), function.__defaults__, function.__kwdefaults__


def essence(code: CodeType) -> tuple[Any, ...]:
    """What a function does, apart from what its names refer to, and from the names of its variables."""
    return (
        *(code.co_code, code.co_names, repr(code.co_consts), code.co_flags, getattr(code, "co_exceptiontable", b"")),
        *(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, len(code.co_varnames)),
        *(code.co_freevars, code.co_cellvars),
    )


def compiled(source: str) -> CodeType:
    """The code of the only function in a source, which is not run.

    The source has the imports of what it calls methods of: compilers write those calls otherwise.
    """
    constants = compile(source, "<a known function>", "exec", dont_inherit=True).co_consts
    return next(constant for constant in constants if isinstance(constant, CodeType))
