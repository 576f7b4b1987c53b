"""Writes reference/cli.md, the options of the command line, from what `qkv --help` shows."""

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "reference" / "cli.md"
LEAD = """# Command line

<!-- Written by docs/commands.py, `make pages`. -->

What each command takes. Install it by `pip install 'qkv[cli]'`; `qkv COMMAND --help` prints the same. The guides show
the commands at work: [windows](../guides/windows.md), [KV heads](../guides/kv-heads.md), [speed](../guides/speed.md).
Errors are one line on standard error, with exit code 1; wrong usage exits with 2. `--json` prints one JSON document
on standard output and nothing else.

| environment variable | meaning |
|---|---|
| `QKV_ISA` | The kernel's instruction set, one of those that `qkv doctor` lists. Default: the best of the machine. |
| `QKV_CACHE` | Folder of the model that `qkv demo` downloads. Default: `~/.cache/qkv`. |
| `QKV_CHECK` | 1 compares calls over ranks before anything is sent ([many machines](../guides/many-machines.md)). |
"""


def page() -> str:
    """The page."""
    import typer

    from qkv.cli.app import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([LEAD, *(line for name, command in commands.items() for line in _section(name, command))])


def _section(name: str, command: Any) -> Iterator[str]:
    parameters = [each for each in command.params if each.name != "help"]
    arguments = [each for each in parameters if not _is_option(each)]
    usage = " ".join([f"qkv {name}", "[OPTIONS]", *(each.metavar or each.name.upper() for each in arguments)])
    yield f"## qkv {name}\n\n```text\n{usage}\n```\n"
    yield f"{_sentences(command.help)}\n"
    yield "| option | meaning |\n|---|---|"
    for each in parameters:
        names = [f"`{option}`" for option in each.opts] if _is_option(each) else []
        cell = " ".join(filter(None, [", ".join(names), _value(each)]))
        yield f"| {cell} | {_sentences(each.help or '')}{_default(each)} |"
    yield ""


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts) and parameter.opts[0].startswith("-")


def _value(parameter: Any) -> str:
    """What stands behind an option: its name, or the values that it may have."""
    if getattr(parameter, "is_flag", False):
        return ""
    if isinstance(parameter.default, Enum):
        return ", ".join(f"`{each.value}`" for each in type(parameter.default))
    return f"`{parameter.metavar or 'VALUE'}`"


def _default(parameter: Any) -> str:
    value = parameter.default
    if not _is_option(parameter) or value is None or value is False or callable(value) or "Default:" in parameter.help:
        return ""
    return f" Default: {getattr(value, 'value', value)}."


def _sentences(text: str) -> str:
    """Text with names of options and models as Markdown has them."""
    text = text.replace("\f", "").strip()
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*|qkv(?:\.\w+)+(?:\(\w*\))?|config\.json|qkv see)", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page())
