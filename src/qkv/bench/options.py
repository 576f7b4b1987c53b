"""Options of a command that runs without typer: `Option`, in annotations of its parameters, and `run`."""

import argparse
import inspect
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

MAX_COUNT = 10**12
"""Larger than any real size, and within 64 bits."""


class Dtype(str, Enum):
    """The values of ``--dtype``."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Option(NamedTuple):
    """An option; an integer has bounds."""

    help: str
    metavar: str | None = None
    least: int = 1
    most: int = MAX_COUNT
    why: str = ""
    """what follows the lower bound in an error"""
    names: tuple[str, ...] = ()
    """such as ``--json``; by default, that of the parameter"""

    def fault(self, number: int) -> str | None:
        """What an error says of a number out of bounds; None for one within."""
        if number < self.least:
            return f"it must be at least {self.least}{self.why}; got {number}."
        return f"it must be at most {self.most}; got {number}." if number > self.most else None


class WrongUsageError(Exception):
    """Options that do not go together; ``options`` names them."""

    def __init__(self, message: str, options: str) -> None:
        super().__init__(message)
        self.options = options


def options_of(command: Callable[..., None]) -> dict[str, tuple[Option, type]]:
    """The options of a command and their types, by parameter."""
    found = {}
    for name, annotation in typing.get_type_hints(command, include_extras=True).items():
        if name == "return":
            continue
        kind, option = typing.get_args(annotation)
        kinds = [each for each in typing.get_args(kind) or (kind,) if each is not type(None)]
        found[name] = option, kinds[0]
    return found


def run(name: str, command: Callable[..., None], arguments: Sequence[str]) -> None:
    """Runs a command with the arguments of a command line. Exits with 2 for wrong usage."""
    parser = _parser(name, command)
    given = vars(parser.parse_args(arguments))
    try:
        command(**given)
    except WrongUsageError as error:
        parser.error(f"{error.options}: {error}")


def _parser(name: str, command: Callable[..., None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name, description=inspect.getdoc(command), allow_abbrev=False)
    defaults = inspect.signature(command).parameters
    for parameter, (option, kind) in options_of(command).items():
        names, default = option.names or (f"--{parameter.replace('_', '-')}",), defaults[parameter].default
        about: dict[str, Any] = {"help": option.help, "dest": parameter, "default": default}
        if kind is bool:
            parser.add_argument(*names, action="store_true", **about)
        elif issubclass(kind, Enum):
            parser.add_argument(*names, type=kind, choices=[*kind], metavar=_choices(kind), **about)
        else:
            parser.add_argument(*names, type=_integer(option), metavar=option.metavar, **about)
    return parser


def _choices(kind: type[Enum]) -> str:
    return "{" + ",".join(each.value for each in kind) + "}"


def _integer(option: Option) -> Callable[[str], int]:
    def integer(text: str) -> int:
        number = int(text)
        fault = option.fault(number)
        if fault is not None:
            raise argparse.ArgumentTypeError(fault)
        return number

    return integer
