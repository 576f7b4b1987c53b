"""`Progress`: progress bars on a terminal, plain lines elsewhere, on stderr."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

Unit = Literal["bytes", "tokens", "calls", "rounds", "passes", "steps"]
OnProgress = Callable[[int], None]
"""Called with the units done so far."""


class Progress:
    """Reports the steps of a command.

    Args:
        stream: the output; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        # Bound now, so that bars are shown while `quiet` redirects sys.stderr.
        self._stream = sys.stderr if stream is None else stream
        self._console = _console(self._stream)

    def notify(self, line: str) -> None:
        """Prints a permanent line, above the bar of a step."""
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(line), soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    @contextmanager
    def step(self, title: str, total: int | None = None, unit: Unit | None = None) -> Iterator[OnProgress]:
        """Shows one step; yields the callback for its progress. ``total``: units of the step, None if unknown.

        Example:
            >>> with Progress(sys.stdout).step("counting", 2, "tokens") as on_progress:
            ...     on_progress(1)
            ...     on_progress(2)
            counting ...
        """
        if self._console is None:
            self.notify(f"{title} ...")
            yield lambda done: None
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), *_amount_columns(unit), TimeElapsedColumn())
        with Bars(
            *columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as bars:
            task = bars.add_task(title, total=total)
            yield lambda done: bars.update(task, completed=done)


def offset_progress(on_progress: OnProgress, offset: int) -> OnProgress:
    """The callback for a part of a step that starts at ``offset`` units."""
    return lambda done: on_progress(offset + done)


def _console(stream: TextIO) -> "Console | None":
    """The console of a terminal that can draw bars; None elsewhere, and where rich is not installed."""
    if not stream.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    console = Console(file=stream)
    return None if console.is_dumb_terminal else console


def _amount_columns(unit: Unit | None) -> "tuple[ProgressColumn, ...]":
    """The columns of a progress bar that show the amount done."""
    from rich.progress import DownloadColumn, MofNCompleteColumn, TextColumn

    if unit is None:
        return ()
    return (DownloadColumn(binary_units=True),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
