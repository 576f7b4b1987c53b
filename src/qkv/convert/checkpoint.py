"""`convert_checkpoint`: converts a folder of safetensors to another one, streaming a tensor or a layer at a time."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Output
from qkv.convert.files.folder import CONFIG, INDEX, PICKLES, Folder, read_folder
from qkv.convert.files.json_document import paused_gc
from qkv.convert.files.own_folder import OwnFolder
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec, make_header, parse_header
from qkv.convert.files.staging import resolve_output, staged
from qkv.convert.heads.pooling import ConversionMethod
from qkv.convert.plan import ConversionPlan, plan_conversion, plan_latent_conversion

CHUNK = 1 << 22
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".index.json")
"""Suffixes of weight files. Those that are not converted are not copied, since they would contradict the result."""


def _ignore(*_: object) -> None:
    pass


class CheckpointPlan(NamedTuple):
    """A checked conversion of a folder, for `write_checkpoint`."""

    source: Folder
    conversion: ConversionPlan

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the result, by name."""
        return {name: output.spec for name, output in self.conversion.outputs.items()}

    @property
    def num_bytes(self) -> int:
        """Size of the result's tensors."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    @property
    def copied(self) -> list[Path]:
        """Files that are copied unchanged, relative to the folder: all except weights and hidden files."""
        return [file for file in self._other_files() if not file.name.endswith(WEIGHTS)]

    @property
    def skipped_weights(self) -> list[Path]:
        """Weight files that are not part of the checkpoint, such as pickles. They are not copied."""
        return [file for file in self._other_files() if file.name.endswith(WEIGHTS)]

    @property
    def skipped_links(self) -> list[Path]:
        """Links to folders and dangling links. They are not copied; links to files are copied as files."""
        return [path for path in self._visible() if not (self.source.path / path).is_file()]

    def _other_files(self) -> list[Path]:
        """Files besides config, index and shards, hidden ones excluded."""
        written = {CONFIG, INDEX, *self.source.files}
        visible = (path for path in self._visible() if (self.source.path / path).is_file())
        return [path for path in visible if str(path) not in written]

    def _visible(self) -> list[Path]:
        """Files and links that are not hidden, relative to the folder."""
        folder, hidden = self.source.path, re.compile(r"(^|/)\.")
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())
        return sorted(path for path in found if not hidden.search(path.as_posix()))

    def by_file(self) -> dict[str, dict[str, Output]]:
        """The result's tensors by file: each goes to the shard that has its first source."""
        shards = {name: file for file, header in self.source.files.items() for name in header.tensors}
        files: dict[str, dict[str, Output]] = {file: {} for file in self.source.files}
        for name, output in self.conversion.outputs.items():
            files[shards[output.sources[0]]][name] = output
        return files


@paused_gc()
def plan_checkpoint(
    source: Path | str,
    num_kv_heads: int | None = None,
    *,
    how: ConversionMethod | None = "mean",
    seed: int = 0,
    window: int | None = None,
    layers: Sequence[int] | None = None,
) -> CheckpointPlan:
    """Plans `convert_checkpoint` from configuration and headers; reads no weights. Same arguments.

    Raises:
        CheckpointError: as `convert_checkpoint`, for everything that can be checked without weights.

    Example:
        >>> from qkv.convert import plan_checkpoint, write_checkpoint
        >>> plan = plan_checkpoint("llama", 2)  # doctest: +SKIP
        >>> write_checkpoint(plan, "llama-gqa")  # doctest: +SKIP
    """
    folder = read_folder(Path(source))
    where = str(folder.path / CONFIG)
    conversion = plan_conversion(
        where, folder.config, folder.tensors, num_kv_heads, how=how, seed=seed, window=window, layers=layers
    )
    return CheckpointPlan(folder, conversion)


