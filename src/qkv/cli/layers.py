"""The layers of a model in words, and the bytes of their KV cache: what `qkv inspect` and `qkv convert` print."""

from qkv.cli.printing import counted
from qkv.convert import Inspection
from qkv.convert.inspect.inspection import LayerAttention
from qkv.models.kv_cache_size import LayerShape, cache_bytes


def describe(layer: LayerAttention) -> str:
    """A layer in words: mechanism, heads, widths, window, biases, rotary embedding."""
    width = f"head width {layer.head_dim}"
    if layer.value_dim != layer.head_dim:
        width = f"key width {layer.head_dim}, value width {layer.value_dim}"
    return ", ".join(
        (
            f"{_mechanism(layer)}: {counted(layer.num_heads, 'query head')}",
            _cached(layer),
            width,
            "no window" if layer.window is None else f"a window of {layer.window}",
            "biases" if layer.bias else "no biases",
            f"rotary ({layer.rotary})" if layer.rotary else "not rotary",
            *(["normalised queries and keys"] if layer.qk_norm else []),
        )
    )


def _mechanism(layer: LayerAttention) -> str:
    if layer.latent is not None:
        return "multi-head latent attention"
    kind = {1: "multi-query", layer.num_heads: "multi-head"}.get(layer.num_kv_heads, "grouped-query")
    return f"{kind} {'cross-attention' if layer.cross else 'attention'}"


def _cached(layer: LayerAttention) -> str:
    """What a cache stores of a token."""
    if layer.latent is None:
        return counted(layer.num_kv_heads, "KV head")
    return "latents of {}, rotary keys of {}".format(*layer.latent)


def kv_bytes(found: Inspection, length: int, batch: int, bytes_per_number: int) -> int:
    """Bytes of the KV cache of ``batch`` sequences of ``length`` tokens."""
    shapes = tuple(
        LayerShape(layer.num_heads, layer.num_kv_heads, *layer.cached_widths, layer.window) for layer in found.layers
    )
    return batch * cache_bytes(shapes, length, bytes_per_number)
