"""Parts that the printed reports share: counts with their nouns, lines of 80 columns, tables with titles, commands."""

import shlex
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = 80
"""Width of reports. Names and words that are longer alone are not broken."""


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural.

    Example:
        >>> counted(1, "token"), counted(4096, "token")
        ('1 token', '4,096 tokens')
    """
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def print_line(text: str, console: Console, style: str = "") -> None:
    """Prints a text in lines of `COLUMNS`, of which all have its indentation and those after the first two more."""
    indent = " " * (len(text) - len(text.lstrip(" ")))
    lines = textwrap.wrap(
        text,
        COLUMNS,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def print_command(arguments: Sequence[str], console: Console) -> None:
    """Prints a command that a shell takes as it is printed, in lines of `COLUMNS`. Options stay with their values."""
    parts: list[str] = []
    for argument in arguments:
        is_value = parts and parts[-1].startswith("--") and " " not in parts[-1] and not argument.startswith("--")
        if is_value:
            parts[-1] += f" {shlex.quote(argument)}"
        else:
            parts.append(shlex.quote(argument))
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) > COLUMNS - len(" \\"):
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    console.print(Text("\n".join(lines)), soft_wrap=True)


def print_table(title: str, table: Table, console: Console) -> None:
    """Prints a table below its title."""
    print_line(title, console, "bold")
    console.print(table)