@paused_gc()
def plan_latent_checkpoint(source: Path | str, rank: int, *, rope_heads: int | None = None) -> CheckpointPlan:
    """Plans the conversion of a folder to latent attention, for `write_checkpoint`; reads no weights.

    The result has a model type of qkv's own: call ``qkv.integrations.transformers.latent_decoders.register()`` before
    ``AutoModelForCausalLM.from_pretrained``.

    Args:
        source: as in `convert_checkpoint`, of a Llama, Mistral or Qwen2 model.
        rank: width of the latents.
        rope_heads: as in `convert_to_latent`. Errors are weighed by the norm before each layer.

    Raises:
        CheckpointError: as `convert_checkpoint`, and for a rank or rope_heads out of range.

    Example:
        >>> from qkv.convert import plan_latent_checkpoint, write_checkpoint
        >>> write_checkpoint(plan_latent_checkpoint("Llama-2-7b-hf", 512, rope_heads=1), "out")  # doctest: +SKIP
    """
    folder = read_folder(Path(source))
    where = str(folder.path / CONFIG)
    conversion = plan_latent_conversion(where, folder.config, folder.tensors, rank, rope_heads=rope_heads)
    return CheckpointPlan(folder, conversion)


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    num_kv_heads: int | None = None,
    *,
    how: ConversionMethod | None = "mean",
    seed: int = 0,
    window: int | None = None,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
) -> CheckpointPlan:
    """Writes the model in ``source`` to ``out`` with keys and values pooled to ``num_kv_heads``, windows, or both.

    Weights are streamed: memory holds one tensor, or the attention of one layer where heads are aligned. Shards keep
    their names. Unchanged tensors are copied byte for byte, as are generation settings, tokenizer and other files.
    Pickles and weights in other formats are neither copied nor loaded.

    The write is atomic: the result is written beside ``out``, read back, compared and renamed. ``config.json`` is
    written last, so what a killed process leaves does not load as a model. The source is never modified.

    Args:
        source: a folder with a ``config.json`` and safetensors, as ``save_pretrained`` writes it.
        out: a folder that does not exist.
        num_kv_heads, how, seed, window, layers: as in `convert_state_dict`.
        overwrite: replace ``out`` if it is a model or an empty folder.

    Returns:
        the plan that was executed.

    Raises:
        CheckpointError: for a broken, inconsistent or unsupported source, and where the result cannot be written.
            ``out`` is unchanged then.

    Example:
        >>> from qkv.convert import convert_checkpoint
        >>> convert_checkpoint("Llama-2-7b-hf", "Llama-2-7b-gqa", num_kv_heads=8)  # doctest: +SKIP
        >>> convert_checkpoint("SmolLM2-135M", "windowed", window=256, layers=[0, 1, 4])  # doctest: +SKIP

    Source: Ainslie et al. 2023, section 2.1.
    """
    plan = plan_checkpoint(source, num_kv_heads, how=how, seed=seed, window=window, layers=layers)
    write_checkpoint(plan, out, overwrite=overwrite)
    return plan


def write_checkpoint(
    plan: CheckpointPlan,
    out: Path | str,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = _ignore,
    notify: Callable[[str], None] = _ignore,
) -> None:
    """Executes a plan.

    Args:
        plan: from `plan_checkpoint`.
        out, overwrite: as in `convert_checkpoint`.
        on_progress: called with the bytes done, of ``2 * plan.num_bytes`` (written and read back).
        notify: called with messages about leftovers of interrupted runs.

    Raises:
        CheckpointError: as `convert_checkpoint`.

    Example:
        >>> from qkv.convert import plan_checkpoint, write_checkpoint
        >>> write_checkpoint(plan_checkpoint("llama", 2), "llama-gqa", overwrite=True)  # doctest: +SKIP
    """
    out = resolve_output(out, plan.source.path, overwrite)
    try:
        with staged(out, overwrite=overwrite, notify=notify) as work:
            _write_result(plan, work, on_progress)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror} ({error.filename}). Nothing was kept.") from error


def _write_result(plan: CheckpointPlan, work: OwnFolder, on_progress: Callable[[int], None]) -> None:
    """Writes and verifies all files of the result, ``config.json`` last."""
    free = work.folder.free_bytes()
    if free < plan.num_bytes:
        raise CheckpointError(f"{work.path.parent} must have {plan.num_bytes} bytes free for the result; got {free}.")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done)

    for name in plan.copied:
        _copy_file(plan.source.path / name, work, name.as_posix())
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
    _write_json(work, CONFIG, plan.conversion.config)


