"""Caches: where keys and values come from when they are not computed anew. Passed to a layer, never owned by one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import kernels
from qkv.growing import Growing, append_in_place, wants_grad
from qkv.masks import Mask


class Keys(NamedTuple):
    """What a cache returns: keys and values in order, and where the queries appended last stand among them."""

    k: Tensor
    """(B, Hkv, Lk, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv)"""
    offset: int | None
    """Position of the first appended token among these keys; None where queries have no position among them."""

    @property
    def options(self) -> dict[str, Any]:
        """What `qkv.attention` is to know of them."""
        return {"offset": self.offset}


class Int8Keys(NamedTuple):
    """`Keys` in int8."""

    k: Tensor
    v: Tensor
    offset: int
    k_scale: Tensor
    """(B, Hkv, Lk), what each key is to be multiplied by; so v_scale."""
    v_scale: Tensor

    @property
    def options(self) -> dict[str, Any]:
        """What `qkv.attention` is to know of them."""
        return {"offset": self.offset, "k_scale": self.k_scale, "v_scale": self.v_scale}


class _GrowingCache:
    """What caches share that keep all tokens, in the tensors of `_parts`."""

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            who = type(self).__name__
            raise ValueError(f"{who}: capacity must be at least 1 token, or None to grow; got {capacity}.")
        self.capacity = capacity
        self._k = Growing()
        self._v = Growing()
        self._dtype: torch.dtype | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._k.length

    def _append_in_place(self, k: Tensor, v: Tensor) -> list[Tensor] | None:
        """The short way of appending, as `append_in_place`; None where it does not do."""
        return append_in_place(self._parts, k, v) if k.dtype is v.dtype is self._dtype else None

    def _admit(self, k: Tensor, v: Tensor) -> int:
        """How many tokens new buffers are to hold."""
        who = type(self).__name__
        held = (None, None) if self._dtype is None else (self._k.memory, self._v.memory)
        check_append(who, k, v, *held, self._dtype)
        self._dtype = k.dtype
        start, stop = self.length, self.length + k.shape[2]
        if self.capacity is None:
            return max(2 * start, stop, SMALLEST_BUFFER)
        if stop > self.capacity:
            raise ValueError(
                f"{who}: {start} of {self.capacity} tokens are taken, and {k.shape[2]} more do not fit. "
                "Give a larger capacity, or None to grow."
            )
        return self.capacity

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``, as when a draft of them was refused.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, or fewer than none.
        """
        who = type(self).__name__
        if not isinstance(length, int):
            raise TypeError(f"{who}: crop takes the number of tokens to keep, an int; got {length!r}.")
        if not 0 <= length <= self.length:
            raise ValueError(f"{who}: crop keeps between 0 and the {self.length} tokens held; got {length}.")
        for part in self._parts:
            part.crop(length)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order and as often as they are named, as when beams go on.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1.

        Raises:
            ValueError: for other rows.
        """
        held = self._k.memory
        if held is None:
            return
        fits = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
        if not torch.compiler.is_compiling() and fits and rows.numel():
            fits = 0 <= int(rows.min()) <= int(rows.max()) < held.shape[0]
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: select takes integers from 0 to {held.shape[0] - 1}, a row of the batch "
                f"each, in a tensor of one dimension; got {rows!r}."
            )
        for part in self._parts:
            part.select(rows)

    def held(self, mask: Mask) -> Mask:
        """The mask over the keys that the last append returned: here, over all."""
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return _nbytes(*(part.memory for part in self._parts))

    @property
    def _parts(self) -> tuple[Growing, ...]:
        return self._k, self._v


class KVCache(_GrowingCache):
    """All keys and values so far, in buffers that double when full: appending is amortised O(1), without a copy.

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

    The keys returned are views of the buffers, valid until the next append. Where a gradient is wanted, appending
    concatenates instead, so that every step keeps what its backward needs.
    """

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all so far.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than the first append's, and past capacity.
        """
        start = self.length
        try:
            grown = self._append_in_place(k, v)
            if grown is None:
                room = self._admit(k, v)
                grown = [self._k.extend(k, room), self._v.extend(v, room)]
            return Keys(grown[0], grown[1], start)
        except BaseException:  # out of memory, or interrupted: some parts have grown
            self.crop(start)
            raise


