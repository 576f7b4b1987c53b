"""The report of `qkv uptrain`, as text and as a JSON document."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import qkv
from qkv.cli.printing import counted, print_command, print_line
from qkv.cli.reports import verdict
from qkv.models.uptraining import Uptrained


def as_json(model: str, text: Path, out: Path, original: str | None, result: Uptrained) -> dict[str, Any]:
    """The report for `json.dumps`; losses in nats a token."""
    losses = {name: verdict.finite(loss) for name, loss in result.losses.items()}
    return {
        "versions": {"qkv": qkv.__version__},
        "model": model,
        "text": str(text),
        "out": str(out),
        **result._asdict(),
        "losses": losses,
        "usable": None if original is None else verdict.is_usable(*_before_and_after(result)),
        "next": _next_command(out, original, result),
    }


def print_report(out: Path, original: str | None, result: Uptrained, console: Console) -> None:
    """Prints the losses, whether the result is usable, and the next command."""
    console.print(Text(f"wrote {out}", style="bold"), soft_wrap=True)  # whole, whatever the length of a name
    speed = "" if result.tokens_per_second is None else f", {counted(result.tokens_per_second, 'token')} a second"
    print_line(f"  {counted(result.steps, 'step')} of training on {counted(result.tokens, 'token')}{speed}", console)
    console.print()
    print_line(f"  loss and perplexity on {counted(result.held_out_tokens, 'token')} that were held out", console)
    for name, loss in result.losses.items():
        perplexity = f"{math.exp(min(loss, 700)):,.2f}" if loss == loss else "no number"
        print_line(f"    {name:<9} {loss:.4f} {perplexity:>12}", console)
    if original is not None:
        print_line(f"  {verdict.describe(*_before_and_after(result), 'yet')}", console, "bold")
    console.print()
    command = _next_command(out, original, result)
    print_line("Next, to train it further:" if "uptrain" in command else "Next:", console)
    print_command(command, console)


def _before_and_after(result: Uptrained) -> tuple[float, float]:
    return result.losses["original"], result.losses["uptrained"]


def _next_command(out: Path, original: str | None, result: Uptrained) -> list[str]:
    if original is not None and not verdict.is_usable(*_before_and_after(result)):
        return verdict.uptrain_command(out, original)
    return verdict.demo_command(out)
