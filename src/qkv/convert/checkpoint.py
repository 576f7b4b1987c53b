"""`convert_checkpoint`: a folder of safetensors in, another out, a tensor or a layer's attention at a time."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Output
from qkv.convert.files.folder import CONFIG, INDEX, PICKLES, Folder, read_folder
from qkv.convert.files.json_document import paused_collection
from qkv.convert.files.own_folder import OwnFolder
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec, lay_out, parse_header
from qkv.convert.files.staging import find_place, staged
from qkv.convert.heads.pooling import Method
from qkv.convert.plan import Plan, make_plan

CHUNK = 1 << 22
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".index.json")
"""Ends of names of files with weights that are not converted, and would contradict those that are."""


def _ignore(*_: object) -> None:
    pass


class CheckpointPlan(NamedTuple):
    """What `write_checkpoint` is to do."""

    source: Folder
    plan: Plan

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Of the result."""
        return {name: output.spec for name, output in self.plan.outputs.items()}

    @property
    def num_bytes(self) -> int:
        """Of the tensors of the result."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    @property
    def carried(self) -> list[Path]:
        """Files that go along as they are, relative to the folder: everything visible that is no weights."""
        return [file for file in self._others() if not file.name.endswith(WEIGHTS)]

    @property
    def left(self) -> list[Path]:
        """Files with other weights, which stay behind."""
        return [file for file in self._others() if file.name.endswith(WEIGHTS)]

    @property
    def not_followed(self) -> list[Path]:
        """Links to folders or to nothing, which stay behind; a link to a file is as good as the file."""
        return [path for path in self._visible() if not (self.source.path / path).is_file()]

    def _others(self) -> list[Path]:
        written = {CONFIG, INDEX, *self.source.files}
        visible = (path for path in self._visible() if (self.source.path / path).is_file())
        return [path for path in visible if str(path) not in written]

    def _visible(self) -> list[Path]:
        """Files and links, relative to the folder."""
        folder, hidden = self.source.path, re.compile(r"(^|/)\.")
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())
        return sorted(path for path in found if not hidden.search(path.as_posix()))

    def by_file(self) -> dict[str, dict[str, Output]]:
        """The tensors of the result, each in the file where its first source is."""
        places = {name: file for file, header in self.source.files.items() for name in header.tensors}
        files: dict[str, dict[str, Output]] = {file: {} for file in self.source.files}
        for name, output in self.plan.outputs.items():
            files[places[output.sources[0]]][name] = output
        return files


@paused_collection()
def plan_checkpoint(
    source: Path | str, num_kv_heads: int, *, how: Method = "mean", seed: int = 0, window: int | None = None
) -> CheckpointPlan:
    """Reads configuration and headers, no weights, and says what a conversion would do. Arguments as there.

    Raises:
        CheckpointError: as `convert_checkpoint`, as far as it can be known before.
    """
    folder = read_folder(Path(source))
    where = str(folder.path / CONFIG)
    plan = make_plan(where, folder.config, folder.tensors, num_kv_heads, how=how, seed=seed, window=window)
    return CheckpointPlan(folder, plan)


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    num_kv_heads: int,
    *,
    how: Method = "mean",
    seed: int = 0,
    window: int | None = None,
    overwrite: bool = False,
) -> CheckpointPlan:
    """Writes the model in ``source`` to ``out`` with its keys and values pooled to ``num_kv_heads``.

    Each tensor is written as soon as what it is made from is read, in the shard that it is in: one tensor, or if heads
    are aligned, those of its layer's attention. Tensors that do not change are copied byte by byte; with the number of
    heads that the model has, all are. Generation settings, tokenizer and other files go along; pickles and weights in
    other formats do not, and no pickle is ever loaded.

    The source is only read. ``out`` appears whole or not at all: it is written beside, read back and compared, and
    renamed; its ``config.json`` comes last, so that what a killed process leaves is no model.

    Args:
        source: a folder with a ``config.json`` and safetensors, as ``save_pretrained`` writes it.
        out: a folder that does not exist.
        num_kv_heads: a divisor of those that the model has.
        how, seed: as in `convert_state_dict`.
        window: gives each layer a window of so many keys, where the configuration can express it.
        overwrite: replaces ``out`` if it is a model, or empty.

    Returns:
        What was done.

    Raises:
        CheckpointError: for a source that is broken, contradicts itself or is of another family, and where the result
            cannot be written. Nothing is left at ``out`` then.

    Example:
        >>> from qkv.convert import convert_checkpoint
        >>> convert_checkpoint("Llama-2-7b-hf", "Llama-2-7b-gqa", num_kv_heads=8)  # doctest: +SKIP

    Source: Ainslie et al. 2023, section 2.1.
    """
    plan = plan_checkpoint(source, num_kv_heads, how=how, seed=seed, window=window)
    write_checkpoint(plan, out, overwrite=overwrite)
    return plan


def write_checkpoint(
    plan: CheckpointPlan,
    out: Path | str,
    *,
    overwrite: bool = False,
    reach: Callable[[int], None] = _ignore,
    say: Callable[[str], None] = _ignore,
) -> None:
    """Does what is planned.

    Args:
        plan: from `plan_checkpoint`.
        out, overwrite: as in `convert_checkpoint`.
        reach: told how many bytes are done, of twice ``plan.num_bytes``: written, and read back.
        say: told what an interrupted run left.

    Raises:
        CheckpointError: as `convert_checkpoint`.
    """
    out = find_place(out, plan.source.path, overwrite)
    try:
        with staged(out, overwrite=overwrite, say=say) as work:
            _write(plan, work, reach)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror} ({error.filename}). Nothing was kept."
        ) from error


def _write(plan: CheckpointPlan, work: OwnFolder, reach: Callable[[int], None]) -> None:
    free = shutil.disk_usage(work.descriptor).free
    if free < plan.num_bytes:
        raise CheckpointError(
            f"{work.path.parent} must have {plan.num_bytes} bytes free for the result; it has {free}."
        )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        reach(done)

    for carried in plan.carried:
        _copy_file(plan.source.path / carried, work, carried.as_posix())
    for file, outputs in plan.by_file().items():
        digests = _write_shard(plan.source, work, file, outputs, plan.source.files[file].metadata, advance)
        _check_shard(work, file, outputs, digests, advance)
    plan.source.check_unchanged()
    if plan.source.shards is not None:
        weight_map = {name: file for file, outputs in plan.by_file().items() for name in outputs}
        index = plan.source.shards | {"weight_map": weight_map}
        metadata = index.get("metadata")
        index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {
            "total_size": plan.num_bytes,
            "total_parameters": sum(spec.numel for spec in plan.tensors.values()),
        }
        _write_json(work, INDEX, index)
    work.sync()
    _write_json(work, CONFIG, plan.plan.config)


def _write_shard(
    source: Folder,
    work: OwnFolder,
    target: str,
    outputs: dict[str, Output],
    metadata: dict[str, str],
    advance: Callable[[int], None],
) -> dict[str, bytes]:
    """Writes one file and returns the digest of each tensor in it."""
    head, order = lay_out({name: output.spec for name, output in outputs.items()}, metadata)
    digests, name = {}, "the header"
    try:
        with work.create(target) as file:
            _write_all(file, head)
            for name in order:
                digest = hashlib.sha256()
                for piece in _pieces(source, outputs[name]):
                    _write_all(file, piece)
                    digest.update(piece)
                    advance(len(piece))
                digests[name] = digest.digest()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{work.path}, {target}: {name!r} cannot be written: {error.strerror}. Nothing was kept."
        ) from error
    return digests


def _check_shard(
    work: OwnFolder, target: str, outputs: dict[str, Output], digests: dict[str, bytes], advance: Callable[[int], None]
) -> None:
    """Reads a file back."""
    path = work.path / target
    with work.open(target) as file:
        header = parse_header(file, path)
        for name, output in outputs.items():
            digest = hashlib.sha256()
            if header.tensors.get(name) == output.spec:
                for piece in _read(file, path, header.starts[name], output.spec.num_bytes, name):
                    digest.update(piece)
                    advance(len(piece))
            if digest.digest() != digests[name]:
                raise CheckpointError(
                    f"{path}: tensor {name!r} reads back other than it was written; the disk may be failing. "
                    "Nothing was kept."
                )


def _pieces(source: Folder, output: Output) -> Iterator[memoryview | bytes]:
    """The bytes of a tensor of the result."""
    if output.compute is None:
        yield from _read_source(source, output.sources[0])
        return
    value = output.compute(*(_load(source, name) for name in output.sources))
    dtype = TORCH_DTYPES[output.spec.dtype]
    if value.shape != output.spec.shape or value.dtype != dtype:
        raise AssertionError(f"{output.name} is {value.dtype} {tuple(value.shape)}; planned was {output.spec}")
    yield value.contiguous().view(torch.uint8).numpy().data.cast("B")


def _load(source: Folder, name: str) -> Tensor:
    spec = source.tensors[name]
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=dtype)
    held = bytearray(spec.num_bytes)
    filled = 0
    for piece in _read_source(source, name):
        held[filled : filled + len(piece)] = piece
        filled += len(piece)
    return torch.frombuffer(held, dtype=dtype).view(spec.shape)


def _read_source(source: Folder, name: str) -> Iterator[bytes]:
    file, header = next((file, header) for file, header in source.files.items() if name in header.tensors)
    path = source.path / file
    try:
        with path.open("rb", buffering=0) as opened:
            yield from _read(opened, path, header.starts[name], header.tensors[name].num_bytes, name)
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read: {error.strerror}.") from error


def _read(file: BinaryIO, path: Path, start: int, num_bytes: int, name: str) -> Iterator[bytes]:
    file.seek(start)
    while num_bytes:
        piece = file.read(min(CHUNK, num_bytes))
        if not piece:
            raise CheckpointError(f"{path}: tensor {name!r} ends too early; the file was changed meanwhile.")
        num_bytes -= len(piece)
        yield piece


def _write_all(file: BinaryIO, piece: memoryview | bytes) -> None:
    """Writing unbuffered may stop half-way."""
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]


def _copy_file(source: Path, work: OwnFolder, name: str) -> None:
    try:
        with source.open("rb", buffering=0) as opened, work.create(name) as file:
            while piece := opened.read(CHUNK):
                _write_all(file, piece)
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be copied to {work.path}: {error.strerror}. Nothing was kept."
        ) from error


def _write_json(work: OwnFolder, name: str, document: object) -> None:
    with work.create(name) as file:
        _write_all(file, (json.dumps(document, indent=2) + "\n").encode())
        os.fsync(file.fileno())
