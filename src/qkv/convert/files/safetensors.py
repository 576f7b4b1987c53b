"""`read_header` and `make_header`: read and write the header of a safetensors file, without its weights.

A file consists of the header's length (8 bytes), the header in JSON, and the tensors without gaps.

Source: the format's specification, and ``SafeTensors::deserialize`` of the safetensors crate for the checks. Stricter
than the crate: duplicate keys are refused.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import INT64_END, TENSOR, find_fault
from qkv.convert.files.json_document import MAX_BYTES, parse_json, paused_gc, short_repr

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per number, by dtype."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that can be pooled."""

METADATA = "__metadata__"


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: str
    """Name in the safetensors or GGUF format."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Header(NamedTuple):
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]
    """In file order."""
    starts: dict[str, int]
    """Position of each tensor in the file, in bytes."""


def read_header(path: Path) -> Header:
    """Reads and checks the header.

    Raises:
        CheckpointError: for a file that cannot be read or violates the format.
    """
    try:
        with path.open("rb") as file:
            return parse_header(file, path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error


def parse_header(file: BinaryIO, path: Path) -> Header:
    """`read_header` for an open file; ``path`` is for error messages."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: it has {size} bytes, but its header needs 8 + {length}. "
            "Download it again."
        )
    if length > MAX_BYTES:
        raise CheckpointError(f"{path}: the header must have at most {MAX_BYTES} bytes; got {length}.")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header must begin with '{{'; got {text[:1]!r}.")
    entries = parse_json(text, f"the header of {path}")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} must map strings to strings; got {short_repr(metadata)}.")
    with paused_gc():
        return _check_layout(path, metadata, _sorted_entries(path, entries), 8 + length, size)


def make_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header of a file with these tensors, including its length, and the order of the tensors after it.

    As in the safetensors library, wide dtypes come first, so that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: -BITS[tensors[name].dtype])
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    stop = 0
    for name in order:
        start, stop = stop, stop + tensors[name].num_bytes
        entries[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def make_spec(dtype: str, shape: list[int]) -> TensorSpec | str:
    """The spec of a tensor, or an error message for an unknown dtype or too many numbers."""
    if dtype not in BITS:
        return f"dtype must be one of {', '.join(BITS)}; got {short_repr(dtype)}"
    numel = 1
    for size in shape:  # Checked at each step: the product of a long shape would be slow to compute.
        if (numel := numel * size) >= INT64_END:
            return f"must have less than 2^63 numbers; got shape {short_repr(shape)}"
    return TensorSpec(dtype, tuple(shape))


def _parse_entry(entry: Any) -> tuple[int, int, TensorSpec] | None:
    """Start and stop of a tensor, relative to the end of the header, and its spec; None where `_fault` gives an error.

    Performance matters: a header may have a million entries.
    """
    if type(entry) is not dict or len(entry) != len(TENSOR):
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or dtype not in BITS or type(shape) is not list or type(offsets) is not list:
        return None
    numel = 1
    for size in shape:
        # type(), since True is an int. Checked at each step, as in `make_spec`.
        if type(size) is not int or size < 0 or (numel := numel * size) >= INT64_END:
            return None
    if len(offsets) != 2:
        return None
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or start < 0 or numel * BITS[dtype] != (stop - start) * 8:
        return None
    return start, stop, TensorSpec(dtype, tuple(shape))


def _fault(entry: Any) -> str:
    """The error message for an entry that `_parse_entry` refuses."""
    if not isinstance(entry, dict) or entry.keys() != TENSOR.keys():
        return f"must have dtype, shape and data_offsets; got {short_repr(entry)}"
    if (fault := find_fault(entry, TENSOR)) is not None:
        return fault
    if len(offsets := entry["data_offsets"]) != 2:
        return f"must have two data_offsets; got {short_repr(offsets)}"
    if isinstance(spec := make_spec(entry["dtype"], entry["shape"]), str):
        return spec
    needed = spec.numel * BITS[spec.dtype] / 8
    taken = offsets[1] - offsets[0]
    return f"{spec!s:.200} must take {needed:.16g} bytes; its data_offsets {offsets} take {taken}"


def _sorted_entries(path: Path, entries: dict[str, Any]) -> list[tuple[int, int, TensorSpec, str]]:
    """Start, stop, spec and name of each tensor, in file order."""
    tensors = []
    for name, entry in entries.items():
        if (parsed := _parse_entry(entry)) is None:
            raise CheckpointError(f"{path}: tensor {short_repr(name)}: {_fault(entry)}.")
        tensors.append((*parsed, name))
    return sorted(tensors)


def _check_layout(
    path: Path, metadata: dict[str, str], entries: list[tuple[int, int, TensorSpec, str]], data: int, size: int
) -> Header:
    """The header, if its tensors fill the file without gaps or overlaps. ``data``: where the first one starts."""
    end, before = 0, ""
    tensors, starts = {}, {}
    for start, stop, spec, name in entries:
        if start != end:
            fault = "overlaps with" if start < end else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {short_repr(name)} {fault} {short_repr(before) if before else 'the header'}: "
                f"it must begin at {end}; got {start}."
            )
        end, before = stop, name
        tensors[name], starts[name] = spec, data + start
    if data + end != size:
        fault = "is truncated" if data + end > size else "has extra bytes at its end"
        raise CheckpointError(
            f"{path} {fault}: it has {size} bytes, but by its header {short_repr(before) if before else 'the header'} "
            f"ends at {data + end}. Download it again."
        )
    return Header(metadata, tensors, starts)
