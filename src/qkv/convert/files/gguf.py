"""`read_gguf`: the header of a GGUF file, without its weights.

The gguf package reads the same, but trusts the counts in a file: a damaged one keeps it busy for ever.

Source: the format's description in ggml (docs/gguf.md), versions 2 and 3, little-endian.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import COUNT, MOST, check_fields
from qkv.convert.files.json_document import MOST_BYTES, show
from qkv.convert.files.safetensors import TensorSpec

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct`, by the number of the type."""
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 8
ALIGNMENT = "general.alignment"


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself."""

    fields: dict[str, Any]
    """Numbers, texts, and arrays of numbers; None stands for an array of texts."""
    tensors: dict[str, TensorSpec]
    """With shapes as torch counts them: rows first."""
    offsets: dict[str, int]
    """Where each begins, counted from the end of the header and what fills it up to the alignment."""
    num_bytes: int
    """Of the header."""


def read_gguf(path: Path) -> GgufHeader:
    """Reads the header.

    Raises:
        CheckpointError: for a file that cannot be read or breaks the format.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def check_places(path: Path, header: GgufHeader) -> None:
    """Holds the places of tensors to the size of the file.

    Raises:
        CheckpointError: for a tensor that lies beyond its end, or has a shape that its dtype cannot have.
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
                f"{path}: tensor {show(name)} must have rows of a multiple of {block} numbers, which {spec.dtype} "
                f"packs together; its shape is {list(spec.shape)}."
            )
        start = data + header.offsets[name]
        stop = start + -(-spec.numel // block) * block_bytes
        if stop > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, and by its header tensor {show(name)}, {spec!s:.200}, lies "
                f"at {start} to {stop}. Fetch it again."
            )


class _Reader:
    """Walks through a header and never past the end of the file, or of what headers have."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._most = self._left = min(os.fstat(file.fileno()).st_size, MOST_BYTES)

    def header(self) -> GgufHeader:
        from gguf import GGMLQuantizationType

        if self._bytes(4) != b"GGUF" or self._number("I") not in (2, 3):
            raise CheckpointError(f"{self._path} must be a GGUF file of version 2 or 3; its first bytes are others.")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        fields, tensors, offsets = {}, {}, {}
        for _ in range(num_fields):
            key = self._text()
            if key in fields:
                raise self._broken(f"the field {show(key)} is there twice")
            value = self._value(self._number("I"))
            fields[key] = value
        for _ in range(num_tensors):
            name, dimensions = self._text(), self._number("I")
            if dimensions > MOST_DIMENSIONS or name in tensors:
                raise self._broken(f"tensor {show(name)} has {dimensions} dimensions, or is there twice")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            if math.prod(shape) >= MOST:
                raise self._broken(f"tensor {show(name)} of shape {list(shape)} has more than 2^63 numbers")
            try:
                dtype = GGMLQuantizationType(self._number("I")).name
            except ValueError as error:
                raise self._broken(f"tensor {show(name)}: {error}") from error
            tensors[name] = TensorSpec(dtype, shape)
            offsets[name] = self._number("Q")
        return GgufHeader(fields, tensors, offsets, self._most - self._left)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
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
            raise self._broken(f"there is no type {kind}")
        return SCALARS[kind]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _number(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self._broken(f"{count} bytes should follow where {self._left} are left")
        self._left -= count
        return self._file.read(count)

    def _broken(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is a broken GGUF file: {fault}. Fetch it again.")