class Int8KVCache(_GrowingCache):
    """A `KVCache` in int8: half the bytes of bf16, and 4 more for each key and each value of a head.

    Each key and each value is rounded to 255 steps of its own largest number, as `quantize` does.

    Args:
        capacity: as of `KVCache`.

    Example:
        >>> import torch, qkv
        >>> layer, cache = qkv.MultiQueryAttention(64, 2, mask=qkv.Mask.causal()).eval(), qkv.Int8KVCache()
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(1, 5, 64), cache=cache)
        >>> cache.append(*torch.randn(2, 1, 1, 1, 32)).k.dtype
        torch.int8
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._k_scale = Growing()
        self._v_scale = Growing()

    def append(self, k: Tensor, v: Tensor) -> Int8Keys:
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all so far.

        Raises:
            ValueError: as `KVCache.append`, for keys or values that a gradient is wanted of, and for integers.
        """
        start = self.length
        try:
            if self._append_in_place(k, v) is None:
                self._append_anyhow(k, v)
        except BaseException:  # as in a KVCache
            self.crop(start)
            raise
        return self.keys()._replace(offset=start)

    def _append_anyhow(self, k: Tensor, v: Tensor) -> None:
        if not (k.is_floating_point() and v.is_floating_point()):
            raise ValueError(f"Int8KVCache: k and v must be floating-point, to be rounded; got {k.dtype}, {v.dtype}.")
        if wants_grad(k, v):
            raise ValueError("Int8KVCache: int8 has no gradient; call it under torch.no_grad(), or use a KVCache.")
        room = self._admit(k, v)
        for x, codes, scales in self._pairs(k, v):
            code = codes.open(x.shape, torch.int8, x.device, room)
            scale = scales.open(x.shape[:3], torch.float32, x.device, room)
            if _suits_the_kernel(x):
                kernels.quantize(x, code, scale)
            else:
                for place, new in zip((code, scale), quantize(x), strict=True):
                    place.copy_(new)

    def reserve(self, k: Tensor, v: Tensor, room: int) -> None:
        """Has memory made for ``room`` tokens like these, before the first append.

        Raises:
            ValueError: for keys and values that are no ``(B, Hkv, L, width)``.
        """
        check_append("Int8KVCache", k, v, None, None, None)
        for x, codes, scales in self._pairs(k, v):
            nothing = x[:, :, :0].shape
            codes.open(nothing, torch.int8, x.device, room)
            scales.open(nothing[:3], torch.float32, x.device, room)

    def keys(self) -> Int8Keys:
        """All that is held, with the offset of the next token.

        Raises:
            ValueError: before the first append.
        """
        k, v, k_scale, v_scale = (part.tensor for part in self._parts)
        if k is None or v is None or k_scale is None or v_scale is None:
            raise ValueError("Int8KVCache: it is empty; append keys and values first.")
        return Int8Keys(k, v, self.length, k_scale, v_scale)

    @property
    def _parts(self) -> tuple[Growing, ...]:
        return self._k, self._v, self._k_scale, self._v_scale

    def _pairs(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Growing, Growing], ...]:
        """What is to be rounded, and where its codes and scales go."""
        return (k, self._k, self._k_scale), (v, self._v, self._v_scale)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8 and what each is to be multiplied by: ``x ~ codes * scale[..., None]``, off by half a scale at most.

    Args:
        x: ``(..., width)``, floating-point.

    Returns:
        codes ``(..., width)`` from -127 to 127, and the scale ``(...)`` in fp32, a 127th of the largest of the row.

    Example:
        >>> import torch
        >>> from qkv.cache import quantize
        >>> quantize(torch.tensor([0.5, -1.0, 0.25]))
        (tensor([  64, -127,   32], dtype=torch.int8), tensor(0.0079))
    """
    if _suits_the_kernel(x):
        codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)
        kernels.quantize(x, codes, scale)
        return codes, scale
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / 127
    codes = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return codes.round_().to(torch.int8), scale


class SlidingKVCache:
    """The last ``window`` keys and values, in memory that does not grow with the text.

    Args:
        window: number of keys that a query sees, its own included, as in ``Mask.causal(window=...)``.
        sink_tokens: number of first keys kept for good.

    Positions are counted among the keys returned, sinks first, so that ``Mask.causal(window, sink_tokens)`` with the
    offset returned shows the same keys as without a cache. (ALiBi, which needs distances to the sinks, does not.)

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
        if window < 1:
            raise ValueError(f"SlidingKVCache: window must be at least 1 key, the query's own; got {window}.")
        if sink_tokens < 0:
            raise ValueError(f"SlidingKVCache: sink_tokens must be at least 0; got {sink_tokens}.")
        self.window = window
        self.sink_tokens = sink_tokens
        self.length = 0
        self._held = 0
        self._returned = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``; returns the sinks and all keys in a window.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than the first append's.
        """
        check_append("SlidingKVCache", k, v, self._k, self._v, None if self._k is None else self._k.dtype)
        room, held, new = self.sink_tokens + 2 * self.window, self._held, k.shape[2]
        if wants_grad(k, v, self._k, self._v) or held + new > room:
            keys, values = self._recent(self._k, k), self._recent(self._v, v)
            before = keys.shape[2] - new
            self._keep(keys, values, room)
        else:
            self._k, self._v = _reserve(self._k, k, held, room), _reserve(self._v, v, held, room)
            self._k[:, :, held : held + new] = k
            self._v[:, :, held : held + new] = v
            self._held = held + new
            keys, values, before = self._k[:, :, : held + new], self._v[:, :, : held + new], held
        self.length += new
        self._returned = before + new
        return Keys(keys, values, before)

    def _recent(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """The sinks, the keys in the window of the first new token, and the new ones."""
        if buffer is None:
            return new
        sinks = min(self.sink_tokens, self._held)
        start = max(sinks, self._held - (self.window - 1))
        return torch.cat([buffer[:, :, :sinks], buffer[:, :, start : self._held], new], dim=2)

    def _keep(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Stores the sinks and the keys that the next query may see."""
        sinks = min(self.sink_tokens, keys.shape[2])
        start = max(sinks, keys.shape[2] - (self.window - 1))
        kept_k = torch.cat([keys[:, :, :sinks], keys[:, :, start:]], dim=2)
        kept_v = torch.cat([values[:, :, :sinks], values[:, :, start:]], dim=2)
        self._held = kept_k.shape[2]
        if wants_grad(kept_k, kept_v):
            self._k, self._v = kept_k, kept_v
            return
        self._k, self._v = _reserve(self._k, kept_k, 0, room), _reserve(self._v, kept_v, 0, room)
        self._k[:, :, : self._held] = kept_k
        self._v[:, :, : self._held] = kept_v

    def held(self, mask: Mask) -> Mask:
        """The mask over the keys that the last append returned.

        Raises:
            ValueError: when the mask shows keys that this cache has dropped.
        """
        if mask.left is None or mask.left >= self.window or mask.sink_tokens > self.sink_tokens:
            raise ValueError(
                f"SlidingKVCache(window={self.window}, sink_tokens={self.sink_tokens}) drops keys that {mask!r} shows. "
                f"Use Mask.causal(window={self.window}, sink_tokens={self.sink_tokens}), or a KVCache."
            )
        if self._returned == self.length:
            return mask
        recent = self._returned - self.sink_tokens
        return mask.select_keys(self.length - recent, self.length, self.sink_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return _nbytes(self._k, self._v)


class CrossKVCache:
    """The projected context of a cross-attention, computed once and read at every decoding step.

    Example:
        >>> import torch, qkv
        >>> layer = qkv.CrossAttention(16, 2)
        >>> cache, context = qkv.CrossKVCache(), torch.randn(1, 7, 16)
        >>> first = layer(torch.randn(1, 1, 16), context, cache=cache)
        >>> later = layer(torch.randn(1, 1, 16), cache=cache)
        >>> cache.length
        7
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Keys | None = None

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Stores the keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)`` of the context.

        Raises:
            ValueError: on a second append.
        """
        if self._keys is not None:
            raise ValueError(
                f"CrossKVCache: it already holds a context of {self.length} tokens; got {k.shape[2]} more. "
                "Make one cache for each layer and context."
            )
        check_append("CrossKVCache", k, v, None, None, None)
        self._keys = Keys(k, v, None)
        self.length = k.shape[2]
        return self._keys

    def keys(self) -> Keys:
        """What was stored.

        Raises:
            ValueError: before the first append.
        """
        if self._keys is None:
            raise ValueError("CrossKVCache: it is empty; call the layer with a context first.")
        return self._keys

    def held(self, mask: Mask) -> Mask:
        """The mask over the keys stored: here, over all."""
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for tensor in self._keys[:2]) if self._keys is not None else 0


