"""Progress on stderr: bars on a terminal, short plain lines everywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Unit = Literal["bytes", "tokens", "calls", "rounds"]
OnProgress = Callable[[int], None]
"""Tells how much of the total is done by now."""


class Progress:
    """Shows what is being done.

    Args:
        stream: where to; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        # The stream is kept, so that bars still show while sys.stderr is redirected to silence others.
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream)
        self._animated = self._stream.isatty() and not self._console.is_dumb_terminal

    def notify(self, line: str) -> None:
        """A line that stays."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def step(self, title: str, total: int | None = None, unit: Unit | None = None) -> Iterator[OnProgress]:
        """One step of ``total`` units, or of a length nobody knows.

        Example:
            >>> with Progress(sys.stdout).step("counting", 2, "tokens") as on_progress:
            ...     on_progress(1)
            ...     on_progress(2)
            counting ...
        """
        if not self._animated:
            self.notify(f"{title} ...")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), *_amount(unit), TimeElapsedColumn())
        with Bars(
            *columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as bars:
            task = bars.add_task(title, total=total)
            yield lambda done: bars.update(task, completed=done)


def after(before: int, on_progress: OnProgress) -> OnProgress:
    """For a part of a step, which starts when ``before`` of the total are done."""
    return lambda done: on_progress(before + done)


def _amount(unit: Unit | None) -> tuple[ProgressColumn, ...]:
    if unit is None:
        return ()
    return (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
