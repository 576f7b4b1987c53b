"""`QKVCache`: a KV cache for transformers' models that appends in place."""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from typing_extensions import Self

from qkv.cache import Int8KVCache, Keys, SlidingKVCache
from qkv.cache.buffer import AppendBuffer, append_in_place, compact_copy, send_by_value, slots_for, wants_grad
from qkv.cache.handle import Handle, Handled, require_readable
from qkv.integrations.transformers.latent import beside
from qkv.integrations.transformers.lazy_tensor import Int8Tensor


def _capacity_for(tokens: int) -> int:
    """Capacity to allocate for this many tokens: 1/16 more, at least 64, so that copies are rare and little is unused.

    Prompts get spare capacity, too: reallocating all layers in the first step would fragment malloc's memory.
    """
    return tokens + max(tokens // 16, 64)


class _HandledLayer(Handled, DynamicLayer):  # type: ignore[misc]
    """Base of our layers. Compiled programs append to them by operators, which find them by their handles."""

    def require_readable(self) -> None:
        """Ends a compiled graph in which tokens have been appended to the layer."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and self.handle.tensor is not None:
            require_readable(self.handle.tensor)

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        self.require_readable()
        return super().get_seq_length()  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that ``query_length`` new tokens get from `update`, and the position of the first."""
        self.require_readable()
        return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def _check_and_initialize(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raises a ValueError for shapes that do not match the cached tokens; initialises an empty layer."""
        for name, cached, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            if new.dim() != 4:
                raise ValueError(f"QKVCache: {name} must be (B, heads, L, width); got shape {tuple(new.shape)}.")
            if not _length(cached):
                continue
            batch, heads, _, width = cached.shape
            if new.shape != (batch, heads, new.shape[2], width):
                raise ValueError(
                    f"QKVCache: {name} must be ({batch}, {heads}, L, {width}) like the cached ones; got shape "
                    f"{tuple(new.shape)}. Create a new cache for each model and batch."
                )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)


class _BufferedLayer(_HandledLayer):
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
        return _length(self.keys)

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
        if torch.is_grad_enabled() or not _length(self.keys):
            return None
        for memory, cached, shape in ((self._keys, self.keys, k), (self._values, self.values, v)):
            batch, heads, _, width = cached.shape
            if (batch, heads, width) != (shape[0], shape[1], shape[3]):
                return None
            if cached.dtype is not like.dtype or cached.device != like.device:
                return None
            memory.adopt(cached)
        return (
            self._keys.claim(k, like.dtype, like.device, capacity),
            self._values.claim(v, like.dtype, like.device, capacity),
        )


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
                states[:, :, :0].shape, states.dtype, states.device, _capacity_for(states.shape[2])
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
        offset = _length(self.keys)
        claimed = self._claim(k, v, like, _capacity_for(offset + k[2]))
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
                memory.replace(cached if _length(cached) else None)
            del self.keys, self.values
            self._has_views = False
        pairs = ((self._keys, key_states), (self._values, value_states))
        keys, values = [memory.write(new, _capacity_for(memory.length + new.shape[2])) for memory, new in pairs]
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
        self._keys.append_uninitialised(shape, key_states.dtype, key_states.device, _capacity_for(length))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends latents ``(B, 1, L, rank)`` and rotary keys ``(B, 1, L, rope_dim)``; returns all, as views."""
        if torch.compiler.is_compiling():
            return DynamicLayer.update(self, key_states, value_states)  # type: ignore[no-any-return]
        self._check_and_initialize(key_states, value_states)
        cached = beside(self.keys, self.values) if _length(self.keys) else self.keys
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
        offset, capacity = _length(self.keys), 2 * self.sliding_window
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
        length = _length(cached) + new.shape[2]
        if length <= capacity:
            tokens = _append(memory, cached, new, slots_for(length, capacity))
            return tokens, tokens[:, :, max(0, tokens.shape[2] - before) :]
        # Cloned, so that the memory of a prompt of many windows is freed.
        tokens = torch.cat([cached, new] if _length(cached) else [new], dim=2)
        return tokens, tokens[:, :, tokens.shape[2] - before :].clone()


class _RoundedLayer(_HandledLayer):
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
            if _length(self.keys):
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
        return _length(self.keys)

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
        self._cache.reserve(key_states, value_states, _capacity_for(key_states.shape[2]))


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
            x if x is None else x[:, :, first:] for x in (cached.k, cached.v, cached.k_scale, cached.v_scale)
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
            self.cumulative_length = _length(self.keys)


class QKVCache(Handled, DynamicCache):  # type: ignore[misc]
    """transformers' default cache with layers that append in place; pass it as ``past_key_values``, which is
    ``cache`` from transformers 5.24 on.

    Args:
        config: of the model, or the model. Layers with a window cache only the window; those of latent attention keep
            latents and rotary keys in one memory; layers without keys and values, such as linear attention, are
            transformers' own.
        dtype: of keys and values: the model's if None, or ``torch.int8`` or ``"int8"``, about half the size of bf16,
            for models on ``attn_implementation="qkv"``. (Other implementations would dequantise the cache at each
            step.) Keys and values that require grad are not quantised, nor windows while transformers drafts.
        offloading, offload_only_non_sliding: as in ``DynamicCache``.

    Raises:
        TypeError: for anything but a configuration or a model of transformers.
        ValueError: for any other dtype.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> cache = QKVCache(model)
        >>> tokens = model.generate(torch.ones(1, 5, dtype=torch.int64), past_key_values=cache, max_new_tokens=3)
        >>> cache.get_seq_length()
        7
    """

    def __init__(
        self,
        config: PreTrainedConfig | nn.Module,
        dtype: torch.dtype | Literal["int8"] | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        config = _config_of(config)
        append_layer = _append_layer_type(dtype)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._replace_layers(config, append_layer)

    def _replace_layers(self, config: PreTrainedConfig, append_layer: type[DynamicLayer]) -> None:
        """Replaces transformers' layers by ours: ``append_layer``, or `LatentLayer` where the config has latents."""
        config = _decoder_config(config)
        configs = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
        latent = [append_layer is AppendLayer and bool(getattr(each, "kv_lora_rank", None)) for each in configs]
        self.layers: list[CacheLayerMixin] = [
            _replace_layer(layer, LatentLayer if latent[index % len(latent)] else append_layer)
            for index, layer in enumerate(self.layers)
        ]
        self._has_reserved = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(B, Hkv, L, D)`` to a layer; returns those that its queries may see.

        On a CPU, the first update allocates the memory of all layers at once: allocated one by one, between the
        activations of a prefill, it would fragment malloc's memory.
        """
        if not self._has_reserved:
            self._reserve(key_states, value_states)
        tokens: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return tokens

    def _reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the memory of all layers, on a CPU and without gradients."""
        can_reserve = key_states.is_cpu and key_states.dim() == value_states.dim() == 4
        if can_reserve and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for layer in self.layers:
                if isinstance(layer, AppendLayer | Int8Layer) and not layer.is_initialized:
                    layer.reserve(key_states, value_states)
            self._has_reserved = True

    def __copy__(self) -> Self:
        """An independent copy; our layers share memory until either is written to."""
        twin = object.__new__(type(self))
        layers = [copy(layer) if is_ours(layer) else deepcopy(layer) for layer in self.layers]
        twin.__setstate__({**vars(self), "layers": layers})
        return twin


def adopt(cache: DynamicCache, config: PreTrainedConfig, dtype: torch.dtype | Literal["int8"] | None = None) -> None:
    """Makes a new cache of transformers a `QKVCache` in place, unless none of its layers is one that ours replace.

    Args:
        cache: without tokens, made for ``config``.
        config: of the model.
        dtype: as in `QKVCache`.
    """
    append_layer = _append_layer_type(dtype)
    if any(is_replaced(layer) for layer in cache.layers):
        cache.__class__ = QKVCache
        cache._replace_layers(config, append_layer)
        cache.handle = Handle.of(cache)


def is_replaced(layer: CacheLayerMixin) -> bool:
    """Whether a layer of transformers' cache has an equivalent of ours."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def is_ours(layer: object) -> bool:
    """Whether a layer is one of ours."""
    return isinstance(layer, _HandledLayer)


def _config_of(config: PreTrainedConfig | nn.Module) -> PreTrainedConfig:
    """The configuration, of the model if it is a model, or of the only model of transformers within it."""
    if isinstance(config, PreTrainedConfig):
        return config
    if isinstance(config, nn.Module):
        for module in config.modules():
            if isinstance(module, PreTrainedModel):
                return module.config
    given = f"a {type(config).__name__} without one" if isinstance(config, nn.Module) else type(config).__name__
    raise TypeError(f"QKVCache: config must be the configuration of a model of transformers, or a model; got {given}.")


def _decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the layers that cache. ``get_text_config`` copies one without parts, which takes long."""
    return config.get_text_config(decoder=True) if config.sub_configs else config


def asks_for(config: PreTrainedConfig, implementation: str) -> bool:
    """Whether the layers that cache run on this attention implementation."""
    return bool(_decoder_config(config)._attn_implementation == implementation)


def _append_layer_type(dtype: torch.dtype | str | None) -> type[DynamicLayer]:
    """The class of layers without a window for a cache of this dtype."""
    if dtype not in (None, torch.int8, "int8"):
        raise ValueError(f'QKVCache: dtype must be torch.int8 or "int8", or None for that of the model; got {dtype!r}.')
    return AppendLayer if dtype is None else Int8Layer


def _replace_layer(layer: CacheLayerMixin, append_layer: type[DynamicLayer]) -> CacheLayerMixin:
    """Our equivalent of a layer of transformers; other layers are returned unchanged."""
    if type(layer) in (DynamicLayer, AppendLayer, LatentLayer, Int8Layer):
        return append_layer()
    if type(layer) in (DynamicSlidingWindowLayer, SlidingLayer, Int8SlidingLayer):
        kind = Int8SlidingLayer if append_layer is Int8Layer else SlidingLayer
        return kind(layer.sliding_window)
    return layer


torch.serialization.add_safe_globals([QKVCache, AppendLayer, LatentLayer, SlidingLayer, Int8Layer, Int8SlidingLayer])
for _kind in (AppendLayer, LatentLayer, SlidingLayer, Int8Layer, Int8SlidingLayer):
    send_by_value(_kind)


def _lazy(keys: Keys, keys_dtype: torch.dtype, values_dtype: torch.dtype) -> tuple[Int8Tensor, Int8Tensor]:
    """Keys and values in int8 as tensors of these dtypes."""
    assert keys.k_scale is not None
    assert keys.v_scale is not None
    return Int8Tensor(keys.k, keys.k_scale, keys_dtype), Int8Tensor(keys.v, keys.v_scale, values_dtype)


def _length(cached: Tensor | None) -> int:
    """The number of cached tokens. Empty layers have None or an empty tensor of one dimension."""
    return cached.shape[2] if cached is not None and cached.dim() == 4 else 0


def _append(memory: AppendBuffer, cached: Tensor, new: Tensor, capacity: int | None = None) -> Tensor:
    """Appends ``new`` to the cached tokens, in place where these are a view of ``memory``."""
    if _length(cached):
        memory.adopt(cached)
    else:
        memory.crop(0)
    return memory.extend(new, _capacity_for(memory.length + new.shape[2]) if capacity is None else capacity)


def _select(memory: AppendBuffer, cached: Tensor, rows: Tensor) -> AppendBuffer:
    """A buffer with these rows of the batch."""
    memory.adopt(cached)
    return memory.select(rows.to(cached.device))
