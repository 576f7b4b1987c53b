"""What a function does, by its bytecode: whether it is one that is known from its source."""

from types import CodeType
from typing import Any


def identity(code: CodeType) -> tuple[Any, ...]:
    """What a function does, apart from what its names refer to and from where it stands."""
    arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_varnames)
    return (code.co_code, code.co_names, code.co_consts, *arguments)


def compiled(source: str) -> CodeType:
    """The code of the only function in a source, which is not run.

    The source has the imports of what it calls methods of: compilers write those calls otherwise.
    """
    constants = compile(source, "<a known function>", "exec", dont_inherit=True).co_consts
    return next(constant for constant in constants if isinstance(constant, CodeType))
