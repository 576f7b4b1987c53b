"""Texts for models: one that the package brings, and those of a user's files."""

from pathlib import Path

from qkv.models.errors import CommandError
from qkv.models.source import expand_home

KING_LEAR = Path(__file__).with_name("king_lear.txt")
"""A scene of about 3200 tokens; public domain."""


def read_text(file: Path, most: int | None = None, option: str = "--text") -> str:
    """The text of a file in UTF-8, of which the first ``most`` characters are read.

    Args:
        option: that gives the file, for errors.

    Raises:
        CommandError: for a file that cannot be read, is not UTF-8 or has no text.
    """
    try:
        with expand_home(file).open(encoding="utf-8") as opened:
            text = opened.read(most)
    except OSError as error:
        raise CommandError(f"{option}: cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {file} must be UTF-8; got {error.reason} at byte {error.start}.") from error
    if not text.strip():
        raise CommandError(f"{option}: {file} must contain a text; got none.")
    return text