Cache = KVCache | Int8KVCache | SlidingKVCache | CrossKVCache
"""Any of them."""

SMALLEST_BUFFER = 16


def _suits_the_kernel(x: Tensor) -> bool:
    floating = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cpu and floating and x.dim() == 4 and x.stride(3) == 1 and kernels.may_pass(x)


def check_append(
    who: str, k: Tensor, v: Tensor, held_k: Tensor | None, held_v: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Refuses keys and values that do not go together, or not with those held, before anything has changed."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{who}: {name} must be (B, Hkv, L, width); got shape {tuple(tensor.shape)}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{who}: k and v must agree in batch, heads and length; got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    for name, tensor, held in (("k", k, held_k), ("v", v, held_v)):
        if held is None:
            continue
        same_sizes = tensor.shape[:2] == held.shape[:2] and tensor.shape[3] == held.shape[3]
        if not same_sizes or tensor.dtype != dtype or tensor.device != held.device:
            batch, heads, _, width = held.shape
            raise ValueError(
                f"{who}: {name} must be ({batch}, {heads}, L, {width}) in {dtype} on {held.device}, as at the "
                f"first append; got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}. "
                "Make one cache for each layer and batch."
            )


def _reserve(buffer: Tensor | None, like: Tensor, length: int, room: int) -> Tensor:
    """A buffer for at least ``room`` tokens shaped like ``like``, with the first ``length`` of the old one."""
    if buffer is not None and buffer.shape[2] >= room:
        return buffer
    batch, heads, _, width = like.shape
    larger = like.new_empty(batch, heads, room, width)
    if buffer is not None:
        larger[:, :, :length] = buffer[:, :, :length]
    return larger


def _nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the memory that the tensors are views of."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
