"""`KVCache`: all keys and values so far."""

import torch
from torch import Tensor

from qkv.arguments import require_int
from qkv.cache.base import Cache, Keys, check_append
from qkv.cache.buffer import append_in_place

MIN_CAPACITY = 16


class FullCache(Cache):
    """Base class of caches that keep all tokens, unlike those of a sliding window.

    Args:
        capacity: number of tokens to allocate, and limit of the length; None grows without bound.
        parts: number of buffers.
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
        """`append_in_place`, if the dtype is that of the cache."""
        return append_in_place(self._parts, k, v) if k.dtype is v.dtype is self._dtype else None

    def _check_tokens(self, k: Tensor, v: Tensor) -> int:
        """Validates new tokens; returns how many slots to allocate, should the buffer need reallocation."""
        caller, start = type(self).__name__, self.length
        keys, values, *_ = self._parts
        check_append(caller, k, v, keys.memory if start else None, values.memory if start else None, self._dtype)
        stop = start + k.shape[2]
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{caller}: capacity is {self.capacity} tokens; got {k.shape[2]} more than the {start} in the cache. "
                "Pass a larger capacity, or None to grow."
            )
        self._dtype = k.dtype
        return max(2 * start, stop, MIN_CAPACITY) if self.capacity is None else self.capacity


class KVCache(FullCache):
    """All keys and values so far, in memory that doubles when full: appending is amortised O(1), without a copy.

    Args:
        capacity: number of tokens to allocate, and limit of the length; None grows without bound.

    Example:
        >>> import torch, qkv
        >>> cache = qkv.KVCache()
        >>> k = torch.randn(1, 2, 5, 8)
        >>> cache.append(k, k).offset, cache.append(k, k).offset, cache.length
        (0, 5, 10)
        >>> cache.crop(7)
        >>> cache.append(k, k).offset
        7

    With gradients enabled, outside of ``torch.no_grad()``, appending concatenates instead, since backward needs the
    tokens of each step.
    """

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Appends keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all so far.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than before, and beyond capacity.
        """
        start = self.length
        try:
            grown = self._append_in_place(k, v)
            if grown is None:
                capacity = self._check_tokens(k, v)
                grown = [part.extend(x, capacity) for part, x in zip(self._parts, (k, v), strict=True)]
            return Keys(grown[0], grown[1], start)
        except BaseException:  # out of memory or interrupted, with some parts grown
            self.restore(start)
            raise
