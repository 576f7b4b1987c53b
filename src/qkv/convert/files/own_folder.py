"""`OwnFolder`: a temporary folder that a run creates, and that this run or a later one can safely remove.

It has a random name, is created exclusively, and contains the file `MARKER` and the folder `CONTENT` for the result.
The first line of the marker identifies the run and both folders by inode; each further line names what the run is about
to create. A run locks its marker until it ends, in whatever way. So a later run recognises what a killed run left, and
removes exactly what the marker names.

All paths are relative to open folders, links are not followed, and mounts are not entered. Folders of other users,
copies, and folders that merely have such a name are left alone.
"""

import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO

from qkv.convert.files.lock import lock, remove_locked
from qkv.convert.files.open_folder import OpenFolder

PREFIX = "qkv-unfinished-"
NAME = re.compile(PREFIX + "([0-9a-f]{16})")
MARKER, CONTENT, REPLACED = "qkv-run.jsonl", "new", "old"
FORMAT = "qkv unfinished folder, 1"
MAX_BYTES = 100_000_000
"""Bytes of a marker that are read."""


class OwnFolder:
    """A folder of this run, or of a dead one whose lock this run has taken over."""

    def __init__(self, parent: OpenFolder, name: str, folder: OpenFolder, marker: int, inode: int) -> None:
        self.path = parent.path / name
        self.folder = folder
        self.inode = inode
        """Inode of `CONTENT` when it was created."""
        self.replaced: int | None = None
        """Inode of the folder that the run was about to replace."""
        self._parent, self._name = parent, name
        self._marker: int | None = marker
        self._made: list[str] = []
        self._is_shared = False

    def create(self, name: str) -> BinaryIO:
        """Creates a file in `CONTENT`, unbuffered, with its parent folders.

        Raises:
            OSError: where the name exists, even as a link.
        """
        path = PurePosixPath(name)
        for folder in reversed(path.parents[:-1]):
            if f"{folder}/" not in self._made:
                self._note_made(f"{folder}/")
                with self._parent_of(folder) as parent:
                    parent.make_folder(folder.name)
        self._note_made(name)
        return os.fdopen(self._open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb", buffering=0)

    def open(self, name: str) -> BinaryIO:
        """Opens a file in `CONTENT` for reading."""
        return os.fdopen(self._open(PurePosixPath(name), os.O_RDONLY), "rb", buffering=0)

    def share(self) -> Path:
        """The path of `CONTENT` for another program to write to; from then on, all of its contents are removable."""
        self._note({"all": True})
        self._is_shared = True
        return self.path / CONTENT

    def note_replaced(self, inode: int) -> None:
        """Records that `CONTENT` is about to replace a folder, which is moved in here."""
        self._note({"replaces": inode})
        self.replaced = inode

    def find_replaced(self) -> str | None:
        """The name in this folder of the replaced folder, if it was moved in."""
        names = (REPLACED, CONTENT)
        return next(
            (name for name in names if self.replaced is not None and self.folder.inode_of(name) == self.replaced), None
        )

    def sync(self) -> None:
        """Flushes all directory entries of `CONTENT` to disk."""
        for name in ("", *(name for name in self._made if name.endswith("/"))):
            with self._parent_of(PurePosixPath(name) / "any") as folder:
                folder.sync()

    def remove(self, *, with_replaced: bool = False) -> str | None:
        """Removes the created entries, optionally the replaced folder, and then this folder.

        Returns:
            why the folder could not be removed, or None.
        """
        try:
            if self.folder.inode_of(CONTENT) == self.inode:
                self._remove_made()
            if with_replaced and (name := self.find_replaced()) is not None:
                self.folder.remove_tree(name)
            foreign = sorted(set(self.folder.names()) - {MARKER})
            if not foreign:
                assert self._marker is not None
                marker, self._marker = self._marker, None
                remove_locked(marker, lambda: self.folder.remove_file(MARKER))
                self._parent.remove_folder(self._name)
        except (OSError, RecursionError) as error:
            return f"could not remove {self.path}: {error}"
        return f"did not remove {self.path}: it contains {foreign[0]!r}, which qkv did not create" if foreign else None

    def close(self) -> None:
        """Closes the marker, which ends its lock."""
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None

    def _remove_made(self) -> None:
        """Removes the recorded entries of `CONTENT`, in reverse order."""
        if self._is_shared:
            self.folder.remove_tree(CONTENT)
            return
        for name in reversed(self._made):
            with suppress(FileNotFoundError), self._parent_of(path := PurePosixPath(name)) as parent:
                if not name.endswith("/"):
                    parent.remove_file(path.name)
                else:
                    _remove_if_empty(path.name, parent)
        _remove_if_empty(CONTENT, self.folder)

    def _note_made(self, name: str) -> None:
        """Records an entry of `CONTENT` that is about to be created."""
        self._note(name)
        self._made.append(name)

    def _note(self, record: object) -> None:
        """Appends a line to the marker."""
        line = json.dumps(record).encode() + b"\n"
        assert self._marker is not None
        if os.write(self._marker, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / MARKER))

    def _open(self, path: PurePosixPath, flags: int) -> int:
        """Opens a file in `CONTENT`; returns its descriptor."""
        try:
            with self._parent_of(path) as parent:
                return parent.open_file(path.name, flags)
        except OSError as error:
            error.filename = str(self.path / CONTENT / path)
            raise

    @contextmanager
    def _parent_of(self, path: PurePosixPath) -> Iterator[OpenFolder]:
        """The open parent folder of an entry of `CONTENT`."""
        with self.folder.enter(CONTENT) as folder:
            yield from _descend(path.parts[:-1], folder)


