"""`model_folder`: the folder of safetensors that a user's MODEL is, is unpacked to, or is downloaded to."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qkv.convert.files.folder import CONFIG, PICKLES
from qkv.convert.files.gguf import check_bounds, read_gguf
from qkv.models.errors import CommandError
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import expand_home, gguf_source, require_hub_name

OTHER_WEIGHTS = tuple(
    f"*{suffix}" for suffix in (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite")
)
"""Files of a model on the Hub that are not downloaded: its weights in formats that are never read."""


@contextmanager
def model_folder(model: str, progress: Progress) -> Iterator[Path]:
    """The folder of a model, while it is needed: a folder as it is; a GGUF file dequantised to float32 in a temporary
    one; what the Hub has under a name in the cache of downloads.

    Raises:
        CommandError: for what is none of these, and a model that cannot be downloaded or unpacked.
        CheckpointError: for a broken GGUF file.
    """
    path = expand_home(Path(model))
    if path.is_file():
        with tempfile.TemporaryDirectory(prefix="qkv-unpacked-") as temporary:
            yield unpack_gguf(path, Path(temporary), progress)
    elif os.path.lexists(path):
        yield path
    else:
        require_hub_name(model)
        yield _download(model, progress)


def unpack_gguf(file: Path, folder: Path, progress: Progress) -> Path:
    """Dequantises a GGUF file to float32, saves the model in ``folder`` and returns that."""
    source = gguf_source(file.absolute())
    with progress.step("reading the header"):
        check_bounds(file, read_gguf(file))  # transformers takes minutes to notice a truncated file
    loaded = load(source, torch.float32, progress)
    with progress.step("unpacking"), quiet():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return folder


def file_states(model: str, folder: Path) -> list[list[object]]:
    """What tells whether a model was changed meanwhile: name, size and time of its files."""
    path = expand_home(Path(model))
    files = [path] if path.is_file() else sorted([*folder.glob("*.safetensors"), folder / CONFIG])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _download(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    with progress.step("downloading the model"), quiet():
        try:
            return Path(snapshot_download(name, ignore_patterns=list(OTHER_WEIGHTS)))
        except Exception as error:
            raise CommandError(
                f"could not download {name!r} from the Hub. {type(error).__name__}: {error!s:.400}\n"
                "Check the name and the network, or give a local folder or file."
            ) from error
