"""`SlidingKVCache`: the keys and values of a sliding window."""

from typing import Any

import torch
from torch import Tensor

from qkv.arguments import require_int
from qkv.cache.base import Cache, Keys, Owner, check_append
from qkv.cache.buffer import AppendBuffer, append_in_place
from qkv.masks import Mask


class SlidingKVCache(Cache):
    """The last ``window`` keys and values, in memory that does not grow with the number of tokens.

    Args:
        window: number of keys that a query sees, its own included, as in ``Mask.causal(window=...)``.
        sink_tokens: number of first keys that are kept as well.

    Positions count among the returned keys, sinks first, so that ``Mask.causal(window, sink_tokens)`` with the returned
    offset shows the same keys as without a cache. (ALiBi does not work with sinks, whose distances change.)

    Example:
        >>> import torch, qkv
        >>> cache = qkv.SlidingKVCache(window=4)
        >>> for _ in range(100):
        ...     keys = cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> cache.length, keys.k.shape[2] <= 8
        (100, True)

    Source: Mistral 7B, section 2 (rolling buffer); StreamingLLM for the sinks, except that keys keep the rotary
    position at which they were computed.
    """

    def __init__(self, window: int, sink_tokens: int = 0) -> None:
        super().__init__()
        require_int("SlidingKVCache", "window", window)
        require_int("SlidingKVCache", "sink_tokens", sink_tokens)
        if window < 1:
            raise ValueError(f"SlidingKVCache: window must be at least 1 key, the query's own; got {window}.")
        if sink_tokens < 0:
            raise ValueError(f"SlidingKVCache: sink_tokens must be at least 0; got {sink_tokens}.")
        self.window = window
        self.sink_tokens = sink_tokens
        self._length = 0
        self._returned = 0

    @property
    def length(self) -> int:
        """Number of tokens appended, dropped ones included."""
        return self._length

    def admit(self, owner: Owner, mask: Mask) -> None:
        """As `Cache.admit`.

        Raises:
            ValueError: as there, and for a mask that shows dropped keys.
        """
        if mask.left is None or mask.left >= self.window or mask.sink_tokens > self.sink_tokens:
            raise ValueError(
                f"SlidingKVCache(window={self.window}, sink_tokens={self.sink_tokens}) drops keys that {mask!r} shows. "
                f"Use Mask.causal(window={self.window}, sink_tokens={self.sink_tokens}), or a KVCache."
            )
        super().admit(owner, mask)

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Appends keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``; returns the sinks and all keys in a window.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than before.
        """
        keys, values = [part.memory if part.length else None for part in self._parts]
        check_append("SlidingKVCache", k, v, keys, values, None if keys is None else keys.dtype)
        mark, new, capacity = self.mark(), k.shape[2], self._capacity
        try:
            if self._parts[0].length + new > capacity:
                self._parts = tuple([self._recent(part.tensor) for part in self._parts])
            before = self._parts[0].length
            grown = append_in_place(self._parts, k, v) if before + new <= capacity else None
            if grown is None:
                grown = [self._extend(part, x) for part, x in zip(self._parts, (k, v), strict=True)]
                if before + new > capacity:  # a prompt of several windows is cut
                    self._parts = tuple([self._recent(x) for x in grown])
        except BaseException:  # as in KVCache.append
            self.restore(mark)
            raise
        self._length += new
        self._returned = before + new
        return Keys(grown[0], grown[1], before)

    @property
    def _capacity(self) -> int:
        """Slots allocated: the sinks, and two windows, so that old keys are dropped only once per window."""
        return self.sink_tokens + 2 * self.window

    def _extend(self, part: AppendBuffer, new: Tensor) -> Tensor:
        """Appends ``new`` to a buffer and returns all its tokens."""
        return part.extend(new, max(self._capacity, part.length + new.shape[2]))

    def _recent(self, tokens: Tensor | None) -> AppendBuffer:
        """The tokens that the next query may see besides its own: the sinks, and those in its window."""
        recent = AppendBuffer()
        if tokens is not None:
            sinks = min(self.sink_tokens, tokens.shape[2])
            start = max(sinks, tokens.shape[2] - (self.window - 1))
            recent.extend(torch.cat([tokens[:, :, :sinks], tokens[:, :, start:]], dim=2), self._capacity)
        return recent

    def crop(self, length: int) -> None:
        """Removes all tokens after the first ``length``, for instance rejected drafts of speculative decoding.

        Raises:
            TypeError: for a length that is not an int.
            ValueError: for a length below 0 or above `length`, and if the window of the next query would contain
                dropped keys.
        """
        self._check_crop(length)
        count = self._parts[0].length
        dropped = self._length - count
        kept = length - dropped
        if dropped and length < self._length and kept - self.sink_tokens < self.window - 1:
            least = min(self._length, dropped + self.sink_tokens + self.window - 1)
            raise ValueError(
                f"SlidingKVCache: length of crop must be at least {least} of {self._length} tokens, or the window of "
                f"the next query would contain dropped keys; got {length}. Crop earlier, or use a KVCache."
            )
        for part in self._parts:
            part.crop(kept)
        self._length = length

    def reset(self) -> None:
        """Removes all tokens and the owner, for another batch or layer."""
        self.restore((self._parts, 0, 0))
        self._owners = ()

    def mark(self) -> Any:
        """The state to which `restore` returns."""
        return self._parts, self._parts[0].length, self._length

    def restore(self, mark: Any) -> None:
        """Undoes all appends since ``mark``."""
        self._parts, count, self._length = mark
        for part in self._parts:
            part.crop(count)

    def restrict(self, mask: Mask) -> Mask:
        """The mask restricted to the keys that the last append returned."""
        if self._returned == self._length:
            return mask
        recent = self._returned - self.sink_tokens
        return mask.select_keys(self._length - recent, self._length, self.sink_tokens)
