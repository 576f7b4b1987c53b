"""Layers that store keys and values unquantised, and append in place: `AppendLayer`, `LatentLayer`, `SlidingLayer`."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import Self

from qkv.cache import Keys
from qkv.cache.buffer import AppendBuffer, append_in_place, compact_copy, send_by_value, slots_for
from qkv.integrations.transformers.cache.base_layer import HandledLayer, capacity_for, length_of
from qkv.layers.latent_heads import beside


class _BufferedLayer(HandledLayer):
    """Base of the layers that store keys and values unquantised, each in an `AppendBuffer`.

    Copies are independent, as those of a `qkv.cache.Cache`.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys, self._values = AppendBuffer(), AppendBuffer()

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__setstate__({**vars(self), "_keys": copy(self._keys), "_values": copy(self._values)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The tokens without spare capacity, for deep copies and pickles.

        Raises:
            RuntimeError: for tokens that require grad.
        """
        tokens = {"keys": compact_copy(self.keys), "values": compact_copy(self.values)}
        return {**super().__getstate__(), **tokens, "_keys": AppendBuffer(), "_values": AppendBuffer()}

    def length_before(self) -> int:
        """The number of tokens before those that are appended next, among the keys that `update` returns."""
        return length_of(self.keys)

    def mark(self) -> tuple[Any, ...]:
        """The state to which `restore` returns after a `claim`."""
        return self.keys, self.values, self._keys.length, self._values.length

    def restore(self, mark: tuple[Any, ...]) -> None:
        """Undoes a `claim` since ``mark``."""
        self.keys, self.values, *lengths = mark
        for memory, length in zip((self._keys, self._values), lengths, strict=True):
            memory.crop(length)

    def _claim(self, k: Sequence[int], v: Sequence[int], like: Tensor, capacity: int) -> tuple[Tensor, Tensor] | None:
        """Slots for tokens of these shapes after the cached ones; returns all tokens, or None if they do not follow."""
        if torch.is_grad_enabled() or not length_of(self.keys):
            return None
        for memory, cached, shape in ((self._keys, self.keys, k), (self._values, self.values, v)):
            batch, heads, _, width = cached.shape
            if (batch, heads, width) != (shape[0], shape[1], shape[3]):
                return None
            if cached.dtype is not like.dtype or cached.device != like.device:
                return None
            memory.adopt(cached)
        self._keys.claim(k, like.dtype, like.device, capacity)
        self._values.claim(v, like.dtype, like.device, capacity)
        keys, values = self._keys.view(), self._values.view()
        assert keys is not None
        assert values is not None
        return keys, values


class AppendLayer(_BufferedLayer):
    """All keys and values of one layer, in memory with spare capacity.

    transformers' own operations (reordering for beams, cropping, repeating, selecting) work unchanged: tensors that are
    still views of the buffer are appended to in place, new tensors are copied once.

    Compiled programs write to memory and count the tokens; ``keys`` and ``values`` are made when somebody reads them
    again, since each view that a program returns costs more than the write.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_views = True
        """whether ``keys`` and ``values`` are set; else the tokens are those in memory"""

    def __getattr__(self, name: str) -> Any:
        if name not in ("keys", "values") or self.__dict__.get("_has_views", True):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.keys, self.values, self._has_views = self._keys.view(), self._values.view(), True
        return self.__dict__[name]

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        self.require_readable()
        return super().get_seq_length() if self._has_views else self._keys.length

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates memory for a first update with tensors like these."""
        for memory, states in ((self._keys, key_states), (self._values, value_states)):
            memory.append_uninitialised(
                states[:, :, :0].shape, states.dtype, states.device, capacity_for(states.shape[2])
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns all, as views that the next update may invalidate."""
        if torch.compiler.is_compiling():
            return self._update_in_program(key_states, value_states)
        is_current = self._keys.is_current_view(self.keys) and self._values.is_current_view(self.values)
        appended = append_in_place((self._keys, self._values), key_states, value_states) if is_current else None
        if appended is None:
            self._check_and_initialize(key_states, value_states)
            appended = [_append(self._keys, self.keys, key_states), _append(self._values, self.values, value_states)]
        self.keys, self.values = appended
        return self.keys, self.values

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """Counts tokens of these shapes as appended, for the kernel to write; as `qkv.cache.Cache.claim`.

        Returns:
            All keys and values; None, with nothing changed, for tokens that only `update` takes, or refuses.
        """
        offset = length_of(self.keys)
        claimed = self._claim(k, v, like, capacity_for(offset + k[2]))
        if claimed is None:
            return None
        self.keys, self.values = claimed
        return Keys(*claimed, offset)

    def _update_in_program(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update` as a compiler follows it: in place, or by concatenation where a graph is recorded."""
        self.require_readable()
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return super().update(key_states, value_states)  # type: ignore[no-any-return]
        if self._has_views:
            self._check_and_initialize(key_states, value_states)
            for memory, cached in ((self._keys, self.keys), (self._values, self.values)):
                memory.replace(cached if length_of(cached) else None)
            del self.keys, self.values
            self._has_views = False
        pairs = ((self._keys, key_states), (self._values, value_states))
        keys, values = [memory.write(new, capacity_for(memory.length + new.shape[2])) for memory, new in pairs]
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search; copies once."""
        if self.get_seq_length() > 0:
            self._keys, self._values = (
                _select(memory, cached, beam_idx)
                for memory, cached in ((self._keys, self.keys), (self._values, self.values))
            )
            self.keys, self.values = self._keys.tensor, self._values.tensor


class LatentLayer(AppendLayer):
    """The latents and rotary keys of one layer of latent attention, side by side in one memory.

    transformers takes them for keys and values. Both that it gets are views of the same rows, which `latent` reads
    without a copy.
    """

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates memory for a first update with tensors like these."""
        batch, heads, length, width = key_states.shape
        shape = (batch, heads, 0, width + value_states.shape[3])
        self._keys.append_uninitialised(shape, key_states.dtype, key_states.device, capacity_for(length))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends latents ``(B, 1, L, rank)`` and rotary keys ``(B, 1, L, rope_dim)``; returns all, as views."""
        if torch.compiler.is_compiling():
            return DynamicLayer.update(self, key_states, value_states)  # type: ignore[no-any-return]
        self._check_and_initialize(key_states, value_states)
        cached = beside(self.keys, self.values) if length_of(self.keys) else self.keys
        rows = _append(self._keys, cached, torch.cat([key_states, value_states], dim=3))
        self.keys, self.values = rows.split([key_states.shape[3], value_states.shape[3]], dim=3)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search."""
        if self.get_seq_length() > 0:
            self.batch_select_indices(beam_idx.to(self.keys.device))


class SlidingLayer(_BufferedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values in the window of the next query, in memory for at most two windows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns those in the window of any new token."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self._check_and_initialize(key_states, value_states)
        if self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        keys, kept_keys = self._roll(self._keys, self.keys, key_states)
        values, kept_values = self._roll(self._values, self.values, value_states)
        self.keys, self.values = kept_keys, kept_values
        self.cumulative_length += key_states.shape[2]
        return keys, values

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `AppendLayer.claim`."""
        offset, capacity = length_of(self.keys), 2 * self.sliding_window
        if self.record_past or offset + k[2] > capacity:
            return None
        claimed = self._claim(k, v, like, slots_for(offset + k[2], capacity))
        if claimed is None:
            return None
        self.keys, self.values = (tokens[:, :, max(0, offset + k[2] - self.sliding_window + 1) :] for tokens in claimed)
        self.cumulative_length += k[2]
        return Keys(*claimed, offset)

    def mark(self) -> tuple[Any, ...]:
        """As `AppendLayer.mark`."""
        return *super().mark(), self.cumulative_length

    def restore(self, mark: tuple[Any, ...]) -> None:
        """As `AppendLayer.restore`."""
        *rest, self.cumulative_length = mark
        super().restore(tuple(rest))

    def _roll(self, memory: AppendBuffer, cached: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Cached and new tokens concatenated, and those of them in the window of the next query."""
        capacity, before = 2 * self.sliding_window, self.sliding_window - 1
        length = length_of(cached) + new.shape[2]
        if length <= capacity:
            tokens = _append(memory, cached, new, slots_for(length, capacity))
            return tokens, tokens[:, :, max(0, tokens.shape[2] - before) :]
        # Cloned, so that the memory of a prompt of many windows is freed.
        tokens = torch.cat([cached, new] if length_of(cached) else [new], dim=2)
        return tokens, tokens[:, :, tokens.shape[2] - before :].clone()


def _append(memory: AppendBuffer, cached: Tensor, new: Tensor, capacity: int | None = None) -> Tensor:
    """Appends ``new`` to the cached tokens, in place where these are a view of ``memory``."""
    if length_of(cached):
        memory.adopt(cached)
    else:
        memory.crop(0)
    return memory.extend(new, capacity_for(memory.length + new.shape[2]) if capacity is None else capacity)


def _select(memory: AppendBuffer, cached: Tensor, rows: Tensor) -> AppendBuffer:
    """A buffer with these rows of the batch."""
    memory.adopt(cached)
    return memory.select(rows.to(cached.device))


for _kind in (AppendLayer, LatentLayer, SlidingLayer):
    send_by_value(_kind)
