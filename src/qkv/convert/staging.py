"""`staged`: a folder that appears whole or not at all.

It is written beside its place, under the same name with `SUFFIX`, and renamed at the end. A folder that is to be
replaced stands aside, as `REPLACED`, between two renames; whoever comes after a run that was killed just then puts it
back.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qkv.convert.errors import CheckpointError
from qkv.convert.folder import CONFIG

SUFFIX = ".qkv-unfinished"
REPLACED = ".qkv-replaced"


@contextmanager
def staged(out: Path, *, overwrite: bool, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``out`` when all went well, and is removed otherwise.

    Args:
        out: must not exist, unless ``overwrite`` and it is a model or an empty folder.
        overwrite: whether ``out`` may be replaced.
        say: told of what an interrupted run left.

    Raises:
        CheckpointError: where ``out`` must not be replaced or another run is at work on it.
        OSError: where nothing can be written.
    """
    work, aside = _beside(out, SUFFIX), _beside(out, REPLACED)
    with _locked(work) as is_new:
        try:
            if not is_new:
                say(f"{work.name} was left by an interrupted run; starting over")
                _empty(work)
            if aside.exists():
                _settle(aside, out, say)
            check_replaceable(out, overwrite)
            yield work
            sync(work)
            if out.exists():
                out.rename(aside)
            work.rename(out)
            sync(out.parent)
        except BaseException:
            _remove(work)
            if aside.exists() and not out.exists():
                aside.rename(out)
            raise
        _remove(aside)


def find_place(out: Path | str, source: Path, overwrite: bool) -> Path:
    """The absolute path of ``out``; raises where it must not be written, as far as can be known before."""
    out, whole = Path(os.path.normpath(Path(out).absolute())), source.resolve()
    if out.resolve() in (whole, *whole.parents) or whole in out.resolve().parents:
        raise CheckpointError(f"{out} and the source {source} must be folders apart, neither in the other.")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: {out.parent} must be a folder, and is none; make it first.")
    check_replaceable(out, overwrite)
    return out


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises where ``out`` exists and must stay."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; give another folder, or --overwrite to replace it.")
    if out.is_symlink() or not out.is_dir() or not ((out / CONFIG).is_file() or not any(out.iterdir())):
        raise CheckpointError(f"{out} is not replaced, since it is no folder with a {CONFIG}; remove it yourself.")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


@contextmanager
def _locked(work: Path) -> Iterator[bool]:
    """Holds the folder, which other runs respect; yields whether it is new."""
    try:
        work.mkdir()
        is_new = True
    except FileExistsError:
        is_new = False
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its owner may have finished and renamed it.
            is_ours = work.stat().st_ino == os.fstat(descriptor).st_ino
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"another run is writing {work}; wait for it, or give another folder.")
        yield is_new
    finally:
        os.close(descriptor)


def _settle(aside: Path, out: Path, say: Callable[[str], None]) -> None:
    """Puts back or removes what a run killed while replacing ``out`` left."""
    if out.exists() or not (aside / CONFIG).exists():
        _remove(aside)
    else:
        aside.rename(out)
        say(f"{out} was put back, which an interrupted run was about to replace")


def _remove(folder: Path) -> None:
    """The configuration goes first, so that what is left of a folder is no model."""
    (folder / CONFIG).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    (folder / CONFIG).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
