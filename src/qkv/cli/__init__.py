"""`main`: the command line. The library does not import it, and optional dependencies are imported on use.

Without the packages of the extra ``cli``, ``qkv --version`` and ``qkv bench`` run.
"""

import importlib.util
import io
import os
import sys
from collections.abc import Sequence

import torch

import qkv
from qkv import kernels
from qkv.models.errors import CommandError

EXTRAS = ("typer", "rich", "transformers", "gguf", "accelerate", "packaging")
"""The packages of `pip install 'qkv[cli]'`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of ``sys.argv``; returns the exit code: 0, 1 for errors, 2 for wrong usage."""
    _escape_unprintable()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _run(given)
        if sys.stdout is not None:  # closed before the command started
            sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"qkv: {error}", file=sys.stderr)
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        # Errors of standard output (closed, disk full) have no file name.
        fault = "cannot write the output" if error.filename is None else "file error"
        print(f"qkv: {fault}: {error}", file=sys.stderr)
        _discard_output()
    return 1


def version() -> str:
    """What ``qkv --version`` prints: the versions, and what the kernel is."""
    return f"qkv {qkv.__version__} (torch {torch.__version__}, kernel {kernels.description()})"


def _run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code."""
    try:
        missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
        if not missing:
            from qkv.cli.app import app

            app(args=arguments, prog_name="qkv")
        elif arguments == ["--version"]:
            print(version())
        elif arguments[:1] == ["bench"]:
            from qkv.bench.command import bench
            from qkv.bench.options import run

            run("qkv bench", bench, arguments[1:])
        else:
            raise CommandError(
                f"the command line requires packages that are not installed: {', '.join(missing)}. "
                "Run pip install 'qkv[cli]'. Without them, only qkv bench and qkv --version run."
            )
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _escape_unprintable() -> None:
    """Prints characters that the encoding of stdout does not have, such as in file names, as backslash escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Redirects stdout to the null device, so that flushing its buffer at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
