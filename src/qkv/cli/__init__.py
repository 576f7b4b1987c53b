"""What `qkv_command` runs. The library imports nothing of it, and what the commands need is imported when they run."""

import importlib.util
import io
import os
import sys
from collections.abc import Sequence

from qkv.models.errors import CommandError

EXTRAS = ("typer", "rich", "transformers", "gguf", "accelerate")
"""What `pip install 'qkv[cli]'` brings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, ``sys.argv`` by default, and returns its exit code: 0, 1 for errors, 2 for wrong usage."""
    _print_everything()
    try:
        _check_extras()
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"qkv: {error}", file=sys.stderr)
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        # Standard output, which may be closed or full, has no name.
        fault = "the output cannot be written" if error.filename is None else "a file cannot be used"
        print(f"qkv: {fault}: {error}", file=sys.stderr)
        _drop_output()
    return 1


def _run(arguments: Sequence[str] | None) -> int:
    from qkv.cli.app import app

    try:
        app(args=None if arguments is None else list(arguments), prog_name="qkv")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _print_everything() -> None:
    """Names of files are bytes, and a terminal may know few letters: what it cannot show is written as its code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is still buffered for standard output can only fail again, when Python writes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"the command line needs what is not installed: {', '.join(missing)}. Run pip install 'qkv[cli]'"
        )
