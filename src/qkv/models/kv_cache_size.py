"""Sizes of KV caches: ``length * num_kv_heads * (key width + value width)`` numbers per layer."""

from typing import Any, NamedTuple

from qkv.byte_sizes import readable_bytes as readable_bytes
from qkv.models.errors import CommandError

SCALES = 2 * 4
"""Bytes of the scales of a key and a value in int8, one in fp32 for each."""


class LayerShape(NamedTuple):
    """Head counts, widths and window of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """Sliding window, the query's own key included; None without."""

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class CacheSize(NamedTuple):
    """The KV cache of a model with some number of KV heads."""

    attention: str
    """MHA, GQA or MQA."""
    is_model: bool
    """Whether these are the model's own KV heads."""
    num_kv_heads: tuple[int, ...]
    """The distinct numbers over all layers."""
    num_bytes: int
    window_bytes: int
    """With a sliding window in every layer, so that the cache keeps only the window."""
    int8_bytes: int
    """In int8, as in ``QKVCache(model, dtype="int8")``."""


def layer_shapes(config: Any, cache: Any) -> tuple[LayerShape, ...]:
    """The attention layers of a model, from its transformers configuration and a filled cache.

    Shapes are read from the cache, since configurations name them in many ways and layers may differ.

    Raises:
        CommandError: for models without keys and values by head, such as recurrent or latent-attention models.
    """
    text = config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", None)
    latent = getattr(text, "kv_lora_rank", None) is not None
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    if not layers or latent or not isinstance(num_heads, int):
        raise CommandError(
            f"--model: the cache of a {config.model_type!r} model has no keys and values by head, so it cannot be "
            "compared with MHA, GQA and MQA. Give a model such as SmolLM2, Llama, Mistral, Qwen or Gemma."
        )
    return tuple(
        LayerShape(
            num_heads,
            num_kv_heads=layer.keys.shape[1],
            head_dim=layer.keys.shape[3],
            value_dim=layer.values.shape[3],
            window=getattr(layer, "sliding_window", None),
        )
        for layer in layers
    )


def cache_sizes(layers: tuple[LayerShape, ...], length: int, window: int, bytes_per_number: int) -> list[CacheSize]:
    """Cache sizes of one sequence of ``length`` tokens as MHA, as the model is, and as MQA.

    ``num_bytes`` is with the layers' own windows, ``window_bytes`` with ``window`` in all layers.
    """
    choices = {
        "MHA": tuple(layer._replace(num_kv_heads=layer.num_heads) for layer in layers),
        "GQA": layers,
        "MQA": tuple(layer._replace(num_kv_heads=1) for layer in layers),
    }
    if layers in (choices["MHA"], choices["MQA"]):
        del choices["GQA"]
    return [
        CacheSize(
            attention,
            is_model=chosen == layers,
            num_kv_heads=tuple(sorted({layer.num_kv_heads for layer in chosen}, reverse=True)),
            num_bytes=cache_bytes(chosen, length, bytes_per_number),
            window_bytes=cache_bytes(chosen, min(length, window), bytes_per_number),
            int8_bytes=int8_bytes(chosen, length),
        )
        for attention, chosen in choices.items()
    ]


def cache_bytes(layers: tuple[LayerShape, ...], length: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values of ``length`` tokens, or of the window in layers that have one.

    Example:
        >>> smollm2 = 30 * (LayerShape(9, 3, 64, 64, None),)
        >>> cache_bytes(smollm2, length=4096, bytes_per_number=4) / 2**20
        180.0
    """
    return sum(
        (length if layer.window is None else min(length, layer.window))
        * layer.num_kv_heads
        * (layer.head_dim + layer.value_dim)
        * bytes_per_number
        for layer in layers
    )


def int8_bytes(layers: tuple[LayerShape, ...], length: int) -> int:
    """Bytes of a cache in int8, with a scale for each key and each value."""
    return cache_bytes(tuple(layer._replace(head_dim=layer.head_dim + SCALES) for layer in layers), length, 1)
