"""Options that several commands have."""

import typer


def count(help_text: str, metavar: str) -> typer.models.OptionInfo:
    """An option that takes a number of something, at least 1."""
    option: typer.models.OptionInfo = typer.Option(help=help_text, metavar=metavar, callback=_at_least_one)
    return option


def _at_least_one(number: int | None) -> int | None:
    if number is not None and number < 1:
        raise typer.BadParameter(f"it must be at least 1; got {number}.")
    return number
