"""Options that several commands have."""

import typer

MOST = 10**12
"""Far more than anybody has of anything, and an integer of 64 bits."""


def count(help_text: str, metavar: str, most: int = MOST) -> typer.models.OptionInfo:
    """An option that takes a number of something, 1 to ``most``."""

    def check(number: int | None) -> int | None:
        if number is not None and number < 1:
            raise typer.BadParameter(f"it must be at least 1; got {number}.")
        if number is not None and number > most:
            raise typer.BadParameter(f"it must be at most {most}; got {number}.")
        return number

    option: typer.models.OptionInfo = typer.Option(help=help_text, metavar=metavar, callback=check)
    return option
