"""Caches: where keys and values come from when they are not computed anew. Passed to a layer, never owned by one."""

import weakref
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from qkv import kernels
from qkv.arguments import require_int
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


class Owner:
    """Whose keys a cache holds. A layer leaves it there, so that no cache keeps a layer alive.

    A deep copy of a layer is another owner; one that shares its weights is the same.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Cache:
    """What a layer asks of a cache, and what all of them can do.

    A cache keeps nothing that it was given, but copies. Its own copies go on independently: ``copy.copy`` shares memory
    until one of both is written to, ``copy.deepcopy`` and pickles hold the tokens alone, and refuse those that were
    computed with gradients. It works in every mode of gradients, whatever the one before; but what `append` returned
    under ``torch.no_grad()`` is valid until the next `append` alone, which may write there: torch notices if a backward
    pass still needed it.
    """

    def __init__(self, parts: int = 2) -> None:
        self._parts = tuple(Growing() for _ in range(parts))
        """Keys and values; and the scales of both, where they are held in int8."""
        self._owners: tuple[Owner, ...] = ()

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._parts[0].length

    def append(self, k: Tensor, v: Tensor) -> "Keys | Int8Keys":
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all that new queries may see."""
        raise NotImplementedError

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Refuses the call of a layer that this cache is not for, before anything has changed.

        Args:
            owner: the layer's.
            mask: of the call.

        Raises:
            ValueError: for a layer other than the one whose keys are held; and in self-attention for a mask that shows
                later keys, since the queries of earlier calls have not seen those of this one.
        """
        if self.length:
            self._require(owner)
            if (mask.right is None or mask.right > 0) and mask.allow is None:
                raise ValueError(
                    f"{type(self).__name__}: {mask!r} shows a query the keys after its own, and those of the "
                    f"{self.length} tokens held have been answered without the ones of this call. Use Mask.causal(), "
                    "give all tokens at once, or write out what is seen: Mask.dense."
                )
        self._owners = (owner,)

    def _require(self, owner: Owner) -> None:
        if self._owners and owner not in self._owners:
            raise ValueError(
                f"{type(self).__name__}: the {self.length} tokens held are keys of another layer, "
                f"{self._owners[0].name}; got a call of {owner.name}. Make one cache for each layer, or reset it."
            )

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``, as when a draft of them was refused.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, or fewer than none.
        """
        self._check_crop(length)
        self.restore(length)

    def _check_crop(self, length: int) -> None:
        who = type(self).__name__
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"{who}: crop takes the number of tokens to keep, an int; got {length!r}.")
        if not 0 <= length <= self.length:
            raise ValueError(f"{who}: crop keeps between 0 and the {self.length} tokens held; got {length}.")

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order and as often as they are named, as when beams go on.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1.

        Raises:
            ValueError: for other rows.
        """
        memory = self._parts[0].memory
        if memory is None:
            return
        fits = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
        if not torch.compiler.is_compiling() and fits and rows.numel():
            fits = 0 <= int(rows.min()) <= int(rows.max()) < memory.shape[0]
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: select takes integers from 0 to {memory.shape[0] - 1}, a row of the batch "
                f"each, in a tensor of one dimension; got {rows!r}."
            )
        rows = rows.to(memory.device)
        self._parts = tuple([part.select(rows) for part in self._parts])

    def reset(self) -> None:
        """Forgets all: for other texts, in another batch, or of another layer."""
        self.restore(0)
        self._owners = ()

    def mark(self) -> Any:
        """What `restore` takes to undo the appends that come."""
        return self.length

    def restore(self, mark: Any) -> None:
        """Undoes the appends since ``mark``."""
        for part in self._parts:
            part.crop(mark)

    def held(self, mask: Mask) -> Mask:
        """The mask over the keys that the last append returned: here, over all."""
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(part.memory.untyped_storage().nbytes() for part in self._parts if part.memory is not None)

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._parts = tuple([copy(part) for part in self._parts])
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        # Of the layer, and of the one that is copied along.
        twin._owners = (*self._owners, *twin._owners)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but whose keys they are: the next layer's."""
        return {**vars(self), "_owners": ()}


