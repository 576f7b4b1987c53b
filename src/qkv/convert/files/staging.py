"""`staged`: writes a folder atomically.

The folder is written in an `OwnFolder` beside its destination and renamed at the end. An existing folder is exchanged
with it in one step, or, where the system does not support that, in two renames; if a run is killed between the two, the
next one restores the old folder.

The parent folder is opened once. Everything else is relative to that `OpenFolder`, so a link that changes meanwhile
cannot redirect the run.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qkv.convert.errors import CheckpointError
from qkv.convert.files.folder import CONFIG
from qkv.convert.files.open_folder import OpenFolder, open_folder
from qkv.convert.files.own_folder import CONTENT, REPLACED, OwnFolder, find_leftovers, make_own_folder
from qkv.convert.files.renaming import exchange, move


@contextmanager
def staged(out: Path, *, overwrite: bool, notify: Callable[[str], None]) -> Iterator[OwnFolder]:
    """Yields an empty folder that becomes ``out`` on success and is removed otherwise.

    Args:
        out: from `resolve_output`. Must not exist, unless ``overwrite`` and it is a model or an empty folder.
        overwrite: whether ``out`` may be replaced.
        notify: called with messages about leftovers of interrupted runs and what could not be removed.

    Raises:
        CheckpointError: where ``out`` must not be replaced, or another run is writing it.
        OSError: where nothing can be written.
    """
    # Links in the path of the parent are followed; below it, none is.
    with open_folder(out.parent) as parent:
        for leftover in find_leftovers(parent, out.name):
            if leftover is None:
                raise CheckpointError(f"another run is writing {out}; wait for it, or give another folder.")
            notify(_recover(leftover, parent, out))
        _find_replaceable(out, parent, overwrite)
        with make_own_folder(parent, out.name) as own:
            try:
                yield own
                own.sync()
                _install(own, parent, out, overwrite)
            except BaseException:
                _notify_if(_roll_back(own, parent, out) or own.remove(), notify)
                raise
            _notify_if(own.remove(with_replaced=True), notify)


def resolve_output(out: Path | str, source: Path, overwrite: bool) -> Path:
    """The absolute path of ``out``; raises a CheckpointError where it cannot or must not be written."""
    out = Path(out).absolute()
    if out.name in ("", ".."):
        out = Path(os.path.realpath(out))
    if _is_within(out, source) or _is_within(source, out):
        raise CheckpointError(f"{out} must not contain the source {source} or lie in it; give another folder.")
    if not out.parent.is_dir():
        raise CheckpointError(f"cannot write {out}: the parent folder {out.parent} does not exist; create it first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"cannot write {out}: the parent folder {out.parent} is not writable; give another folder."
        )
    with open_folder(out.parent) as parent:
        _find_replaceable(out, parent, overwrite)
    return out


def _is_within(inner: Path, outer: Path) -> bool:
    """Whether ``outer`` is ``inner`` or one of its parents, compared by inode."""
    try:
        wanted = outer.stat()
    except OSError:
        return False
    real = Path(os.path.realpath(inner))
    return any(os.path.samestat(folder.stat(), wanted) for folder in (real, *real.parents) if folder.exists())


def _find_replaceable(out: Path, parent: OpenFolder, overwrite: bool) -> int | None:
    """The inode of ``out``, None where it does not exist; raises where it must not be replaced."""
    try:
        found = parent.status_of(out.name)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise CheckpointError(
            f"{out} is a link to {parent.target_of(out.name)!r}; links are not followed or replaced. "
            "Give the folder itself, or remove the link."
        )
    if not overwrite:
        raise CheckpointError(f"{out} exists; give another folder, or --overwrite to replace it.")
    if not stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"refusing to replace {out}: it is not a folder. Remove it first.")
    with parent.open(out.name) as folder:
        mount = folder.find_mount() if folder.mount() == parent.mount() else Path()
        if mount is not None:
            raise CheckpointError(
                f"refusing to replace {out / mount}: it is a mount point. Unmount it, or give another folder."
            )
        if not folder.has_file(CONFIG) and folder.names():
            raise CheckpointError(f"refusing to replace {out}: it contains no {CONFIG}. Remove it first.")
        return folder.status().st_ino


def _install(own: OwnFolder, parent: OpenFolder, out: Path, overwrite: bool) -> None:
    """Moves the result to ``out``, after checking again that this is allowed: hours may have passed."""
    if not out.parent.is_dir() or not os.path.samestat(out.parent.stat(), parent.status()):
        raise CheckpointError(f"{out.parent} was moved or replaced by another process meanwhile. Nothing was kept.")
    replaced = _find_replaceable(out, parent, overwrite)
    if replaced is None:
        move(CONTENT, own.folder, out.name, parent)
    else:
        own.note_replaced(replaced)
        if not exchange(CONTENT, own.folder, out.name, parent):
            move(out.name, parent, REPLACED, own.folder)
            move(CONTENT, own.folder, out.name, parent)
        if own.find_replaced() is None:
            raise CheckpointError(f"{out} was replaced by another process meanwhile and not touched. Nothing was kept.")
    parent.sync()


def _roll_back(own: OwnFolder, parent: OpenFolder, out: Path) -> str | None:
    """Undoes `_install`, however far it got; returns an error message, or None on success."""
    moved_in = next((name for name in (REPLACED, CONTENT) if own.folder.inode_of(name) not in (None, own.inode)), None)
    is_installed = parent.inode_of(out.name) == own.inode
    try:
        if is_installed and moved_in == CONTENT:
            exchange(CONTENT, own.folder, out.name, parent)
        else:
            if is_installed:
                move(out.name, parent, CONTENT, own.folder)
            if moved_in is not None:
                move(moved_in, own.folder, out.name, parent)
    except OSError as error:
        return f"could not restore {out}; its former contents are in {own.path}: {error.strerror}"
    return None


def _recover(leftover: OwnFolder, parent: OpenFolder, out: Path) -> str:
    """Restores ``out`` after a killed run, or removes what that left; returns a message for the user."""
    replaced = leftover.find_replaced()
    now = parent.inode_of(out.name)
    if replaced is not None and now is None:
        move(replaced, leftover.folder, out.name, parent)
        message = f"restored {out}, which an interrupted run was about to replace"
    elif replaced is None or now == leftover.inode:
        message = f"removed {leftover.path.name} of an interrupted run"
    else:
        return f"kept {leftover.path / replaced}: it was {out} before an interrupted run, but {out} exists now"
    return leftover.remove(with_replaced=now is not None) or message


def _notify_if(fault: str | None, notify: Callable[[str], None]) -> None:
    if fault is not None:
        notify(fault)
