"""`inspect_gguf`: describes the attention of the model in a GGUF file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import GGUF, check_fields
from qkv.convert.files.gguf import check_bounds, read_gguf
from qkv.convert.files.json_document import short_repr
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.inspect.inspection import Inspection, LayerAttention

ARCHITECTURE = "general.architecture"
ATTENTION = re.compile(r"blk\.(\d{1,9})\.(attn_(?:q|k|v|qkv|output|q_norm|k_norm)\.(?:weight|bias))")


def inspect_gguf(path: Path) -> Inspection:
    """Describes the attention of a model from the header of a GGUF file; reads no weights.

    Raises:
        CheckpointError: for a broken file, and a header that does not describe the attention completely.
    """
    header = read_gguf(path)
    check_fields(str(path), {ARCHITECTURE: None} | header.fields, GGUF)
    model_type = header.fields[ARCHITECTURE]
    own = {
        key.removeprefix(f"{model_type}."): value
        for key, value in header.fields.items()
        if key.startswith(f"{model_type}.")
    }
    check_fields(str(path), header.fields, {f"{model_type}.{name}": kind for name, kind in GGUF.items()})
    check_bounds(path, header)
    parts: dict[int, dict[str, TensorSpec]] = {}
    for name, spec in header.tensors.items():
        if match := ATTENTION.fullmatch(name):
            parts.setdefault(int(match[1]), {})[match[2]] = spec
    if not parts or sorted(parts) != list(range(len(parts))) or own.get("block_count") != len(parts):
        raise CheckpointError(
            f"{path}: all {own.get('block_count')} layers of a {model_type!r} model must have attention tensors; "
            f"got {len(parts)} that do."
        )
    layers = tuple(_layer(path, own, number, parts[number]) for number in range(len(parts)))
    dtype = next(spec.dtype for name, spec in parts[0].items() if re.match(r"attn_(k|qkv)\.", name))
    return Inspection(model_type, dtype, sum(spec.numel for spec in header.tensors.values()), layers)


def _layer(path: Path, own: Mapping[str, Any], number: int, parts: Mapping[str, TensorSpec]) -> LayerAttention:
    """Describes one layer. ``own``: the header's fields without prefix; ``parts``: the layer's attention tensors.

    Raises:
        CheckpointError: if the tensors have other shapes than the header implies.
    """
    num_heads = _count(path, own, "attention.head_count", number)
    num_kv_heads = _count(path, own, "attention.head_count_kv", number, default=num_heads)
    key_width = _count(path, own, "attention.key_length", number, _count(path, own, "embedding_length", 0) // num_heads)
    value_width = _count(path, own, "attention.value_length", number, key_width)
    if "attn_qkv.weight" in parts:
        rows = {"attn_qkv.weight": num_heads * key_width + num_kv_heads * (key_width + value_width)}
    else:
        rows = {
            "attn_q.weight": num_heads * key_width,
            "attn_k.weight": num_kv_heads * key_width,
            "attn_v.weight": num_kv_heads * value_width,
        }
    for name, number_of_rows in rows.items():
        if name not in parts or parts[name].shape[:-1] != (number_of_rows,):
            raise CheckpointError(
                f"{path}: by the header, tensor 'blk.{number}.{name}' must have {number_of_rows} rows; "
                f"got {parts.get(name, 'none')}."
            )
    bias = any(re.match(r"attn_(q|k|v|qkv)\.bias", name) for name in parts)
    columns = max(parts[name].shape[-1] for name in rows)
    return LayerAttention(
        num_heads,
        num_kv_heads,
        key_width,
        value_width,
        _window(path, own, number),
        bias,
        any("_norm" in name for name in parts),
        _rotary(own, key_width),
        sum(spec.numel for spec in parts.values()),
        num_kv_heads * (key_width + value_width) * (columns + bias),
    )


def _count(path: Path, own: Mapping[str, Any], key: str, layer: int, default: int | None = None) -> int:
    """A number of the header, which may be a list with one value per layer."""
    value = own.get(key, default)
    if isinstance(value, list) and layer < len(value):
        value = value[layer]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {key} must be an integer >= 1 in layer {layer}; got {short_repr(value)}.")
    return value


def _window(path: Path, own: Mapping[str, Any], layer: int) -> int | None:
    """The sliding window of a layer; None without."""
    window, pattern = own.get("attention.sliding_window"), own.get("attention.sliding_window_pattern")
    if not window:
        return None
    if not isinstance(pattern, list) or layer >= len(pattern):
        raise CheckpointError(
            f"{path}: some layers have a window of {window}, but the file does not say which. "
            "Give the folder that it was converted from."
        )
    return _count(path, own, "attention.sliding_window", layer) if pattern[layer] else None


def _rotary(own: Mapping[str, Any], width: int) -> str:
    """The rotary embedding in words; empty without."""
    rotary_dim = own.get("rope.dimension_count")
    if rotary_dim is None:
        return ""
    partial = f", {rotary_dim / width:g} of the width" if rotary_dim != width else ""
    return f"theta {own.get('rope.freq_base', 10000.0):g}{partial}"
