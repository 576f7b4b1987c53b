"""Ctrl-C while the command `qkv` starts, which takes a second, since importing qkv imports torch."""

import sys
from pathlib import Path
from types import TracebackType

INTERRUPTED = 130
"""Exit code for Ctrl-C, as in shells."""


def _end_without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)


# The function that the command runs is in this package, so nothing of it runs before this import. In all other programs
# an interrupt is theirs.
if Path(next(iter(getattr(sys, "argv", ())), "")).stem == "qkv":
    sys.excepthook = _end_without_traceback
