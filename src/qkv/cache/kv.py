"""`KVCache`: all keys and values so far."""

import torch
from torch import Tensor

from qkv.arguments import require_int
from qkv.cache.base import Cache, Keys, check_append
from qkv.cache.buffer import append_in_place

SMALLEST_CAPACITY = 16


class GrowingCache(Cache):
    """What caches share that keep all tokens.

    Args:
        capacity: number of tokens to reserve and never to exceed; None grows without bound.
        parts: as of `Cache`.
    """

    def __init__(self, capacity: int | None = None, parts: int = 2) -> None:
        super().__init__(parts)
        caller = type(self).__name__
        if capacity is not None:
            require_int(caller, "capacity", capacity, ", or None to grow")
        if capacity is not None and capacity < 1:
            raise ValueError(f"{caller}: capacity must be at least 1 token, or None to grow; got {capacity}.")
        self.capacity = capacity
        self._dtype: torch.dtype | None = None

    def _append_in_place(self, k: Tensor, v: Tensor) -> list[Tensor] | None:
        """The short way of appending, as `append_in_place`; None where it does not do."""
        return append_in_place(self._parts, k, v) if k.dtype is v.dtype is self._dtype else None

    def _admit_tokens(self, k: Tensor, v: Tensor) -> int:
        """How many tokens new memory is to hold."""
        caller, start = type(self).__name__, self.length
        keys, values, *_ = self._parts
        check_append(caller, k, v, keys.memory if start else None, values.memory if start else None, self._dtype)
        stop = start + k.shape[2]
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{caller}: {start} of {self.capacity} tokens are taken, and {k.shape[2]} more do not fit. "
                "Give a larger capacity, or None to grow."
            )
        self._dtype = k.dtype
        return max(2 * start, stop, SMALLEST_CAPACITY) if self.capacity is None else self.capacity


class KVCache(GrowingCache):
    """All keys and values so far, in memory that doubles when full: appending is amortised O(1), without a copy.

    Args:
        capacity: number of tokens to reserve and never to exceed; None grows without bound.

    Example:
        >>> import torch, qkv
        >>> cache = qkv.KVCache()
        >>> k = torch.randn(1, 2, 5, 8)
        >>> cache.append(k, k).offset, cache.append(k, k).offset, cache.length
        (0, 5, 10)
        >>> cache.crop(7)
        >>> cache.append(k, k).offset
        7

    Where gradients are recorded, outside of ``torch.no_grad()``, appending concatenates instead, so that every step
    keeps what its backward needs.
    """

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all so far.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than those held, and past capacity.
        """
        start = self.length
        try:
            grown = self._append_in_place(k, v)
            if grown is None:
                capacity = self._admit_tokens(k, v)
                grown = [part.extend(x, capacity) for part, x in zip(self._parts, (k, v), strict=True)]
            return Keys(grown[0], grown[1], start)
        except BaseException:  # out of memory, or interrupted: some parts have grown
            self.restore(start)
            raise
