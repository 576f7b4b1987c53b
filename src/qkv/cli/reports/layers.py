"""The layers of a model in words, and the bytes of their KV cache: what `qkv inspect` and `qkv convert` print."""

from collections.abc import Sequence
from typing import Any

from qkv.cli.printing import counted
from qkv.convert import Inspection
from qkv.convert.families.windows import as_ranges
from qkv.convert.inspect.inspection import LayerAttention
from qkv.models.kv_cache_size import LayerShape, cache_bytes, int8_bytes

LENGTH = 4096
"""Tokens for whose KV cache bytes are given by default."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes in which a cache is as the model's keys and values are stored, as torch names them."""


def by_kind(layers: Sequence[LayerAttention]) -> dict[LayerAttention, list[int]]:
    """The numbers of the layers of each kind. Those of each place, and cross-attention, are numbered on their own."""
    numbers: dict[LayerAttention, list[int]] = {}
    for key in dict.fromkeys(map(_numbered, layers)):
        for number, layer in enumerate(one for one in layers if _numbered(one) == key):
            numbers.setdefault(layer, []).append(number)
    return numbers


def _numbered(layer: LayerAttention) -> tuple[bool, str]:
    """What the layers have in common that are numbered together."""
    return layer.cross, layer.place


def describe_kinds(layers: Sequence[LayerAttention], where: str = "") -> list[str]:
    """Each kind of layer in words, with their number, and where kinds differ by layer also which they are."""
    kinds = by_kind(layers)
    lines = []
    for layer, numbers in kinds.items():
        alone = sum(_numbered(other) == _numbered(layer) for other in kinds) == 1
        which = "" if alone else f" ({as_ranges(numbers)})"
        place = f" in {layer.place}" if layer.place else where
        lines.append(f"{counted(len(numbers), 'layer')}{which}{place} of {describe(layer)}")
    return lines


def describe(layer: LayerAttention) -> str:
    """A layer in words: mechanism, heads, widths, window, biases, rotary embedding; where that is known."""
    width = f"head width {layer.head_dim}"
    if layer.value_dim != layer.head_dim:
        width = f"key width {layer.head_dim}, value width {layer.value_dim}"
    return ", ".join(
        (
            f"{_mechanism(layer)}: {counted(layer.num_heads, 'query head')}",
            _cached(layer),
            width,
            *_stated(f"a window of {layer.window}" if layer.window else "", "no window", layer),
            "biases" if layer.bias else "no biases",
            *_stated(f"rotary ({layer.rotary})" if layer.rotary else "", "not rotary", layer),
            *(["normalised queries and keys"] if layer.qk_norm else []),
        )
    )


def _stated(found: str, none: str, layer: LayerAttention) -> list[str]:
    """What was found, or that there is none, if that is known."""
    return [found] if found else [none] if layer.is_complete else []


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


def layers_as_json(layers: Sequence[LayerAttention]) -> list[dict[str, Any]]:
    """Each kind of layer, with the numbers of its layers."""
    return [
        {"num_layers": len(numbers), "numbers": numbers, **layer._asdict()}
        for layer, numbers in by_kind(layers).items()
    ]


def kv_bytes(found: Inspection, length: int, batch: int, bytes_per_number: int) -> int:
    """Bytes of the KV cache of ``batch`` sequences of ``length`` tokens."""
    return batch * cache_bytes(_shapes(found.layers), length, bytes_per_number)


def kv_bytes_in_int8(found: Inspection, length: int, batch: int, bytes_per_number: int) -> int | None:
    """As `kv_bytes`, of a cache in int8; None for latents, which are not cached in it.

    What a decoder reads of an encoder stays as it is, with ``bytes_per_number``.
    """
    if any(layer.latent is not None for layer in found.layers):
        return None
    own = _shapes([layer for layer in found.layers if not layer.cross])
    cross = _shapes([layer for layer in found.layers if layer.cross])
    return batch * (int8_bytes(own, length) + cache_bytes(cross, length, bytes_per_number))


def _shapes(layers: Sequence[LayerAttention]) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(layer.num_heads, layer.num_kv_heads, *layer.cached_widths, layer.window) for layer in layers
    )