def _write_shard(
    source: Folder,
    work: OwnFolder,
    target: str,
    outputs: dict[str, Output],
    metadata: dict[str, str],
    advance: Callable[[int], None],
) -> dict[str, bytes]:
    """Writes one shard and returns the SHA-256 of each of its tensors."""
    header, order = make_header({name: output.spec for name, output in outputs.items()}, metadata)
    digests, name = {}, "the header"
    try:
        with work.create(target) as file:
            _write_all(file, header)
            for name in order:
                digest = hashlib.sha256()
                for chunk in _output_chunks(source, outputs[name]):
                    _write_all(file, chunk)
                    digest.update(chunk)
                    advance(len(chunk))
                digests[name] = digest.digest()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {name!r} of {target} in {work.path}: {error.strerror}. Nothing was kept."
        ) from error
    return digests


def _check_shard(
    work: OwnFolder, target: str, outputs: dict[str, Output], digests: dict[str, bytes], advance: Callable[[int], None]
) -> None:
    """Reads a shard back and compares each tensor with its digest."""
    path = work.path / target
    with work.open(target) as file:
        header = parse_header(file, path)
        for name, output in outputs.items():
            digest = hashlib.sha256()
            if header.tensors.get(name) == output.spec:
                for chunk in _read_chunks(file, path, header.starts[name], output.spec.num_bytes, name):
                    digest.update(chunk)
                    advance(len(chunk))
            if digest.digest() != digests[name]:
                raise CheckpointError(
                    f"{path}: read-back mismatch in tensor {name!r}; the disk may be failing. Nothing was kept."
                )


def _output_chunks(source: Folder, output: Output) -> Iterator[memoryview | bytes]:
    """The bytes of a tensor of the result: copied from the source, or computed as a whole."""
    if output.compute is None:
        yield from _read_tensor(source, output.sources[0])
        return
    value = output.compute(*(_load_tensor(source, name) for name in output.sources))
    dtype = TORCH_DTYPES[output.spec.dtype]
    if value.shape != output.spec.shape or value.dtype != dtype:
        raise AssertionError(f"{output.name} is {value.dtype} {tuple(value.shape)}; the plan says {output.spec}")
    yield value.contiguous().view(torch.uint8).numpy().data.cast("B")


def _load_tensor(source: Folder, name: str) -> Tensor:
    """Loads a tensor of the source."""
    spec = source.tensors[name]
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=dtype)
    buffer = bytearray(spec.num_bytes)
    filled = 0
    for chunk in _read_tensor(source, name):
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return torch.frombuffer(buffer, dtype=dtype).view(spec.shape)


def _read_tensor(source: Folder, name: str) -> Iterator[bytes]:
    """The bytes of a tensor of the source, in chunks."""
    file, header = next((file, header) for file, header in source.files.items() if name in header.tensors)
    path = source.path / file
    try:
        with path.open("rb", buffering=0) as opened:
            yield from _read_chunks(opened, path, header.starts[name], header.tensors[name].num_bytes, name)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read tensor {name!r}: {error.strerror}.") from error


def _read_chunks(file: BinaryIO, path: Path, start: int, num_bytes: int, name: str) -> Iterator[bytes]:
    """Yields ``num_bytes`` from ``start`` in chunks; raises a CheckpointError if the file ends earlier."""
    file.seek(start)
    while num_bytes:
        chunk = file.read(min(CHUNK, num_bytes))
        if not chunk:
            raise CheckpointError(f"{path}: tensor {name!r} ends too early; the file was changed meanwhile.")
        num_bytes -= len(chunk)
        yield chunk


def _write_all(file: BinaryIO, chunk: memoryview | bytes) -> None:
    """Writes all of ``chunk``; an unbuffered ``write`` may stop earlier."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _copy_file(source: Path, work: OwnFolder, name: str) -> None:
    try:
        with source.open("rb", buffering=0) as opened, work.create(name) as file:
            while chunk := opened.read(CHUNK):
                _write_all(file, chunk)
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot copy {source} to {work.path}: {error.strerror}. Nothing was kept.") from error


def _write_json(work: OwnFolder, name: str, document: object) -> None:
    with work.create(name) as file:
        _write_all(file, (json.dumps(document, indent=2) + "\n").encode())
        os.fsync(file.fileno())
