"""Options that several commands have."""

from enum import Enum

import typer

MAX_COUNT = 10**12
"""Larger than any real size, and within 64 bits."""

SINK_TOKENS = "--sink-tokens", "--sinks"
"""Names of the option of first tokens that a window shows: the one in texts, and a short one."""


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Dtype(str, Enum):
    """The values of ``--dtype``."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def count_option(help_text: str, metavar: str, maximum: int = MAX_COUNT) -> typer.models.OptionInfo:
    """An integer option from 1 to ``maximum``."""

    def check(number: int | None) -> int | None:
        if number is not None and number < 1:
            raise typer.BadParameter(f"it must be at least 1; got {number}.")
        if number is not None and number > maximum:
            raise typer.BadParameter(f"it must be at most {maximum}; got {number}.")
        return number

    option: typer.models.OptionInfo = typer.Option(help=help_text, metavar=metavar, callback=check)
    return option
