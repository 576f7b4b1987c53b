"""`Settings`: texts, windows and training."""

from typing import NamedTuple


class Settings(NamedTuple):
    """The published study; tests use smaller sizes."""

    tokens: int = 2048
    """of each text"""
    window: int = 256
    """Keys that a query of a changed layer sees, its own included."""
    sinks: tuple[int, ...] = (0, 4)
    """First keys that the window shows as well."""
    parts: int = 8
    """Numbers of layers that are changed together."""
    minutes: float = 5.0
    """Training time of each model."""
    held_out: int = 60_000
    """Held-out characters; 19 times as many are trained on, since qkv uptrain holds out the last 1/20."""
    training: tuple[str, ...] = ("--bf16", "--learning-rate", "3e-4", "--batch", "1", "--block", "1024")
    """Options of qkv uptrain; a block must be longer than the window."""