class _GrowingCache(Cache):
    """What caches share that keep all tokens.

    Args:
        capacity: number of tokens to reserve and never to exceed; None grows without bound.
        parts: as of `Cache`.
    """

    def __init__(self, capacity: int | None = None, parts: int = 2) -> None:
        super().__init__(parts)
        who = type(self).__name__
        if capacity is not None:
            require_int(who, "capacity", capacity, ", or None to grow")
        if capacity is not None and capacity < 1:
            raise ValueError(f"{who}: capacity must be at least 1 token, or None to grow; got {capacity}.")
        self.capacity = capacity
        self._dtype: torch.dtype | None = None

    def _append_in_place(self, k: Tensor, v: Tensor) -> list[Tensor] | None:
        """The short way of appending, as `append_in_place`; None where it does not do."""
        return append_in_place(self._parts, k, v) if k.dtype is v.dtype is self._dtype else None

    def _admit_tokens(self, k: Tensor, v: Tensor) -> int:
        """How many tokens new memory is to hold."""
        who, start = type(self).__name__, self.length
        keys, values, *_ = self._parts
        check_append(who, k, v, keys.memory if start else None, values.memory if start else None, self._dtype)
        stop = start + k.shape[2]
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{who}: {start} of {self.capacity} tokens are taken, and {k.shape[2]} more do not fit. "
                "Give a larger capacity, or None to grow."
            )
        self._dtype = k.dtype
        return max(2 * start, stop, SMALLEST_BUFFER) if self.capacity is None else self.capacity


class KVCache(_GrowingCache):
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
                room = self._admit_tokens(k, v)
                grown = [part.extend(x, room) for part, x in zip(self._parts, (k, v), strict=True)]
            return Keys(grown[0], grown[1], start)
        except BaseException:  # out of memory, or interrupted: some parts have grown
            self.restore(start)
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
        super().__init__(capacity, parts=4)

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
            self.restore(start)
            raise
        return self.keys()._replace(offset=start)

    def _append_anyhow(self, k: Tensor, v: Tensor) -> None:
        if not (k.is_floating_point() and v.is_floating_point()):
            raise ValueError(f"Int8KVCache: k and v must be floating-point, to be rounded; got {k.dtype}, {v.dtype}.")
        if wants_grad(k, v):
            raise ValueError("Int8KVCache: int8 has no gradient; call it under torch.no_grad(), or use a KVCache.")
        room = self._admit_tokens(k, v)
        for x, codes, scales in self._pairs(k, v):
            if torch.is_grad_enabled() or not _suits_the_kernel(x):
                for part, new in zip((codes, scales), quantize(x), strict=True):
                    part.extend(new, room)
            else:
                code = codes.open(x.shape, torch.int8, x.device, room)
                scale = scales.open(x.shape[:3], torch.float32, x.device, room)
                kernels.quantize(x, code, scale)
                torch.autograd.graph.increment_version((code, scale))  # as torch's own operators do

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
        k, v, k_scale, v_scale = [part.tensor for part in self._parts]
        if k is None or v is None or k_scale is None or v_scale is None:
            raise ValueError("Int8KVCache: it is empty; append keys and values first.")
        return Int8Keys(k, v, self.length, k_scale, v_scale)

    def _pairs(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Growing, Growing], ...]:
        """What is to be rounded, and where its codes and scales go."""
        codes_k, codes_v, k_scale, v_scale = self._parts
        return (k, codes_k, k_scale), (v, codes_v, v_scale)


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


