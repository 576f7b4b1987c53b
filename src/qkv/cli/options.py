"""Options that several commands have, and those of a command that runs without typer as typer has them."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from qkv.bench.options import MAX_COUNT as MAX_COUNT
from qkv.bench.options import Dtype as Dtype
from qkv.bench.options import Option, WrongUsageError, options_of

SINK_TOKENS = "--sink-tokens", "--sinks"
"""Names of the option of first tokens that a window shows: the one in texts, and a short one."""


def count_option(help_text: str, metavar: str, maximum: int = MAX_COUNT) -> typer.models.OptionInfo:
    """An integer option from 1 to ``maximum``."""
    return _integer_option(Option(help_text, metavar, most=maximum))


def _integer_option(option: Option) -> typer.models.OptionInfo:
    def check(number: int | None) -> int | None:
        fault = None if number is None else option.fault(number)
        if fault is not None:
            raise typer.BadParameter(fault)
        return number

    info: typer.models.OptionInfo = typer.Option(
        *option.names, help=option.help, metavar=option.metavar, callback=check
    )
    return info


def with_typer(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters have an `Option`, as typer takes it."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**given)
        except WrongUsageError as error:
            raise typer.BadParameter(str(error), param_hint=error.options) from None

    signature, hints = inspect.signature(command), get_type_hints(command)
    parameters = [
        signature.parameters[name].replace(annotation=Annotated[hints[name], _info(option, kind)])
        for name, (option, kind) in options_of(command).items()
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _info(option: Option, kind: type) -> typer.models.OptionInfo:
    if kind is int:
        return _integer_option(option)
    info: typer.models.OptionInfo = typer.Option(*option.names, help=option.help)
    return info
