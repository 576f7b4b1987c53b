"""`Settings`: the calls that are measured, and the machines and models that are simulated."""

from typing import NamedTuple


class Settings(NamedTuple):
    """The published study; tests use smaller sizes."""

    ranks: int = 4
    tokens: int = 4096
    """of a sequence; a multiple of twice the ranks, for which the formulas are short"""
    heads: int = 8
    kv_heads: tuple[int, ...] = (8, 2)
    width: int = 64
    window: int = 512
    long_tokens: int = 65536
    """of the sequence whose window is measured as well"""
    rates: tuple[int, ...] = (1, 10)
    """of links, in Gbit/s"""
    repeats: int = 5
    """calls of which the fastest counts"""
    simulated_ranks: tuple[int, ...] = (8, 32, 128, 1024)
    simulated_tokens: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
    simulated_window: int = 4096
