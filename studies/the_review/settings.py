"""`Settings`: sizes of the experiments."""

from typing import NamedTuple


class Settings(NamedTuple):
    """The published study; tests use smaller sizes."""

    widths: tuple[int, ...] = (4, 16, 64, 256, 1024, 4096)
    """of queries and keys, d_k"""
    scored: int = 256
    """Queries, and keys, whose scores are measured at each width."""

    depth: int = 8
    """Stacked layers with a window."""
    window: int = 8
    """of these layers, the query's own key included"""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens over which time and memory are measured."""
    long_window: int = 256
    """of these measurements"""
    num_heads: int = 4
    head_dim: int = 64

    cached: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Tokens in a cache."""
    cache_window: int = 1024

    decode_heads: int = 32
    """Query heads of a decoding step."""
    decode_kv_heads: tuple[int, ...] = (32, 8, 4, 2, 1)
    decode_dim: int = 128
    decode_keys: int = 16384

    rounds: int = 7
    seconds_per_round: float = 0.1
