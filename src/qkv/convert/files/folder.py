"""`Folder`: configuration, index and headers of a checkpoint in the format of ``save_pretrained``."""

from pathlib import Path
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import INDEX as INDEX_FIELDS
from qkv.convert.files.fields import check_fields
from qkv.convert.files.json_document import check_link, read_document, short_repr
from qkv.convert.files.safetensors import Header, TensorSpec, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Folder(NamedTuple):
    """A folder with ``config.json``, and ``model.safetensors`` or its shards and their index."""

    path: Path
    config: dict[str, Any]
    files: dict[str, Header]
    """Headers by file name."""
    shards: dict[str, Any] | None
    """The index of the shards; None for a single file."""
    states: dict[str, tuple[int, int]]
    """Size and modification time of each file when it was read."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self.files.values() for name, spec in header.tensors.items()}

    def check_unchanged(self) -> None:
        """Raises a CheckpointError if a file has changed since its header was read."""
        for name, state in self.states.items():
            if _state(self.path / name) != state:
                raise CheckpointError(f"{self.path / name} was changed by another process meanwhile; start again.")


def read_folder(path: Path) -> Folder:
    """Reads configuration, index and headers; no weights.

    If there are both ``model.safetensors`` and an index, the index is ignored, as in transformers.

    Raises:
        CheckpointError: for files that are missing, broken or inconsistent.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} must be a folder written by save_pretrained; it does not exist or is not a folder."
        )
    config = read_document(path / CONFIG)
    index = None
    if (path / SINGLE).is_file():
        names = [SINGLE]
    elif (path / INDEX).is_file():
        index = read_document(path / INDEX)
        names = sorted(set(_weight_map(path, index).values()))
    else:
        for name in (SINGLE, INDEX):
            check_link(path / name)
        raise CheckpointError(f"{path} must contain {SINGLE} or {INDEX}; it contains neither. {_pickle_hint(path)}")
    for name in names:
        check_link(path / name)
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, but {INDEX} lists it. Download it again.")
    states = {name: _state(path / name) for name in names}
    files = {name: read_header(path / name) for name in names}
    if index is not None:
        _check_index(path, index["weight_map"], files)
    return Folder(path, config, files, index, states)


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """The ``weight_map`` of an index, after checking its file names."""
    check_fields(str(path / INDEX), {"weight_map": None} | index, INDEX_FIELDS)
    weight_map: dict[str, str] = index["weight_map"]
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise CheckpointError(
                f"{path / INDEX}: tensor {tensor!r} must be in a safetensors file of the same folder; "
                f"got {short_repr(file)}."
            )
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], files: dict[str, Header]) -> None:
    """Raises a CheckpointError unless index and headers list the same tensors in the same files."""
    for tensor, file in weight_map.items():
        if tensor not in files[file].tensors:
            raise CheckpointError(f"{path / INDEX} lists tensor {tensor!r} in {file}, which does not contain it.")
    for file, header in files.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != file:
                listed = f"lists it in {weight_map[tensor]}" if tensor in weight_map else "does not list it"
                raise CheckpointError(f"{path / file} contains tensor {tensor!r}, but {INDEX} {listed}.")


def _pickle_hint(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if not pickles:
        return "Give a folder written by transformers' save_pretrained."
    return (
        f"Pickled weights such as {pickles[0]} can execute code and are never loaded. If you trust them, load the "
        "model with transformers and save it with save_pretrained."
    )


def _state(path: Path) -> tuple[int, int]:
    """Size and modification time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
