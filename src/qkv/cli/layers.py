"""The layers of a model in words, and the bytes of their KV cache: what `qkv inspect` and `qkv convert` print."""

from collections.abc import Sequence

from qkv.cli.printing import counted
from qkv.convert import Inspection
from qkv.convert.families.windows import as_ranges
from qkv.convert.inspect.inspection import LayerAttention
from qkv.models.kv_cache_size import LayerShape, cache_bytes

LENGTH = 4096
"""Tokens for whose KV cache bytes are given by default."""


def by_kind(layers: Sequence[LayerAttention]) -> dict[LayerAttention, list[int]]:
    """The numbers of the layers of each kind. Cross-attention is numbered on its own."""
    numbers: dict[LayerAttention, list[int]] = {}
    for cross in (False, True):
        for number, layer in enumerate(one for one in layers if one.cross is cross):
            numbers.setdefault(layer, []).append(number)
    return numbers


def describe_kinds(layers: Sequence[LayerAttention], where: str = "") -> list[str]:
    """Each kind of layer in words, with their number, and where kinds differ by layer also which they are."""
    kinds = by_kind(layers)
    lines = []
    for layer, numbers in kinds.items():
        alone = sum(other.cross is layer.cross for other in kinds) == 1
        which = "" if alone else f" ({as_ranges(numbers)})"
        lines.append(f"{counted(len(numbers), 'layer')}{which}{where} of {describe(layer)}")
    return lines


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