class SlidingKVCache(Cache):
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
        """Tokens appended, those that were dropped included."""
        return self._length

    def admit(self, owner: Owner, mask: Mask) -> None:
        """As `Cache.admit`.

        Raises:
            ValueError: as there, and for a mask that shows keys which this cache drops.
        """
        if mask.left is None or mask.left >= self.window or mask.sink_tokens > self.sink_tokens:
            raise ValueError(
                f"SlidingKVCache(window={self.window}, sink_tokens={self.sink_tokens}) drops keys that {mask!r} shows. "
                f"Use Mask.causal(window={self.window}, sink_tokens={self.sink_tokens}), or a KVCache."
            )
        super().admit(owner, mask)

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``; returns the sinks and all keys in a window.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than those held.
        """
        keys, values = [part.memory if part.length else None for part in self._parts]
        check_append("SlidingKVCache", k, v, keys, values, None if keys is None else keys.dtype)
        mark, new, room = self.mark(), k.shape[2], self._room
        try:
            if self._parts[0].length + new > room:
                self._parts = tuple([self._recent(part.tensor) for part in self._parts])
            before = self._parts[0].length
            grown = append_in_place(self._parts, k, v) if before + new <= room else None
            if grown is None:
                grown = [self._extend(part, x) for part, x in zip(self._parts, (k, v), strict=True)]
                if before + new > room:  # a prompt of many windows is not kept
                    self._parts = tuple([self._recent(x) for x in grown])
        except BaseException:  # as in a KVCache
            self.restore(mark)
            raise
        self._length += new
        self._returned = before + new
        return Keys(grown[0], grown[1], before)

    @property
    def _room(self) -> int:
        return self.sink_tokens + 2 * self.window

    def _extend(self, part: Growing, new: Tensor) -> Tensor:
        """All that is held and ``new`` behind it."""
        return part.extend(new, max(self._room, part.length + new.shape[2]))

    def _recent(self, tokens: Tensor | None) -> Growing:
        """What the next query may see of the tokens besides its own: the sinks, and those in its window."""
        recent = Growing()
        if tokens is not None:
            sinks = min(self.sink_tokens, tokens.shape[2])
            start = max(sinks, tokens.shape[2] - (self.window - 1))
            recent.extend(torch.cat([tokens[:, :, :sinks], tokens[:, :, start:]], dim=2), self._room)
        return recent

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``, as when a draft of them was refused.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, fewer than none, and where the next query would have to see keys
                that were dropped.
        """
        self._check_crop(length)
        count = self._parts[0].length
        dropped = self._length - count
        kept = length - dropped
        if dropped and length < self._length and kept - self.sink_tokens < self.window - 1:
            least = min(self._length, dropped + self.sink_tokens + self.window - 1)
            raise ValueError(
                f"SlidingKVCache: crop to {length} tokens needs keys in the window of the next one that were dropped; "
                f"of {self._length} tokens it can keep {least} or more. Crop earlier, or use a KVCache."
            )
        for part in self._parts:
            part.crop(kept)
        self._length = length

    def reset(self) -> None:
        """Forgets all: for other texts, in another batch, or of another layer."""
        self.restore((self._parts, 0, 0))
        self._owners = ()

    def mark(self) -> Any:
        """What `restore` takes to undo the appends that come."""
        return self._parts, self._parts[0].length, self._length

    def restore(self, mark: Any) -> None:
        """Undoes the appends since ``mark``."""
        self._parts, count, self._length = mark
        for part in self._parts:
            part.crop(count)

    def held(self, mask: Mask) -> Mask:
        """The mask over the keys that the last append returned."""
        if self._returned == self._length:
            return mask
        recent = self._returned - self.sink_tokens
        return mask.select_keys(self._length - recent, self._length, self.sink_tokens)


