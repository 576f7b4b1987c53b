"""`find_model`: resolves a user's ``--model`` to a folder, a GGUF file or a Hub name."""

import re
from pathlib import Path
from typing import NamedTuple

from qkv.models.errors import CommandError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
ACCEPTED = "Give a folder written by save_pretrained, a GGUF file, or the name of a model on the Hugging Face Hub."


def expand_home(path: Path) -> Path:
    """Expands a leading ``~``. An unknown ``~user`` is returned unchanged."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


class ModelSource(NamedTuple):
    """Where transformers loads a model from."""

    name: str
    """For display."""
    location: str
    """A folder or a Hub name."""
    gguf_file: str | None = None
    """Name of the GGUF file in the folder."""

    @property
    def path(self) -> str:
        """The folder, the GGUF file or the Hub name."""
        return self.location if self.gguf_file is None else str(Path(self.location, self.gguf_file))

    @property
    def is_remote(self) -> bool:
        return not Path(self.location).is_dir()


def find_model(model: str) -> ModelSource:
    """The source for ``model``: an existing folder or GGUF file, else a Hub name.

    Raises:
        CommandError: for folders and files without a model, and invalid Hub names.
    """
    path = expand_home(Path(model))
    if path.is_dir():
        return _folder_source(model, path.absolute())
    if path.is_file():
        return gguf_source(path.absolute())
    require_hub_name(model)
    return ModelSource(model, model)


def require_hub_name(model: str) -> None:
    """Raises a CommandError unless ``model``, which is not an existing path, is a valid Hub name."""
    is_name = HUB_NAME.fullmatch(model) and not model.startswith(".")
    if not is_name or model.endswith((".gguf", ".safetensors")):
        raise CommandError(f"{model!r} is not an existing file or folder, and not a valid Hub model name. {ACCEPTED}")


def gguf_source(path: Path) -> ModelSource:
    """The source for a GGUF file; raises a CommandError if it is not one."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}.") from error
    if magic != b"GGUF":
        raise CommandError(f"{path} is not a GGUF file: it must start with b'GGUF'; got {magic!r}.")
    return ModelSource(path.stem, str(path.parent), path.name)


def _folder_source(name: str, folder: Path) -> ModelSource:
    """The source for a folder; raises a CommandError if it contains no configuration."""
    if (folder / "config.json").is_file():
        return ModelSource(name, str(folder))
    files = sorted(folder.glob("*.gguf"))
    remedy = f"For the GGUF file in it, give {files[0]}." if files else ACCEPTED
    raise CommandError(f"the folder {folder} is not a model: it contains no config.json. {remedy}")
