"""`app`: the command `qkv` with its subcommands."""

from typing import Annotated

import typer

from qkv.bench.command import bench
from qkv.cli import version
from qkv.cli.convert import convert
from qkv.cli.demo import demo
from qkv.cli.doctor import doctor
from qkv.cli.inspect import inspect
from qkv.cli.options import with_typer
from qkv.cli.see.command import see
from qkv.cli.uptrain import uptrain

app = typer.Typer(
    help="Attention layers for PyTorch: see, inspect, convert and train models, compare, benchmark, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, the kernel's instruction set and what built it, and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Attention layers for PyTorch: see, inspect, convert and train models, compare, benchmark, check."""


app.command()(demo)
app.command()(with_typer(bench))
app.command()(inspect)
app.command()(see)
app.command()(convert)
app.command()(uptrain)
app.command()(doctor)
