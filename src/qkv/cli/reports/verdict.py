"""Whether a model is usable after its loss has changed, for `qkv convert` and `qkv uptrain`."""

import math
from pathlib import Path

MOST = 1.0
"""Nats a token by which the loss of a usable model is up, at most."""
SAME = 0.0005
"""Nats a token that a report with three digits does not show."""
PROMPT = "Once upon a time"
MINUTES = "10"
"""Of training, in the command that a report proposes."""


def is_usable(before: float, after: float) -> bool | None:
    """Whether a model with the loss ``after`` is of use where one with ``before`` was; None if that is no number."""
    return None if math.isnan(before) else after - before <= MOST


def describe(before: float, after: float, remedy: str) -> str:
    """The answer of `is_usable` in words, with the change of the loss."""
    usable, change = is_usable(before, after), after - before
    if usable is None:
        return "not known whether it is usable: the loss of the original is not a number"
    if math.isnan(change):
        return f"not usable {remedy}: its loss is not a number"
    if abs(change) < SAME:
        return "usable: the loss is the same"
    words = f"the loss is {'up' if change > 0 else 'down'} by {abs(change):.3f} nats a token"
    return f"usable: {words}" if usable else f"not usable {remedy}: {words}, of which {MOST:g} is the most"


def uptrain_command(model: Path, original: str) -> list[str]:
    """The command that trains a converted model further. TEXT stands for a file of the user's."""
    trained = model.with_name(f"{model.name}-trained")
    return ["qkv", "uptrain", str(model), "TEXT", str(trained), "--original", original, "--minutes", MINUTES]


def demo_command(model: Path) -> list[str]:
    """The command that has a model write."""
    return ["qkv", "demo", "--model", str(model), "--prompt", PROMPT]


def finite(number: float) -> float | None:
    """A number as JSON has it, in which there is no infinity and no NaN."""
    return number if math.isfinite(number) else None
