"""Caches for transformers' models that append without copying what they hold."""

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

from qkv.cache import Int8Keys, Int8KVCache
from qkv.growing import Growing, append_in_place
from qkv.integrations.lazy_tensor import Int8Tensor


def _room(tokens: int) -> int:
    """Tokens of new memory for so many. Little waits to be filled; all are moved once in 64 steps or more.

    A prompt gets room as well: moved at the first step, its layers would leave holes that the next ones do not fit.
    """
    return tokens + max(tokens // 16, 64)


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """What our layers share that keep tensors as they are: memory for each."""

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys, self._values = Growing(), Growing()

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


class GrowingLayer(_Roomy):
    """All keys and values of one layer, in memory with room behind them.

    Takes transformers' own operations (reordering for beams, cropping, repeating, selecting) as they are: what is left
    in place grows in place, what was made anew is copied once.
    """

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for a first update like this one."""
        for memory, states in ((self._keys, key_states), (self._values, value_states)):
            memory.open(states[:, :, :0].shape, states.dtype, states.device, _room(states.shape[2]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns all, as views that the next update may move."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        held = self._keys.shows(self.keys) and self._values.shows(self.values)
        grown = append_in_place((self._keys, self._values), key_states, value_states) if held else None
        if grown is None:
            self._admit(key_states, value_states)
            grown = [_extend(self._keys, self.keys, key_states), _extend(self._values, self.values, value_states)]
        self.keys, self.values = grown
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search, with one copy."""
        if self.get_seq_length() > 0:
            self.keys = _select(self._keys, self.keys, beam_idx)
            self.values = _select(self._values, self.values, beam_idx)


class SlidingLayer(_Roomy, DynamicSlidingWindowLayer):  # type: ignore[misc]
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

    def _roll(self, memory: Growing, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """What was held and ``new`` behind it, and what of both the next query may see."""
        room, before = 2 * self.sliding_window, self.sliding_window - 1
        if _length(held) + new.shape[2] <= room:
            seen = _extend(memory, held, new, room)
            return seen, seen[:, :, max(0, seen.shape[2] - before) :]
        # A prompt of many windows is not kept.
        seen = torch.cat([held, new], dim=2) if _length(held) else new
        return seen, seen[:, :, seen.shape[2] - before :].clone()


class Int8Layer(DynamicLayer):  # type: ignore[misc]
    """All keys and values of one layer in int8, which ``attn_implementation="qkv"`` reads as they are."""

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = Int8KVCache()

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for a first update like this one."""
        self._cache.reserve(key_states, value_states, _room(key_states.shape[2]))

    def reset(self) -> None:
        """Forgets all."""
        super().reset()
        self._cache = Int8KVCache()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)``; returns all, which any reader but us gets written out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._show(self._cache.append(key_states, value_states))
        return self.keys, self.values

    def _show(self, held: Int8Keys) -> None:
        self.keys = Int8Tensor(held.k, held.k_scale, self.dtype)
        self.values = Int8Tensor(held.v, held.v_scale, self.dtype)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._cache.length if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, of a number given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: give the number of tokens to remove as a negative one; got {tokens_to_remove}.")
        if self.is_initialized:
            self._cache.crop(max(0, self._cache.length + tokens_to_remove))
            self._show(self._cache.keys())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        if self.get_seq_length() > 0:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        if self.get_seq_length() > 0:
            self._cache.select(indices.to(self.device))
            self._show(self._cache.keys())


class QKVCache(DynamicCache):  # type: ignore[misc]
    """transformers' default cache, with layers that append without copying: for ``past_key_values``.

    Args:
        config: of the model. Layers with a window keep that window alone; kinds of layers that hold no keys and values,
            such as those of linear attention, are transformers' own.
        dtype: of the keys and values of layers without a window: that of the model if None, or ``torch.int8``, about
            half the bytes of bf16, for models on ``attn_implementation="qkv"``. (On others, all keys and values would
            be written out at each step.)

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
        foreseen = key_states.is_cpu and key_states.dim() == value_states.dim() == 4 and not key_states.requires_grad
        if foreseen and not torch.compiler.is_compiling():
            for layer in self.layers:
                if isinstance(layer, GrowingLayer | Int8Layer):
                    layer.reserve(key_states, value_states)
            self._has_reserved = True


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


def _length(held: Tensor | None) -> int:
    # A layer begins with nothing, and then with an empty tensor of one dimension.
    return held.shape[2] if held is not None and held.dim() == 4 else 0


def _extend(memory: Growing, held: Tensor, new: Tensor, room: int | None = None) -> Tensor:
    if _length(held):
        memory.hold(held)
    else:
        memory.crop(0)
    return memory.extend(new, _room(memory.length + new.shape[2]) if room is None else room)


def _select(memory: Growing, held: Tensor, rows: Tensor) -> Tensor:
    memory.hold(held)
    memory.select(rows.to(held.device))
    selected = memory.tensor
    assert selected is not None
    return selected
