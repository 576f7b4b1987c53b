"""`QKVCache`: a KV cache for transformers' models that appends in place."""

from copy import copy, deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import Self

from qkv.cache.handle import Handle, Handled
from qkv.integrations.transformers.cache.append_layers import AppendLayer, LatentLayer, SlidingLayer
from qkv.integrations.transformers.cache.base_layer import HandledLayer
from qkv.integrations.transformers.cache.int8_layers import Int8Layer, Int8SlidingLayer


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
    return isinstance(layer, HandledLayer)


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
