"""`Reading`: memory read as fast as torch does it, in turns with what it bounds.

The limit of harness/limits.cpp is the best of a quiet moment. Where other programs take their share of the memory, only
what is read between two calls says how fast they could have been.
"""

import torch

NAME = "reading"
"""In tables of times."""
_BYTES = 256 << 20


class Reading:
    """A call that adds up more numbers than the caches hold, by torch's threads."""

    def __init__(self) -> None:
        self._numbers = torch.ones(_BYTES // 4, dtype=torch.int32)

    def __call__(self) -> object:
        return self._numbers.sum(dtype=torch.int32)

    @staticmethod
    def gb_per_s(microseconds: float) -> float:
        """The rate of a call that took so long."""
        return _BYTES / microseconds / 1e3