class CrossKVCache(Cache):
    """The projected context of a cross-attention, computed once and read at every decoding step.

    A layer that is given a context although its cache is full holds it against the one of these keys: the same tensor
    unchanged, or else the same numbers. (Tensors made under ``torch.inference_mode()`` do not say that they are
    unchanged; there it is cheaper not to give the context again.)

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
        super().__init__()
        self._fingerprint: Tensor | None = None
        self._given: tuple[weakref.ref[Tensor], int] | None = None

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Refuses a layer other than the one whose keys are held.

        Raises:
            ValueError: for such a layer.
        """
        if self.length:
            self._require(owner)
        self._owners = (owner,)

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Stores the keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)`` of the context.

        Raises:
            ValueError: on a second append.
        """
        if self.length:
            raise ValueError(
                f"CrossKVCache: it already holds a context of {self.length} tokens; got {k.shape[2]} more. "
                "Make one cache for each layer and context."
            )
        check_append("CrossKVCache", k, v, None, None, None)
        self._fingerprint = self._given = None
        try:
            grown = [part.extend(x, k.shape[2]) for part, x in zip(self._parts, (k, v), strict=True)]
        except BaseException:  # as in a KVCache
            self.restore(0)
            raise
        return Keys(grown[0], grown[1], None)

    def keys(self) -> Keys:
        """What was stored.

        Raises:
            ValueError: before the first append.
        """
        k, v = [part.tensor for part in self._parts]
        if k is None or v is None or not self.length:
            raise ValueError("CrossKVCache: it is empty; call the layer with a context first.")
        return Keys(k, v, None)

    def remember(self, context: Tensor) -> None:
        """Notes which context, ``(B, L, width)``, the keys are of."""
        self._fingerprint = _fingerprint(context)
        self._note(context)

    def require(self, context: Tensor) -> None:
        """Refuses a context that the keys are not of.

        Raises:
            ValueError: for such a context.
            RuntimeError: for such a context, from a compiled program.
        """
        if self._given is not None and not torch.compiler.is_compiling():
            given, version = self._given
            if given() is context and context._version == version:
                return
        if self._fingerprint is None:
            raise ValueError(
                f"CrossKVCache: the {self.length} tokens held were appended without a context, so that none can be "
                "held against them; call the layer without one."
            )
        if context.shape[1] != self.length:
            raise ValueError(
                f"CrossKVCache: the cache holds a context of {self.length} tokens; got another of "
                f"{context.shape[1]}. Make one CrossKVCache for each layer and context."
            )
        if torch.compiler.is_compiling():
            torch._assert_async((_fingerprint(context) == self._fingerprint).all(), _ANOTHER_CONTEXT)
        elif _can_read(context):
            if not torch.equal(_fingerprint(context), self._fingerprint):
                raise ValueError(_ANOTHER_CONTEXT)
            self._note(context)

    def _note(self, context: Tensor) -> None:
        counts = not torch.compiler.is_compiling() and not context.is_inference()
        self._given = (weakref.ref(context), context._version) if counts else None

    def crop(self, length: int) -> None:
        """Forgets all tokens of the context but the first ``length``.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, or fewer than none.
        """
        super().crop(length)
        if self._fingerprint is not None and length < self._fingerprint.shape[1]:
            self._fingerprint, self._given = self._fingerprint[:, :length].clone(), None

    def select(self, rows: Tensor) -> None:
        """As `Cache.select`; a context that is given again has these rows as well."""
        super().select(rows)
        if self._fingerprint is not None:
            self._fingerprint, self._given = self._fingerprint[rows.to(self._fingerprint.device)], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": None}


_ANOTHER_CONTEXT = (
    "CrossKVCache: it holds another context, of as many tokens as the one given. Make one CrossKVCache for each layer "
    "and context."
)

torch.serialization.add_safe_globals([Growing, KVCache, Int8KVCache, SlidingKVCache, CrossKVCache])

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
    if k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"{who}: k and v must agree in dtype and device; got {k.dtype} on {k.device} and {v.dtype} on {v.device}."
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


def _fingerprint(context: Tensor) -> Tensor:
    """``(B, L)``, numbers that two contexts ``(B, L, width)`` have in common only if they are the same in bits."""
    bits = context.detach().view(_SAME_SIZE[context.element_size()]).long()
    factors = torch.arange(1, bits.shape[2] + 1, device=bits.device) * _SPREAD
    factors = (factors ^ (factors >> 31)) * _SPREAD | 1
    return (bits * factors).sum(2)  # modulo 2^64


_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = 0x5851F42D4C957F2D
"""A multiplier of Knuth's, which spreads small numbers over all bits."""


def _can_read(tensor: Tensor) -> bool:
    """Whether numbers can be looked at: not where somebody records or transforms operators, or there are none."""
    return kernels.is_plain(tensor) and not (
        tensor.is_meta or kernels.is_watched() or torch._C._are_functorch_transforms_active()
    )
