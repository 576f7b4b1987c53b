"""Layers that store keys and values in int8: `Int8Layer`, `Int8SlidingLayer`."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import Self

from qkv.cache import Int8KVCache, Keys, SlidingKVCache
from qkv.cache.buffer import compact_copy, send_by_value, wants_grad
from qkv.integrations.transformers.cache.base_layer import HandledLayer, capacity_for, length_of
from qkv.integrations.transformers.lazy_tensor import Int8Tensor


class _RoundedLayer(HandledLayer):
    """Base of the layers that store keys and values in int8, in a cache of ours.

    int8 has no gradient: while keys or values require grad, as in training, a layer stores them unquantised, and
    quantises them at the first call without gradients.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = self._new_cache()

    def _new_cache(self) -> Int8KVCache | SlidingKVCache:
        raise NotImplementedError

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__setstate__({**vars(self), "_cache": copy(self._cache)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """As `AppendLayer`; ``keys`` and ``values`` are views of the int8 cache and rebuilt by `__setstate__`."""
        if self._is_quantised:
            return {**super().__getstate__(), "keys": self.keys.dtype, "values": self.values.dtype}
        return {**super().__getstate__(), "keys": compact_copy(self.keys), "values": compact_copy(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.keys, torch.dtype):
            self._set_views(self.keys, self.values)

    @property
    def _is_quantised(self) -> bool:
        """Whether the tokens are stored in int8."""
        return isinstance(self.keys, Int8Tensor)

    def reset(self) -> None:
        """Removes all tokens."""
        super().reset()
        self._cache.reset()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns those that the queries may see.

        They are `Int8Tensor`, which other readers dequantise.
        """
        if self._keeps_dtype(key_states, value_states):
            if not torch.compiler.is_compiling():
                self._check_and_initialize(key_states, value_states)
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._is_quantised:
            self._cache.reset()
            if length_of(self.keys):
                self._cache.append(self.keys, self.values)
        seen = self._seen(self._cache.append(key_states, value_states), key_states.shape[2])
        self._set_views(key_states.dtype, value_states.dtype)
        return _lazy(seen, key_states.dtype, value_states.dtype)

    def _keeps_dtype(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether these tokens are not rounded."""
        return wants_grad(key_states, value_states, self.keys, self.values)

    def _seen(self, cached: Keys, count: int) -> Keys:
        """Of the keys that the cache returned, those that the ``count`` last tokens see."""
        return cached

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `AppendLayer.claim`."""
        if not self._is_quantised:
            return None
        claimed = self._cache.claim(k, v, like)
        if claimed is None:
            return None
        self._set_views(like.dtype, like.dtype)
        return self._seen(claimed, k[2])

    def length_before(self) -> int:
        """As `AppendLayer.length_before`."""
        return length_of(self.keys)

    def mark(self) -> tuple[Any, ...]:
        """As `AppendLayer.mark`."""
        return self.keys, self.values, self._cache.mark()

    def restore(self, mark: tuple[Any, ...]) -> None:
        """As `AppendLayer.restore`."""
        self.keys, self.values, inner = mark
        self._cache.restore(inner)

    def _set_views(self, keys_dtype: torch.dtype, values_dtype: torch.dtype) -> None:
        """Sets ``keys`` and ``values`` to views of the int8 cache, of what the next token sees besides itself."""
        self.keys, self.values = _lazy(self._seen(self._cache.latest(0), 0), keys_dtype, values_dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0 or not self._is_quantised:
            super().crop(tokens_to_remove)
        else:
            self._cache.crop(max(0, self._cache.length + tokens_to_remove))
            self._set_views(self.keys.dtype, self.values.dtype)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        if self.get_seq_length() > 0:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        if not self._is_quantised:
            super().batch_select_indices(indices)
        else:
            self._cache.select(indices)
            self._set_views(self.keys.dtype, self.values.dtype)


class Int8Layer(_RoundedLayer):
    """All keys and values of one layer in int8, which ``attn_implementation="qkv"`` reads without dequantising."""

    _cache: Int8KVCache

    def _new_cache(self) -> Int8KVCache:
        return Int8KVCache()

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        self.require_readable()
        return self._cache.length if self._is_quantised else super().get_seq_length()

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates memory for a first update with tensors like these."""
        self._cache.reserve(key_states, value_states, capacity_for(key_states.shape[2]))


class Int8SlidingLayer(_RoundedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values in the window of the next query, in int8.

    Tokens that transformers may take back, as drafts, are not rounded.
    """

    cumulative_length: int

    def _new_cache(self) -> SlidingKVCache:
        return SlidingKVCache(self.sliding_window, dtype=torch.int8)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns those in the window of any new token, as `Int8Layer`."""
        length = self.cumulative_length + key_states.shape[2]
        tokens = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length = length
        return tokens

    def _keeps_dtype(self, key_states: Tensor, value_states: Tensor) -> bool:
        return self.record_past or super()._keeps_dtype(key_states, value_states)

    def _seen(self, cached: Keys, count: int) -> Keys:
        first = max(0, cached.lk - (self.sliding_window - 1 + count))
        k, v, k_scale, v_scale = (
            x if x is None else x[:, :, first : cached.lk] for x in (cached.k, cached.v, cached.k_scale, cached.v_scale)
        )
        return Keys(k, v, cached.lk - first - count, k_scale=k_scale, v_scale=v_scale)  # type: ignore[arg-type]

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `AppendLayer.claim`."""
        claimed = None if self.record_past else super().claim(k, v, like)
        if claimed is not None:
            self.cumulative_length += k[2]
        return claimed

    def mark(self) -> tuple[Any, ...]:
        """As `AppendLayer.mark`."""
        return super().mark(), self.cumulative_length

    def restore(self, mark: tuple[Any, ...]) -> None:
        """As `AppendLayer.restore`."""
        of_tokens, self.cumulative_length = mark
        super().restore(of_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens, as transformers' own layer does."""
        if self.cumulative_length >= self.sliding_window:
            DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        else:
            super().crop(tokens_to_remove)
            self.cumulative_length = length_of(self.keys)


def _lazy(keys: Keys, keys_dtype: torch.dtype, values_dtype: torch.dtype) -> tuple[Int8Tensor, Int8Tensor]:
    """Keys and values in int8 as tensors of these dtypes."""
    assert keys.k_scale is not None
    assert keys.v_scale is not None
    return Int8Tensor(keys.k, keys.k_scale, keys_dtype), Int8Tensor(keys.v, keys.v_scale, values_dtype)


for _kind in (Int8Layer, Int8SlidingLayer):
    send_by_value(_kind)
