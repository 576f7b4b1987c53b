"""`between_graphs`: functions that a compiled program calls between its graphs, as eager code does."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from typing_extensions import ParamSpec

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def between_graphs(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """The function, which `torch.compile` calls and does not follow.

    What it sends follows from a plan of ints, which a compiler would evaluate step by step and guard. And each rank has
    a program for its own rows: one that moves a collective among other operators might do so on some ranks alone.

    With ``fullgraph=True``, compilation raises ``torch._dynamo.exc.Unsupported`` and says what to do.
    """

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if torch.compiler.is_dynamo_compiling():
            from qkv.parallel import eager  # imports the compiler, which takes a second

            found: _Result = eager.call(function, *args, **kwargs)
            return found
        return function(*args, **kwargs)

    return call
