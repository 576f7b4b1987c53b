"""`read_gguf`: reads the header of a GGUF file, without its weights.

The gguf package trusts the counts in a file, so it hangs on a corrupt one.

Source: the format's specification in ggml (docs/gguf.md), versions 2 and 3, little-endian.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import COUNT, INT64_END, check_fields
from qkv.convert.files.json_document import MAX_BYTES, short_repr
from qkv.convert.files.safetensors import TensorSpec

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` formats by GGUF type number."""
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 8
ALIGNMENT = "general.alignment"


class GgufHeader(NamedTuple):
    """The header of a GGUF file."""

    fields: dict[str, Any]
    """Numbers, strings and arrays of numbers; arrays of strings are read as None."""
    tensors: dict[str, TensorSpec]
    """Shapes are in torch's order: rows first."""
    offsets: dict[str, int]
    """Start of each tensor, relative to the aligned end of the header."""
    num_bytes: int
    """Size of the header."""


def read_gguf(path: Path) -> GgufHeader:
    """Reads the header.

    Raises:
        CheckpointError: for a file that cannot be read or violates the format.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error


def check_bounds(path: Path, header: GgufHeader) -> None:
    """Checks that all tensors lie within the file.

    Raises:
        CheckpointError: for a tensor beyond the end of the file, or with a shape that its dtype does not allow.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    check_fields(str(path), header.fields, {ALIGNMENT: COUNT})
    alignment = header.fields.get(ALIGNMENT, 32)
    data = -(-header.num_bytes // alignment) * alignment
    size = path.stat().st_size
    for name, spec in header.tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[spec.dtype]]
        if spec.shape and spec.shape[-1] % block:
            raise CheckpointError(
                f"{path}: rows of tensor {short_repr(name)} must be multiples of {block}, the block size of "
                f"{spec.dtype}; got shape {list(spec.shape)}."
            )
        start = data + header.offsets[name]
        stop = start + -(-spec.numel // block) * block_bytes
        if stop > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, but by its header tensor {short_repr(name)}, "
                f"{spec!s:.200}, takes bytes {start} to {stop}. Download it again."
            )


class _Reader:
    """Parses a header, without reading past the end of the file or `MAX_BYTES`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._limit = self._remaining = min(os.fstat(file.fileno()).st_size, MAX_BYTES)

    def header(self) -> GgufHeader:
        from gguf import GGMLQuantizationType

        if self._bytes(4) != b"GGUF" or self._number("I") not in (2, 3):
            raise CheckpointError(f"{self._path} is not a GGUF file of version 2 or 3: its first bytes differ.")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        fields, tensors, offsets = {}, {}, {}
        for _ in range(num_fields):
            key = self._string()
            if key in fields:
                raise self._corrupt(f"duplicate field {short_repr(key)}")
            value = self._value(self._number("I"))
            fields[key] = value
        for _ in range(num_tensors):
            name, dimensions = self._string(), self._number("I")
            if dimensions > MAX_DIMENSIONS or name in tensors:
                raise self._corrupt(
                    f"tensor {short_repr(name)} is a duplicate, or has too many dimensions ({dimensions})"
                )
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            if math.prod(shape) >= INT64_END:
                raise self._corrupt(f"tensor {short_repr(name)} of shape {list(shape)} has 2^63 numbers or more")
            try:
                dtype = GGMLQuantizationType(self._number("I")).name
            except ValueError as error:
                raise self._corrupt(f"tensor {short_repr(name)}: {error}") from error
            tensors[name] = TensorSpec(dtype, shape)
            offsets[name] = self._number("Q")
        return GgufHeader(fields, tensors, offsets, self._limit - self._remaining)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(self._format(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            for _ in range(count):
                self._bytes(self._number("Q"))
            return None
        layout = self._format(kind)
        return list(struct.unpack(f"<{count}{layout}", self._bytes(count * struct.calcsize(layout))))

    def _format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._corrupt(f"unknown type {kind}")
        return SCALARS[kind]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _number(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._remaining:
            raise self._corrupt(f"the header needs {count} more bytes; {self._remaining} remain")
        self._remaining -= count
        return self._file.read(count)

    def _corrupt(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is a corrupt GGUF file: {fault}. Download it again.")
