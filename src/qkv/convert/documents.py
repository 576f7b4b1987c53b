"""`parse`: JSON whose every key is said once."""

import json
from pathlib import Path
from typing import Any

from qkv.convert.errors import CheckpointError

MOST_BYTES = 100_000_000
"""Of a document, as the safetensors library has it for headers."""


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
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def refuse_dangling(path: Path) -> None:
    """Raises for a link that leads to no file, as in a cache of the hub of which a part was removed."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {str(path.readlink())!r}, where nothing is. Fetch it again.")


def parse(document: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON document holds.

    Raises:
        CheckpointError: for what is no JSON object, and for a key that is said twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{where} says the key {twice!r} twice; it must be said once.")
        for key in found:
            key.encode()  # Half of a surrogate pair is no text.
        return found

    try:
        value = json.loads(document.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object; it is a {type(value).__name__}.")
    return value
