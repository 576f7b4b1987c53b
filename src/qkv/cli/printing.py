"""Parts that the printed reports share: counts with their nouns, and tables with titles."""

from rich.console import Console
from rich.table import Table
from rich.text import Text


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural.

    Example:
        >>> counted(1, "token"), counted(2, "token")
        ('1 token', '2 tokens')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_table(title: str, table: Table, console: Console) -> None:
    """Prints a table below its title."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
