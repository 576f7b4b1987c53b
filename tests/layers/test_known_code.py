"""Functions that are copies of a known one, and those that differ from it in one thing."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from qkv.layers.known_code import compiled, essence, is_copy_of

KNOWN = "def forward(self, x, scale=2.0, *, bias=None): return helper(self.up(x) * scale + 1)"


def function(source: str, helper: object = abs) -> FunctionType:
    names: dict[str, Any] = {"helper": helper, "other": round}
    exec(source, names)
    made = names["forward"]
    assert isinstance(made, FunctionType)
    return made


@pytest.mark.parametrize("source", [KNOWN, KNOWN.replace("self", "module"), KNOWN.replace("scale", "factor")])
def test_names_of_arguments_by_position_do_not_matter(source: str) -> None:
    assert is_copy_of(function(source), function(KNOWN))
    assert essence(compiled(source)) == essence(compiled(KNOWN))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" * ", " / "),  # bytecode alone
        ("x) * scale", "scale) * x"),  # which variables it reads
        ("self.up", "self.gate"),
        ("helper", "other"),
        ("+ 1", "+ 2"),
        ("+ 1", "+ 1.0"),
        ("scale=2.0", "scale=3.0"),
        ("bias=None", "bias=1"),
        ("*, bias", "bias"),
        ("bias=None", "shift=None"),
        ("*, bias=None", "**bias"),
        ("self, x", "self, x, /"),
        ("): return", "): y = 0; return"),
        ("def", "async def"),
    ],
)
def test_what_differs_in_one_thing_is_not_a_copy(old: str, new: str) -> None:
    assert old in KNOWN
    assert not is_copy_of(function(KNOWN.replace(old, new, 1)), function(KNOWN))


def test_a_name_that_means_another_function_is_another_function() -> None:
    assert not is_copy_of(function(KNOWN, helper=round), function(KNOWN))


@pytest.mark.parametrize("other", [function(KNOWN).__get__(object()), abs, FunctionType, None, lambda: None])
def test_what_is_not_such_a_function_is_not_a_copy(other: Callable[..., Any] | None) -> None:
    assert not is_copy_of(other, function(KNOWN))
