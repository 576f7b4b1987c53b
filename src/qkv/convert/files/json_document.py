"""`parse_json`: strict JSON in time linear in its length.

Refuses what Python's parser accepts: duplicate keys, NaN and infinities, lone surrogates, integers of more than
`MAX_DIGITS` digits, and (for files) nesting deeper than `MAX_LEVELS`.
"""

import gc
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkv.convert.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Of a document; the same limit as the safetensors library has for headers."""
MAX_DIGITS = 40
"""Of an integer: twice those of 64 bits."""
MAX_LEVELS = 100
"""Nesting depth of objects and lists in a file."""
ALL_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped surrogate, lone or part of a pair: a quick test before `_has_lone_surrogate`."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 100


def short_repr(value: object) -> str:
    """The repr of a value, shortened for error messages."""
    return _brief.repr(value)


class _Invalid:
    """Placeholder for an invalid value, so that its path can be reported after parsing."""

    def __init__(self, fault: str) -> None:
        self.fault = fault


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: for a file that is missing, unreadable, too large, nested too deeply or not a JSON object.
    """
    try:
        check_link(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} must have at most {MAX_BYTES} bytes; got {size}.")
        document = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    _check_levels(document, str(path))
    return document


def check_link(path: Path) -> None:
    """Raises a CheckpointError for a dangling link, such as in a partly deleted Hub cache."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a dangling link to {str(path.readlink())!r}. Download the file again.")


def parse_json(document: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON document. ``where`` names it in errors.

    Raises:
        CheckpointError: for anything else than a JSON object, and the extensions that the module refuses.
    """
    refused: list[_Invalid] = []

    def refuse(fault: str) -> _Invalid:
        refused.append(_Invalid(fault))
        return refused[-1]

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) < len(pairs):
            duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{where}: duplicate key {short_repr(duplicate)}.")
        return items

    def parse_int(digits: str) -> Any:
        return int(digits) if len(digits) <= MAX_DIGITS else refuse(f"an integer of {len(digits)} digits")

    def parse_float(digits: str) -> Any:
        return (
            value if math.isfinite(value := float(digits)) else refuse(f"{digits[:MAX_DIGITS]}, which overflows fp64")
        )

    has_long = b"0" * MAX_DIGITS in document.translate(ALL_ZERO)
    try:
        with paused_gc():
            value = json.loads(
                document.decode("utf-8"),
                object_pairs_hook=unique_keys,
                parse_int=parse_int if has_long else int,
                parse_float=parse_float,
                parse_constant=lambda word: refuse(f"{word}, which is not valid JSON"),
            )
        if refused:
            path = _find(value, lambda item: item is refused[0])
            raise CheckpointError(f"{where}: {path:.200} is {refused[0].fault}.")
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} must be a JSON object; got {type(value).__name__}.")
        if SURROGATE.search(document) and (path := _find(value, _has_lone_surrogate)):
            raise CheckpointError(f"{where}: {path:.200} contains a lone surrogate, which is not valid Unicode.")
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}.") from error
    return value


@contextmanager
def paused_gc() -> Iterator[None]:
    """Disables garbage collection, which would rescan the many new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def count_keys(document: object) -> int:
    """The number of keys of all objects in a document."""
    return sum(len(item) for level in _levels(document) for item in level if isinstance(item, dict))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The objects and lists in a document by nesting level, the outermost first."""
    level = [value]
    while level:
        yield level
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [part for items in parts for part in items if isinstance(part, (dict, list))]


def _check_levels(value: object, where: str) -> None:
    """Raises a CheckpointError for nesting deeper than `MAX_LEVELS`."""
    if any(number == MAX_LEVELS for number, _ in enumerate(_levels(value))):
        raise CheckpointError(f"{where} must nest objects and lists at most {MAX_LEVELS} levels deep; got more.")


def _find(value: Any, is_wanted: Callable[[object], bool]) -> str:
    """The path to the first matching value or key, in words; empty where there is none."""
    if is_wanted(value):
        return "the value"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if is_wanted(key):
            return f"the key {short_repr(key)}"
        if found := _find(item, is_wanted):
            return short_repr(key) if found == "the value" else f"{short_repr(key)}, {found}"
    return ""


def _has_lone_surrogate(item: object) -> bool:
    return isinstance(item, str) and any("\ud800" <= letter <= "\udfff" for letter in item)
