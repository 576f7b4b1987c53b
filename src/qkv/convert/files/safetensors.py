"""`read_header` and `lay_out`: the header of a safetensors file, without its weights.

A file is 8 bytes for the length of the header, the header in JSON, and the tensors one after another without gaps.

Source: the format's description and ``SafeTensors::deserialize`` of the safetensors crate, whose checks these are. What
the crate lets pass and is refused here: a key said twice.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import MOST, TENSOR, find_fault
from qkv.convert.files.json_document import MOST_BYTES, parse, paused_collection, show

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of a number, by the format's name of its dtype."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that can be pooled."""

METADATA = "__metadata__"


class TensorSpec(NamedTuple):
    """What a header says of a tensor, its place apart."""

    dtype: str
    """As the format names it."""
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
    """What a safetensors file says of itself."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]
    """In the order of their places."""
    starts: dict[str, int]
    """Where each begins in the file."""


def read_header(path: Path) -> Header:
    """Reads and checks the header.

    Raises:
        CheckpointError: for a file that cannot be read or breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            return parse_header(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def parse_header(file: BinaryIO, path: Path) -> Header:
    """As `read_header`, of a file that is open; ``path`` is for messages."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: it has {size} bytes, and its header should take "
            f"8 and {length}. Fetch it again."
        )
    if length > MOST_BYTES:
        raise CheckpointError(f"{path}: the header has {length} bytes; more than {MOST_BYTES} are not read.")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header must begin with '{{'; it begins with {text[:1]!r}.")
    entries = parse(text, f"the header of {path}")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} must map names to texts; it is {show(metadata)}.")
    with paused_collection():
        return _checked(path, metadata, _places(path, entries), 8 + length, size)


def lay_out(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of these tensors, up to the first of them, and the order in which they follow.

    Wide dtypes come first, so that each tensor begins at a multiple of its width, as the safetensors library does.
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
    """Of a tensor that can be, or else what is wrong with it."""
    if dtype not in BITS:
        return f"must have a dtype that the format knows; it has {show(dtype)}"
    numel = 1
    for size in shape:  # Long products take long, and nobody can print them.
        if (numel := numel * size) >= MOST:
            return f"must have less than 2^63 numbers; its shape is {show(shape)}"
    return TensorSpec(dtype, tuple(shape))


def _place(entry: Any) -> tuple[int, int, TensorSpec] | None:
    """Start, stop and kind of a tensor, counted from the end of the header; None where `_fault` is to say why not.

    A header may have a million entries: each step here is a second.
    """
    if type(entry) is not dict or len(entry) != len(TENSOR):
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or dtype not in BITS or type(shape) is not list or type(offsets) is not list:
        return None
    numel = 1
    for size in shape:
        # True is a 1 to Python. Long products take long.
        if type(size) is not int or size < 0 or (numel := numel * size) >= MOST:
            return None
    if len(offsets) != 2:
        return None
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or start < 0 or numel * BITS[dtype] != (stop - start) * 8:
        return None
    return start, stop, TensorSpec(dtype, tuple(shape))


def _fault(entry: Any) -> str:
    """What is wrong with an entry that has no place."""
    if not isinstance(entry, dict) or entry.keys() != TENSOR.keys():
        return f"must have dtype, shape and data_offsets; its entry is {show(entry)}"
    if (fault := find_fault(entry, TENSOR)) is not None:
        return fault
    if len(offsets := entry["data_offsets"]) != 2:
        return f"must have two data_offsets; it has {show(offsets)}"
    if isinstance(spec := make_spec(entry["dtype"], entry["shape"]), str):
        return spec
    needed = spec.numel * BITS[spec.dtype] / 8
    left = offsets[1] - offsets[0]
    return f"is {spec!s:.200} and must take {needed:.16g} bytes; its data_offsets {offsets} leave {left}"


def _places(path: Path, entries: dict[str, Any]) -> list[tuple[int, int, TensorSpec, str]]:
    """In their order in the file."""
    places = []
    for name, entry in entries.items():
        if (place := _place(entry)) is None:
            raise CheckpointError(f"{path}: tensor {show(name)}: {_fault(entry)}.")
        places.append((*place, name))
    return sorted(places)


def _checked(
    path: Path, metadata: dict[str, str], places: list[tuple[int, int, TensorSpec, str]], data: int, size: int
) -> Header:
    end, before = 0, ""
    tensors, starts = {}, {}
    for start, stop, spec, name in places:
        if start != end:
            fault = "overlaps with" if start < end else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {show(name)} {fault} {show(before) if before else 'the header'}: it begins at {start} "
                f"and should at {end}."
            )
        end, before = stop, name
        tensors[name], starts[name] = spec, data + start
    if data + end != size:
        fault = "truncated" if data + end > size else "followed by what belongs to no tensor"
        raise CheckpointError(
            f"{path} is {fault}: it has {size} bytes, and by its header {show(before) if before else 'the header'} "
            f"ends at {data + end}. Fetch it again."
        )
    return Header(metadata, tensors, starts)