@contextmanager
def make_own_folder(parent: OpenFolder, purpose: str) -> Iterator[OwnFolder]:
    """Creates a folder in ``parent``, accessible to the user only. The caller removes it.

    Args:
        parent: an open folder.
        purpose: the key by which `find_leftovers` finds it.

    Raises:
        OSError: where it cannot be created.
    """
    run = secrets.token_hex(8)
    name = PREFIX + run
    parent.make_folder(name, is_private=True)
    with parent.enter(name) as folder:
        if folder.names():
            raise FileExistsError(errno.EEXIST, "another process put a folder there", str(parent.path / name))
        # Only the outer folder is private: the contents have the permissions of the user's umask.
        folder.make_folder(CONTENT)
        inode = folder.status_of(CONTENT).st_ino
        marker = folder.open_file(MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, is_private=True)
        own = OwnFolder(parent, name, folder, marker, inode)
        try:
            try:
                if not lock(marker):
                    raise OSError(errno.EBUSY, "another process locked it", str(own.path / MARKER))
                own._note(_header(run, folder.status().st_ino, inode, purpose))
            except OSError:
                own.remove()
                raise
            yield own
        finally:
            own.close()


def find_leftovers(parent: OpenFolder, purpose: str) -> Iterator[OwnFolder | None]:
    """The folders of earlier runs of the same user and purpose in ``parent``; None for a run that is still active."""
    for name in sorted(parent.names()):
        if NAME.fullmatch(name) is None:
            continue
        with suppress(OSError), parent.enter(name) as folder:
            marker = folder.open_file(MARKER, os.O_RDWR | os.O_APPEND)
            own = OwnFolder(parent, name, folder, marker, 0)
            try:
                if _read_marker(own, marker, purpose):
                    yield own if lock(marker) else None
            finally:
                own.close()


def _header(run: str, folder: int, content: int, purpose: str) -> dict[str, Any]:
    """The first line of a marker."""
    return {"format": FORMAT, "run": run, "folder": folder, "content": content, "purpose": purpose}


def _read_marker(own: OwnFolder, marker: int, purpose: str) -> bool:
    """Fills in what a marker says of a folder; False unless it is valid, belongs to this user and has this purpose."""
    folder, file = own.folder.status(), os.fstat(marker)
    if not stat.S_ISREG(file.st_mode) or not _is_mine(folder, file):
        return False
    with os.fdopen(marker, "rb", closefd=False) as opened:
        # An incomplete last line was being written when the run was killed; its entry was not created yet.
        first, *lines = opened.read(MAX_BYTES).split(b"\n")[:-1] or [b""]
    try:
        header, records = json.loads(first), [json.loads(line) for line in lines]
        own.inode = header["content"]
        expected = _header(own.path.name.removeprefix(PREFIX), folder.st_ino, own.inode, purpose)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    for record in records:
        if isinstance(record, str) and _is_inside(record):
            own._made.append(record)
        elif record == {"all": True}:
            own._is_shared = True
        elif isinstance(record, dict) and record.keys() == {"replaces"}:
            own.replaced = record["replaces"]
        else:
            return False
    return bool(header == expected)


def _is_mine(*entries: os.stat_result) -> bool:
    """Whether entries are this user's. On Windows, access to them decides."""
    return sys.platform == "win32" or all(entry.st_uid == os.geteuid() for entry in entries)


def _is_inside(name: str) -> bool:
    """Whether a name in a marker is a valid path inside of `CONTENT`."""
    name = name.removesuffix("/")
    parts = name.split("/")
    # On Windows, other characters than / make a path as well.
    return "\0" not in name and not {"", ".", ".."} & set(parts) and PurePath(name).parts == tuple(parts)


def _descend(parts: tuple[str, ...], folder: OpenFolder) -> Iterator[OpenFolder]:
    """Opens nested folders and yields the last one."""
    if not parts:
        yield folder
        return
    with folder.enter(parts[0]) as inner:
        yield from _descend(parts[1:], inner)


def _remove_if_empty(name: str, parent: OpenFolder) -> None:
    try:
        parent.remove_folder(name)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
