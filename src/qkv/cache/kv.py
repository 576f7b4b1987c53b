"""`KVCache` and `Int8KVCache`: all keys and values so far."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.arguments import require_int
from qkv.cache.base import Cache, Keys, autocast_to
from qkv.cache.buffer import append_in_place
from qkv.cache.int8 import INT8
from qkv.cache.rows import padding_before, place, require_is_token

MIN_CAPACITY = 16


class FullCache(Cache):
    """Base class of caches that keep all tokens, unlike those of a sliding window.

    Args:
        capacity: number of tokens to allocate, and limit of the length; None grows without bound.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        caller = type(self).__name__
        if capacity is not None:
            require_int(caller, "capacity", capacity, ", or None to grow")
        if capacity is not None and capacity < 1:
            raise ValueError(f"{caller}: capacity must be at least 1 token, or None to grow; got {capacity}.")
        self.capacity = capacity

    def _extend(self, k: Tensor, v: Tensor, is_token: Tensor | None) -> tuple[Sequence[Tensor], int | Tensor]:
        """`append` to each part. Returns all tokens of each, and the offset."""
        mark, start = self.mark(), self.length
        if not start:
            self._autocast = autocast_to(k)
        try:
            if self._rows is None and is_token is None:
                return self._extend_equally(k, v), start
            return self._extend_rows(k, v, is_token)
        except BaseException:  # out of memory or interrupted, with some parts grown
            self.restore(mark)
            raise

    def _claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> tuple[list[Tensor], int | Tensor] | None:
        """`claim` of each part. Returns the slots of each, and the offset."""
        slots, rows = self._parts[0].length, self._rows
        stop, shapes = slots + k[2], self._format.shapes(k, v, like.dtype)
        if torch.is_grad_enabled() or (self.capacity is not None and stop > self.capacity):
            return None
        if rows is None and not slots:
            self._autocast = autocast_to(like)
        elif not self._may_follow(shapes, like):
            return None
        self._dtype, capacity = like.dtype, self._capacity_for(stop)
        pairs = zip(self._parts, shapes, strict=True)
        tokens = [part.claim(shape, dtype, like.device, capacity) for part, (shape, dtype) in pairs]
        if rows is None:
            return tokens, slots
        self._rows = rows.append(k[2], None)
        return tokens, rows.lengths

    def _extend_equally(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """Appends the same number of tokens to each row."""
        return self._format.extend(self._parts, k, v, self._check_tokens(k, v, k.shape[2]))

    def _extend_rows(self, k: Tensor, v: Tensor, is_token: Tensor | None) -> tuple[Sequence[Tensor], int | Tensor]:
        """Appends tokens to rows that differ in length, now or afterwards."""
        require_is_token(type(self).__name__, is_token, k)
        self._settle()
        rows = self._rows_or_equal(k)
        placement, grown = place(rows.lengths, k.shape[2], is_token, keeps_padding=torch.compiler.is_compiling())
        capacity, length = self._check_tokens(k, v, grown), self.length + grown
        parts = zip(self._parts, self._format.encode(k, v), strict=True)
        tokens = [part.put(x, placement, length, capacity) for part, x in parts]
        offset = rows.lengths if is_token is None else rows.lengths - padding_before(is_token)
        self._rows = rows.append(k.shape[2], is_token)
        self._counts_slots |= torch.compiler.is_compiling() and is_token is not None
        return tokens, offset

    @property
    def _returned(self) -> Tensor | None:
        """``(B,)``, number of keys of each row; None if all are."""
        return None if self._rows is None else self._rows.lengths

    def _require_like(self, other: Self) -> None:
        super()._require_like(other)
        if self.capacity is not None and other.length > self.capacity:
            raise ValueError(
                f"{type(self).__name__}: capacity is {self.capacity} tokens; got a cache of {other.length}. Pass a "
                "larger capacity, or None to grow."
            )

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        if self.capacity is not None and self.length > self.capacity:
            raise ValueError(
                f"{type(self).__name__}: the state must have at most {self.capacity} tokens, the capacity; got "
                f"{self.length}. Pass a larger capacity, or None to grow."
            )

    def _memory(self) -> tuple[Tensor | None, Tensor | None]:
        """All slots of keys and of values."""
        keys, values, *_ = self._parts
        return keys.memory, values.memory

    def _check_tokens(self, k: Tensor, v: Tensor, grown: int) -> int:
        """Validates new tokens, ``grown`` more in the longest row; returns how many slots to allocate if need be."""
        caller, start = type(self).__name__, self.length
        self._check_append(k, v, *((None, None) if self._is_new else self._memory()))
        stop = start + grown
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{caller}: capacity is {self.capacity} tokens; got {grown} more than the {start} in the cache. "
                "Pass a larger capacity, or None to grow."
            )
        self._dtype = k.dtype
        return self._capacity_for(stop)

    def _capacity_for(self, stop: int) -> int:
        """How many slots to allocate for ``stop`` tokens if they exceed the memory."""
        return max(2 * self._parts[0].length, stop, MIN_CAPACITY) if self.capacity is None else self.capacity


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

    Rows may differ in length: after a padded prompt, and after `crop`, `join` and `replace`.

    With gradients enabled, outside of ``torch.no_grad()``, appending concatenates instead, since backward needs the
    tokens of each step.
    """

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """As `Cache.append`.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than before, and beyond capacity.
        """
        tokens, offset = self._extend(k, v, is_token)
        return Keys.of(tokens, offset, self._returned)

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `Cache.claim`."""
        claimed = self._claim(k, v, like)
        return None if claimed is None else Keys.of(*claimed, self._returned, key_count=self._parts[0].length)

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns."""
        return Keys.of(self._stored(), self.offset_of_latest(count), self._returned)

    def reserve(self, k: Tensor, v: Tensor, capacity: int) -> None:
        """Allocates memory for ``capacity`` tokens of these shapes, before the first append.

        Raises:
            ValueError: for keys and values that are not ``(B, Hkv, L, width)``.
        """
        self._check_append(k, v, None, None)
        shapes = self._format.shapes(k[:, :, :0].shape, v[:, :, :0].shape, k.dtype)
        for part, (shape, dtype) in zip(self._parts, shapes, strict=True):
            part.append_uninitialised((*shape,), dtype, k.device, capacity)

    def _extend_equally(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        grown = append_in_place(self._parts, k, v) if k.dtype is v.dtype is self._dtype else None
        return super()._extend_equally(k, v) if grown is None else grown


class Int8KVCache(KVCache):
    """A `KVCache` in int8: half the bytes of bf16, plus a scale of 4 bytes for each key and each value.

    Keys and values ``(B, Hkv, L, width)`` are rounded as by `qkv.cache.quantize`, ``x ~ codes * scale``. Integers, and
    tensors that require a gradient, are refused.

    Args:
        capacity: as in `KVCache`.

    Raises:
        ValueError: by a call with integers, or with tensors that require a gradient, outside of ``torch.no_grad()``.
            For a capacity as `KVCache`.

    Example:
        >>> import torch, qkv
        >>> layer, cache = qkv.MultiQueryAttention(64, 2, mask=qkv.Mask.causal()).eval(), qkv.Int8KVCache()
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(1, 5, 64), cache=cache)
        >>> cache.append(*torch.randn(2, 1, 1, 1, 32)).k.dtype
        torch.int8
    """

    _format = INT8
