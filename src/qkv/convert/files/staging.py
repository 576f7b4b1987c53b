"""`staged`: a folder that appears whole or not at all.

It is made in an `OwnFolder` beside its place and renamed at the end. A folder that is to be replaced changes places
with it in one step, or where the system cannot do that, stands aside between two renames; whoever comes after a run
that was killed just then puts it back.

The folder around is opened once. All that follows goes by that descriptor and by the last name of the place alone, so
that nobody can lead a run elsewhere by a link.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qkv.convert.errors import CheckpointError
from qkv.convert.files.folder import CONFIG
from qkv.convert.files.own_folder import (
    CONTENT,
    REPLACED,
    OwnFolder,
    find_mount,
    leftovers,
    mount_of,
    names_in,
    own_folder,
)
from qkv.convert.files.renaming import exchange, move

FOLDER = os.O_RDONLY | os.O_DIRECTORY


@contextmanager
def staged(out: Path, *, overwrite: bool, say: Callable[[str], None]) -> Iterator[OwnFolder]:
    """Yields an empty folder that takes the place of ``out`` when all went well, and is removed otherwise.

    Args:
        out: from `find_place`. Must not exist, unless ``overwrite`` and it is a model or an empty folder.
        overwrite: whether ``out`` may be replaced.
        say: told of what an interrupted run left, and of what could not be removed.

    Raises:
        CheckpointError: where ``out`` must not be replaced or another run is at work on it.
        OSError: where nothing can be written.
    """
    # Links on the way to the folder around are the user's own; none is followed from there on.
    around = os.open(out.parent, FOLDER)
    try:
        for left in leftovers(out.parent, around, out.name):
            if left is None:
                raise CheckpointError(f"another run is writing {out}; wait for it, or give another folder.")
            say(_settle(left, around, out))
        _find_replaceable(out, around, overwrite)
        with own_folder(out.parent, around, out.name) as own:
            try:
                yield own
                own.sync()
                _put_in_place(own, around, out, overwrite)
            except BaseException:
                _say_if(_restore(own, around, out) or own.remove(), say)
                raise
            _say_if(own.remove(and_replaced=True), say)
    finally:
        os.close(around)


def find_place(out: Path | str, source: Path, overwrite: bool) -> Path:
    """The absolute path of ``out``; raises where it must not be written, as far as can be known before."""
    out = Path(out).absolute()
    if out.name in ("", ".."):
        out = Path(os.path.realpath(out))
    if _is_within(out, source) or _is_within(source, out):
        raise CheckpointError(f"{out} and the source {source} must be folders apart, neither in the other.")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: {out.parent} must be a folder, and is none; make it first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{out} cannot be written: you may not make anything in {out.parent}; give another place."
        )
    around = os.open(out.parent, FOLDER)
    try:
        _find_replaceable(out, around, overwrite)
    finally:
        os.close(around)
    return out


def _is_within(inner: Path, outer: Path) -> bool:
    """Whether ``outer`` is ``inner`` or one of the folders around it, by whatever names they are given."""
    try:
        wanted = outer.stat()
    except OSError:
        return False
    real = Path(os.path.realpath(inner))
    return any(os.path.samestat(folder.stat(), wanted) for folder in (real, *real.parents) if folder.exists())


def _find_replaceable(out: Path, around: int, overwrite: bool) -> int | None:
    """The inode of what is at ``out``, if anything; raises where it must stay."""
    try:
        found = os.stat(out.name, dir_fd=around, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise CheckpointError(
            f"{out} is a link to {os.readlink(out.name, dir_fd=around)!r}, and nothing is written through links or in "
            "their place; give the folder itself, or remove the link."
        )
    if not overwrite:
        raise CheckpointError(f"{out} exists; give another folder, or --overwrite to replace it.")
    if not stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{out} is not replaced, since it is no folder; remove it yourself.")
    folder = os.open(out.name, FOLDER | os.O_NOFOLLOW, dir_fd=around)
    try:
        mount = find_mount(folder) if mount_of(folder) == mount_of(around) else Path()
        if mount is not None:
            raise CheckpointError(
                f"{out / mount} is a mount, and cannot be replaced; unmount it, or give another folder."
            )
        if not _is_model(folder) and names_in(folder):
            raise CheckpointError(f"{out} is not replaced, since it is no folder with a {CONFIG}; remove it yourself.")
        return os.fstat(folder).st_ino
    finally:
        os.close(folder)


def _is_model(folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(CONFIG, dir_fd=folder).st_mode)
    except OSError:
        return False


def _put_in_place(own: OwnFolder, around: int, out: Path, overwrite: bool) -> None:
    """What is at ``out`` is looked at again: hours may have passed."""
    if not out.parent.is_dir() or not os.path.samestat(out.parent.stat(), os.fstat(around)):
        raise CheckpointError(f"{out.parent} was moved or replaced by someone else meanwhile. Nothing was kept.")
    replaced = _find_replaceable(out, around, overwrite)
    if replaced is None:
        move(CONTENT, own.descriptor, out.name, around)
    else:
        own.note_replaced(replaced)
        if not exchange(CONTENT, own.descriptor, out.name, around):
            move(out.name, around, REPLACED, own.descriptor)
            move(CONTENT, own.descriptor, out.name, around)
        if own.find_replaced() is None:
            raise CheckpointError(f"{out} was replaced by someone else meanwhile, and left. Nothing was kept.")
    os.fsync(around)


def _restore(own: OwnFolder, around: int, out: Path) -> str | None:
    """Undoes what `_put_in_place` did, however far it came; returns why it could not."""
    taken_in = next((name for name in (REPLACED, CONTENT) if own.inode_of(name) not in (None, own.inode)), None)
    is_there = _inode(out.name, around) == own.inode
    try:
        if is_there and taken_in == CONTENT:
            exchange(CONTENT, own.descriptor, out.name, around)
        else:
            if is_there:
                move(out.name, around, CONTENT, own.descriptor)
            if taken_in is not None:
                move(taken_in, own.descriptor, out.name, around)
    except OSError as error:
        return f"what was at {out} could not be put back, and is in {own.path}: {error.strerror}"
    return None


def _settle(left: OwnFolder, around: int, out: Path) -> str:
    """Puts back or removes what a killed run left; returns what to say of it."""
    replaced = left.find_replaced()
    now = _inode(out.name, around)
    if replaced is not None and now is None:
        move(replaced, left.descriptor, out.name, around)
        said = f"{out} was put back, which an interrupted run was about to replace"
    elif replaced is None or now == left.inode:
        said = f"{left.path.name} was left by an interrupted run; starting over"
    else:
        return f"{left.path / replaced} was at {out} before an interrupted run; it was left, since another is there now"
    return left.remove(and_replaced=now is not None) or said


def _inode(name: str, folder: int) -> int | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def _say_if(fault: str | None, say: Callable[[str], None]) -> None:
    if fault is not None:
        say(fault)
