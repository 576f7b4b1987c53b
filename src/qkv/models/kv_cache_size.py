"""What a KV cache weighs: ``length * num_kv_heads * (key width + value width)`` numbers for each layer."""

from typing import Any, NamedTuple

from qkv.models.errors import CommandError


class LayerShape(NamedTuple):
    """The attention of one layer, as far as its cache is concerned."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """Keys that a query sees, its own included; None where it sees all."""

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class CacheSize(NamedTuple):
    """One row of the table."""

    attention: str
    """MHA, GQA or MQA."""
    is_model: bool
    """Whether these are the model's own heads."""
    num_kv_heads: tuple[int, ...]
    """The different numbers among the layers."""
    num_bytes: int
    window_bytes: int
    """With a sliding window in every layer, which keeps the keys in the window alone."""


def layer_shapes(config: Any, cache: Any) -> tuple[LayerShape, ...]:
    """The shapes of a model, from its transformers configuration and a cache that it has filled.

    The cache is what counts: configurations name the same numbers in many ways, and layers differ within a model.

    Raises:
        CommandError: for a model that keeps something else, such as a recurrent state or latent vectors.
    """
    text = config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", None)
    latent = getattr(text, "kv_lora_rank", None) is not None
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    if not layers or latent or not isinstance(num_heads, int):
        raise CommandError(
            f"--model: a model of type {config.model_type!r} keeps no keys and values by heads, so that its "
            "cache cannot be compared with MHA, GQA and MQA. Give one such as SmolLM2, Llama, Mistral, Qwen or Gemma."
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
    """The cache of one sequence of ``length`` tokens with as many KV heads as query heads, as the model has, and one.

    Layers that have a window of their own keep it. ``window`` is what all layers have in the last column.
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
        )
        for attention, chosen in choices.items()
    ]


def cache_bytes(layers: tuple[LayerShape, ...], length: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values of ``length`` tokens, or of a window where a layer has one.

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


def readable_bytes(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves at least one of it.

    Example:
        >>> readable_bytes(640), readable_bytes(188_743_680)
        ('640 B', '180.0 MiB')
    """
    size, units = float(num_bytes), iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
