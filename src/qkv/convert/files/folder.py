"""`Folder`: a checkpoint as transformers saves it, known by its headers."""

from pathlib import Path
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import INDEX as INDEX_FIELDS
from qkv.convert.files.fields import check_fields
from qkv.convert.files.json_document import read_document, refuse_dangling, show
from qkv.convert.files.safetensors import Header, TensorSpec, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Folder(NamedTuple):
    """A folder with ``config.json`` and ``model.safetensors``, or shards of it and their index."""

    path: Path
    config: dict[str, Any]
    files: dict[str, Header]
    """By the name of the file."""
    shards: dict[str, Any] | None
    """The index of the shards, where there are any."""
    states: dict[str, tuple[int, int]]
    """Size and time of change of each file, to tell whether it is still the same."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self.files.values() for name, spec in header.tensors.items()}

    def check_unchanged(self) -> None:
        """Raises where a file is not what it was when its header was read."""
        for name, state in self.states.items():
            if _state(self.path / name) != state:
                raise CheckpointError(f"{self.path / name} was changed by someone else meanwhile; start again.")


def read_folder(path: Path) -> Folder:
    """Reads configuration, index and headers, and no weights.

    ``model.safetensors`` counts where there is both it and an index, as for transformers.

    Raises:
        CheckpointError: for files that are missing, broken or disagree.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} must be a folder as transformers saves it; there is none.")
    config = read_document(path / CONFIG)
    index = None
    if (path / SINGLE).is_file():
        names = [SINGLE]
    elif (path / INDEX).is_file():
        index = read_document(path / INDEX)
        names = sorted(set(_weight_map(path, index).values()))
    else:
        for name in (SINGLE, INDEX):
            refuse_dangling(path / name)
        raise CheckpointError(f"{path} must hold {SINGLE} or {INDEX}, and holds neither. {_pickles(path)}")
    for name in names:
        refuse_dangling(path / name)
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, and {INDEX} says that it holds tensors. Fetch it again.")
    states = {name: _state(path / name) for name in names}
    files = {name: read_header(path / name) for name in names}
    if index is not None:
        _check_index(path, index["weight_map"], files)
    return Folder(path, config, files, index, states)


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    check_fields(str(path / INDEX), {"weight_map": None} | index, INDEX_FIELDS)
    found: dict[str, str] = index["weight_map"]
    for tensor, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise CheckpointError(
                f"{path / INDEX}: tensor {tensor!r} must be in a safetensors file of the same folder; "
                f"it is said to be in {show(file)}."
            )
    return found


def _check_index(path: Path, weight_map: dict[str, str], files: dict[str, Header]) -> None:
    for tensor, file in weight_map.items():
        if tensor not in files[file].tensors:
            raise CheckpointError(f"{path / INDEX} says that tensor {tensor!r} is in {file}, which does not hold it.")
    for file, header in files.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != file:
                place = f"says it is in {weight_map[tensor]}" if tensor in weight_map else "does not name it"
                raise CheckpointError(f"{path / file} holds tensor {tensor!r}, but {INDEX} {place}.")


def _pickles(path: Path) -> str:
    found = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if not found:
        return "Give a folder as transformers' save_pretrained writes it."
    return (
        f"Pickled weights such as {found[0]} can run code and are never loaded; if you trust them, load the model with "
        "transformers and save it with save_pretrained."
    )


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
