"""Caches for transformers' models that append without copying what they hold."""

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from typing_extensions import Self

from qkv.cache import Int8Keys, Int8KVCache
from qkv.cache.buffer import AppendBuffer, append_in_place, compact_copy, send_by_value, wants_grad
from qkv.integrations.transformers.lazy_tensor import Int8Tensor


def _capacity_for(tokens: int) -> int:
    """Tokens of new memory for so many. Little waits to be filled; all are moved once in 64 steps or more.

    A prompt gets room as well: moved at the first step, its layers would leave holes that the next ones do not fit.
    """
    return tokens + max(tokens // 16, 64)


class _Buffered(DynamicLayer):  # type: ignore[misc]
    """What our layers share that keep tensors as they are: memory for each.

    Copies go on independently, as those of a `qkv.cache.Cache` do.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys, self._values = AppendBuffer(), AppendBuffer()

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update({**vars(self), "_keys": copy(self._keys), "_values": copy(self._values)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The tokens without the memory around them, for deep copies and pickles.

        Raises:
            RuntimeError: for tokens that were computed with gradients.
        """
        tokens = {"keys": compact_copy(self.keys), "values": compact_copy(self.values)}
        return {**vars(self), **tokens, "_keys": AppendBuffer(), "_values": AppendBuffer()}

    def _admit(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuses what does not go with the tokens held, before anything has changed."""
        for name, held, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            if new.dim() != 4:
                raise ValueError(f"QKVCache: {name} must be (B, heads, L, width); got shape {tuple(new.shape)}.")
            if not _length(held):
                continue
            batch, heads, _, width = held.shape
            if new.shape != (batch, heads, new.shape[2], width):
                raise ValueError(
                    f"QKVCache: {name} must be ({batch}, {heads}, L, {width}), as those held; got shape "
                    f"{tuple(new.shape)}. Make one cache for each model and batch of texts."
                )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)


class GrowingLayer(_Buffered):
    """All keys and values of one layer, in memory with room behind them.

    Takes transformers' own operations (reordering for beams, cropping, repeating, selecting) as they are: what is left
    in place grows in place, what was made anew is copied once.
    """

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for a first update like this one."""
        for memory, states in ((self._keys, key_states), (self._values, value_states)):
            memory.append_uninitialised(
                states[:, :, :0].shape, states.dtype, states.device, _capacity_for(states.shape[2])
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns all, as views that the next update may move."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        held = self._keys.is_current_view(self.keys) and self._values.is_current_view(self.values)
        grown = append_in_place((self._keys, self._values), key_states, value_states) if held else None
        if grown is None:
            self._admit(key_states, value_states)
            grown = [_extend(self._keys, self.keys, key_states), _extend(self._values, self.values, value_states)]
        self.keys, self.values = grown
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search, with one copy."""
        if self.get_seq_length() > 0:
            self._keys, self._values = (
                _select(memory, held, beam_idx)
                for memory, held in ((self._keys, self.keys), (self._values, self.values))
            )
            self.keys, self.values = self._keys.tensor, self._values.tensor


class SlidingLayer(_Buffered, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values of one layer that the next query may see, in memory for two windows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns those in a window of any of them."""
        if torch.compiler.is_compiling() or self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self._admit(key_states, value_states)
        keys, kept_keys = self._roll(self._keys, self.keys, key_states)
        values, kept_values = self._roll(self._values, self.values, value_states)
        self.keys, self.values = kept_keys, kept_values
        self.cumulative_length += key_states.shape[2]
        return keys, values

    def _roll(self, memory: AppendBuffer, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """What was held and ``new`` behind it, and what of both the next query may see."""
        capacity, before = 2 * self.sliding_window, self.sliding_window - 1
        if _length(held) + new.shape[2] <= capacity:
            seen = _extend(memory, held, new, capacity)
            return seen, seen[:, :, max(0, seen.shape[2] - before) :]
        # A prompt of many windows is not kept.
        seen = torch.cat([held, new] if _length(held) else [new], dim=2)
        return seen, seen[:, :, seen.shape[2] - before :].clone()


class Int8Layer(DynamicLayer):  # type: ignore[misc]
    """All keys and values of one layer in int8, which ``attn_implementation="qkv"`` reads as they are.

    int8 has no gradient. Where one is wanted of keys or values, as in a training step, the layer keeps them as they
    are, like transformers' own, and rounds them once a call wants none.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = Int8KVCache()

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update({**vars(self), "_cache": copy(self._cache)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """As of `GrowingLayer`: `keys` and `values` show what the cache holds, and are shown anew."""
        if self._is_rounded:
            return {**vars(self), "keys": self.keys.dtype, "values": self.values.dtype}
        return {**vars(self), "keys": compact_copy(self.keys), "values": compact_copy(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.keys, torch.dtype):
            self._show(self._cache.keys(), self.keys, self.values)

    @property
    def _is_rounded(self) -> bool:
        return isinstance(self.keys, Int8Tensor)

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for a first update like this one."""
        self._cache.reserve(key_states, value_states, _capacity_for(key_states.shape[2]))

    def reset(self) -> None:
        """Forgets all."""
        super().reset()
        self._cache.reset()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns all, which any reader but us gets written out."""
        if wants_grad(key_states, value_states, self.keys, self.values):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._is_rounded:
            self._cache.reset()
            if _length(self.keys):
                self._cache.append(self.keys, self.values)
        self._show(self._cache.append(key_states, value_states), key_states.dtype, value_states.dtype)
        return self.keys, self.values

    def _show(self, held: Int8Keys, keys_dtype: torch.dtype, values_dtype: torch.dtype) -> None:
        self.keys = Int8Tensor(held.k, held.k_scale, keys_dtype)
        self.values = Int8Tensor(held.v, held.v_scale, values_dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, of a number given as a negative one."""
        if tokens_to_remove > 0 or not self._is_rounded:
            super().crop(tokens_to_remove)
        else:
            self._cache.crop(max(0, self._cache.length + tokens_to_remove))
            self._show(self._cache.keys(), self.keys.dtype, self.values.dtype)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        if self.get_seq_length() > 0:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        if not self._is_rounded:
            super().batch_select_indices(indices)
        else:
            self._cache.select(indices)
            self._show(self._cache.keys(), self.keys.dtype, self.values.dtype)


class QKVCache(DynamicCache):  # type: ignore[misc]
    """transformers' default cache, with layers that append without copying: for ``past_key_values``.

    Args:
        config: of the model. Layers with a window keep that window alone; kinds of layers that hold no keys and values,
            such as those of linear attention, are transformers' own.
        dtype: of the keys and values of layers without a window: that of the model if None, or ``torch.int8``, about
            half the bytes of bf16, for models on ``attn_implementation="qkv"``. (On others, all keys and values would
            be written out at each step.) Where a gradient of keys and values is wanted, as in training, they are kept
            as they are.

    Raises:
        ValueError: for another dtype.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> cache = QKVCache(config)
        >>> tokens = model.generate(torch.ones(1, 5, dtype=torch.int64), past_key_values=cache, max_new_tokens=3)
        >>> cache.get_seq_length()
        7
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config=config)
        growing = _growing_layer(dtype)
        self.layers: list[CacheLayerMixin] = [_replaced(layer, growing) for layer in self.layers]
        self._has_reserved = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)`` to a layer; returns those that its queries may see.

        Before the first, all layers on a CPU get their memory. Had one by one, it would lie among what a prefill
        computes, and leave malloc holes that nothing else fits.
        """
        if not self._has_reserved:
            self._reserve(key_states, value_states)
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return seen

    def _reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        foreseen = key_states.is_cpu and key_states.dim() == value_states.dim() == 4
        if foreseen and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for layer in self.layers:
                if isinstance(layer, GrowingLayer | Int8Layer) and not layer.is_initialized:
                    layer.reserve(key_states, value_states)
            self._has_reserved = True

    def __copy__(self) -> Self:
        """Another whose layers go on independently: ours share memory until one of both is written to."""
        twin = object.__new__(type(self))
        layers = [copy(layer) if isinstance(layer, _Buffered | Int8Layer) else deepcopy(layer) for layer in self.layers]
        twin.__dict__.update({**vars(self), "layers": layers})
        return twin


THEIRS = {
    name: kind for name, kind in DYNAMIC_LAYER_TYPE_MAPPING.items() if kind in (DynamicLayer, DynamicSlidingWindowLayer)
}
"""The layers that ours stand in for, by transformers' name of their kind of attention."""


def use_by_default(dtype: torch.dtype | None = None) -> None:
    """Makes every ``DynamicCache(config=...)`` of transformers, such as that of ``generate``, one of our layers.

    Args:
        dtype: as of `QKVCache`.
    """
    growing = _growing_layer(dtype)
    for name, kind in THEIRS.items():
        DYNAMIC_LAYER_TYPE_MAPPING[name] = growing if kind is DynamicLayer else SlidingLayer


def _growing_layer(dtype: torch.dtype | None) -> type[DynamicLayer]:
    if dtype not in (None, torch.int8):
        raise ValueError(f"QKVCache: dtype must be torch.int8, or None for that of the model; got {dtype!r}.")
    return GrowingLayer if dtype is None else Int8Layer


def _replaced(layer: CacheLayerMixin, growing: type[DynamicLayer]) -> CacheLayerMixin:
    if type(layer) in (DynamicLayer, GrowingLayer, Int8Layer):
        return growing()
    if type(layer) in (DynamicSlidingWindowLayer, SlidingLayer):
        return SlidingLayer(layer.sliding_window)
    return layer


torch.serialization.add_safe_globals([QKVCache, GrowingLayer, SlidingLayer, Int8Layer])
for _kind in (GrowingLayer, SlidingLayer, Int8Layer):
    send_by_value(_kind)


def _length(held: Tensor | None) -> int:
    # A layer begins with nothing, and then with an empty tensor of one dimension.
    return held.shape[2] if held is not None and held.dim() == 4 else 0


def _extend(memory: AppendBuffer, held: Tensor, new: Tensor, capacity: int | None = None) -> Tensor:
    if _length(held):
        memory.adopt(held)
    else:
        memory.crop(0)
    return memory.extend(new, _capacity_for(memory.length + new.shape[2]) if capacity is None else capacity)


def _select(memory: AppendBuffer, held: Tensor, rows: Tensor) -> AppendBuffer:
    memory.adopt(held)
    return memory.select(rows.to(held.device))
