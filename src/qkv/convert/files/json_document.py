"""`parse`: JSON as its standard has it, every key said once, in time that grows with its length alone.

What Python's parser lets pass and is refused here: a key said twice, NaN and infinities, halves of surrogate pairs,
numbers too long for anyone, and more levels than others can walk through.
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

MOST_BYTES = 100_000_000
"""Of a document, as the safetensors library has it for headers."""
MOST_DIGITS = 40
"""Of a whole number: twice those of 64 bits."""
MOST_LEVELS = 100
"""Of objects and lists in each other, where readers do not say themselves what each must be."""
ALL_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a pair, or a pair; what is none is found only by writing it out."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 100


def show(value: object) -> str:
    """A value for a message: short, whatever it is."""
    return _brief.repr(value)


class _Refused:
    """Stands for a value that is no JSON, until it is known where it is."""

    def __init__(self, fault: str) -> None:
        self.fault = fault


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: for a file that is missing, unreadable, too large or no JSON object.
    """
    try:
        refuse_dangling(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; more than {MOST_BYTES} are not read as JSON.")
        document = parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    _check_levels(document, str(path))
    return document


def refuse_dangling(path: Path) -> None:
    """Raises for a link that leads to no file, as in a cache of the hub of which a part was removed."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {str(path.readlink())!r}, where nothing is. Fetch it again.")


def parse(document: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON document holds.

    Raises:
        CheckpointError: for what is no JSON object, and what is refused here.
    """
    refused: list[_Refused] = []

    def refuse(fault: str) -> _Refused:
        refused.append(_Refused(fault))
        return refused[-1]

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{where} says the key {show(twice)} twice; it must be said once.")
        return found

    def whole(digits: str) -> Any:
        return int(digits) if len(digits) <= MOST_DIGITS else refuse(f"a number of {len(digits)} digits")

    def fraction(digits: str) -> Any:
        return value if math.isfinite(value := float(digits)) else refuse(f"{digits[:MOST_DIGITS]}, beyond all numbers")

    has_long = b"0" * MOST_DIGITS in document.translate(ALL_ZERO)
    try:
        with paused_collection():
            value = json.loads(
                document.decode("utf-8"),
                object_pairs_hook=unique,
                parse_int=whole if has_long else int,
                parse_float=fraction,
                parse_constant=lambda word: refuse(f"{word}, which JSON does not have"),
            )
        if refused:
            place = _find(value, lambda item: item is refused[0])
            raise CheckpointError(f"{where}: {place:.200} is {refused[0].fault}.")
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} must be a JSON object; it is a {type(value).__name__}.")
        if SURROGATE.search(document) and (place := _find(value, _is_no_text)):
            raise CheckpointError(f"{where}: {place:.200} holds half of a surrogate pair, which is no text.")
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}.") from error
    return value


@contextmanager
def paused_collection() -> Iterator[None]:
    """Python looks through all objects again and again while many are made, none of which can be garbage yet."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def count_keys(document: object) -> int:
    """Of all its objects."""
    return sum(len(item) for level in _levels(document) for item in level if isinstance(item, dict))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The objects and lists in a document, the outermost first, and then those in these."""
    level = [value]
    while level:
        yield level
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [part for items in parts for part in items if isinstance(part, (dict, list))]


def _check_levels(value: object, where: str) -> None:
    if any(number == MOST_LEVELS for number, _ in enumerate(_levels(value))):
        raise CheckpointError(f"{where} must have at most {MOST_LEVELS} levels of objects and lists; it has more.")


def _find(value: Any, is_wanted: Callable[[object], bool]) -> str:
    """The place of an item, or of a key, in words: its keys one after another."""
    if is_wanted(value):
        return "the value"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if is_wanted(key):
            return f"the key {show(key)}"
        if found := _find(item, is_wanted):
            return show(key) if found == "the value" else f"{show(key)}, {found}"
    return ""


def _is_no_text(item: object) -> bool:
    return isinstance(item, str) and any("\ud800" <= letter <= "\udfff" for letter in item)
