"""`ModelSource`: what a user names as a model, and whether it can be one at all."""

import re
from pathlib import Path
from typing import NamedTuple

from qkv.models.errors import CommandError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
ACCEPTED = "Give a folder as transformers saves it, a GGUF file, or the name of a model on the Hugging Face hub."


def expand_home(path: Path) -> Path:
    """The path with its ``~`` written out. That of a user who is not known stays, and is the name of no file."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


class ModelSource(NamedTuple):
    """Where transformers is to load a model from."""

    name: str
    """For people."""
    location: str
    """A folder, or a name on the hub."""
    gguf_file: str | None = None
    """The file's name in the folder."""

    @property
    def path(self) -> str:
        """The folder or file, or the name on the hub."""
        return self.location if self.gguf_file is None else str(Path(self.location, self.gguf_file))

    @property
    def is_remote(self) -> bool:
        return not Path(self.location).is_dir()


def find_model(model: str) -> ModelSource:
    """What ``model`` names: a folder, a GGUF file, or else a model on the hub.

    Raises:
        CommandError: for a folder or file that holds no model, and for what is none of the three.
    """
    path = expand_home(Path(model))
    if path.is_dir():
        return _in_folder(model, path.absolute())
    if path.is_file():
        return gguf_source(path.absolute())
    require_hub_name(model)
    return ModelSource(model, model)


def require_hub_name(model: str) -> None:
    """Raises CommandError unless ``model``, which is neither a file nor a folder, may be on the hub."""
    is_name = HUB_NAME.fullmatch(model) and not model.startswith(".")
    if not is_name or model.endswith((".gguf", ".safetensors")):
        raise CommandError(f"there is no file or folder {model!r}, and it is no name of a hub model. {ACCEPTED}")


def gguf_source(path: Path) -> ModelSource:
    """The model in a GGUF file."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise CommandError(f"{path} is not a GGUF file; it starts with {magic!r} instead of b'GGUF'.")
    return ModelSource(path.stem, str(path.parent), path.name)


def _in_folder(name: str, folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(name, str(folder))
    files = sorted(folder.glob("*.gguf"))
    remedy = f"For the GGUF file in it, give {files[0]}." if files else ACCEPTED
    raise CommandError(f"the folder {folder} must have a config.json to be a model, and has none. {remedy}")
