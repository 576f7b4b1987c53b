"""`OwnFolder`: a folder that a run makes for itself, and may therefore write in and remove.

It has a random name, is made exclusively, and holds `MARKER` beside the folder `CONTENT`, in which the work is done.
The marker says whose it is: its first line names the run and both folders by their inodes, and each further line what
the run is about to make there. A run holds a lock on its marker, which ends with it, however that ends. So what a
killed run left is known, and is removed by those names alone.

Everything is reached from open folders, no link is followed, and nothing is removed beyond a mount. Another user's
folder, a copy, or a folder that only has such a name is none of ours.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

PREFIX = "qkv-unfinished-"
NAME = re.compile(PREFIX + "([0-9a-f]{16})")
MARKER, CONTENT, REPLACED = "qkv-run.jsonl", "new", "old"
FORMAT = "qkv unfinished folder, 1"
MOST_BYTES = 100_000_000
"""Of a marker."""

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class OwnFolder:
    """A folder of this run, or with its lock taken over, what a dead one left."""

    def __init__(self, place: Path, parent: int, name: str, folder: int, marker: int, inode: int) -> None:
        self.path = place / name
        self.inode = inode
        """Of `CONTENT` as it was made."""
        self.replaced: int | None = None
        """Inode of what was about to be replaced."""
        self._parent, self._name, self._folder, self._marker = parent, name, folder, marker
        self._made: list[str] = []
        self._is_shared = False

    @property
    def descriptor(self) -> int:
        return self._folder

    def create(self, name: str) -> BinaryIO:
        """A new file in `CONTENT`, unbuffered, whose folders are made as needed.

        Raises:
            OSError: where there is something of that name, a link as well.
        """
        path = PurePosixPath(name)
        for folder in reversed(path.parents[:-1]):
            if f"{folder}/" not in self._made:
                self._note_made(f"{folder}/")
                with self._parent_of(folder) as parent:
                    os.mkdir(folder.name, dir_fd=parent)
        self._note_made(name)
        return os.fdopen(self._open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb", buffering=0)

    def open(self, name: str) -> BinaryIO:
        """A file in `CONTENT`, to be read."""
        return os.fdopen(self._open(PurePosixPath(name), os.O_RDONLY), "rb", buffering=0)

    def share(self) -> Path:
        """The path of `CONTENT`, for another program to write there: all that it holds later is this run's."""
        self._note({"all": True})
        self._is_shared = True
        return self.path / CONTENT

    def note_replaced(self, inode: int) -> None:
        """Says before it happens that a folder is about to be taken in, and replaced by `CONTENT`."""
        self._note({"replaces": inode})
        self.replaced = inode

    def find_replaced(self) -> str | None:
        """The name in this folder of what was taken in."""
        names = (REPLACED, CONTENT)
        return next(
            (name for name in names if self.replaced is not None and self.inode_of(name) == self.replaced), None
        )

    def inode_of(self, name: str) -> int | None:
        """Of an entry, if there is one."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def sync(self) -> None:
        """Waits until all names in `CONTENT` are on the disk."""
        for name in ("", *(name for name in self._made if name.endswith("/"))):
            with self._parent_of(PurePosixPath(name) / "any") as folder:
                os.fsync(folder)

    def remove(self, *, and_replaced: bool = False) -> str | None:
        """Removes what was made here, and what was taken in if told to, and then the folder.

        Returns:
            Why the folder is still there, or None.
        """
        try:
            if self.inode_of(CONTENT) == self.inode:
                self._remove_made()
            if and_replaced and (name := self.find_replaced()) is not None:
                remove_tree(name, self._folder)
            left = sorted(set(names_in(self._folder)) - {MARKER})
            if not left:
                os.unlink(MARKER, dir_fd=self._folder)
                os.rmdir(self._name, dir_fd=self._parent)
        except (OSError, RecursionError) as error:
            return f"{self.path} could not be removed: {error}"
        return f"{self.path} holds {left[0]!r}, which was not made for it, and was left" if left else None

    def _remove_made(self) -> None:
        if self._is_shared:
            remove_tree(CONTENT, self._folder)
            return
        for name in reversed(self._made):
            with suppress(FileNotFoundError), self._parent_of(path := PurePosixPath(name)) as parent:
                if not name.endswith("/"):
                    os.unlink(path.name, dir_fd=parent)
                else:
                    _remove_if_empty(path.name, parent)
        _remove_if_empty(CONTENT, self._folder)

    def _note_made(self, name: str) -> None:
        self._note(name)
        self._made.append(name)

    def _note(self, record: object) -> None:
        line = json.dumps(record).encode() + b"\n"
        if os.write(self._marker, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / MARKER))

    def _open(self, path: PurePosixPath, flags: int) -> int:
        try:
            with self._parent_of(path) as parent:
                return os.open(path.name, flags | os.O_NOFOLLOW, 0o666, dir_fd=parent)
        except OSError as error:
            error.filename = str(self.path / CONTENT / path)
            raise

    @contextmanager
    def _parent_of(self, path: PurePosixPath) -> Iterator[int]:
        """The open folder in `CONTENT` that an entry is in."""
        with _opened(CONTENT, self._folder) as folder:
            yield from _descend(path.parts[:-1], folder)


@contextmanager
def own_folder(place: Path, parent: int, purpose: str) -> Iterator[OwnFolder]:
    """A new folder in the open folder ``parent``, which only the user can enter. Who uses it removes it.

    Args:
        place: the path of ``parent``, for messages and for programs that are given paths.
        parent: an open folder.
        purpose: by which `leftovers` finds it.

    Raises:
        OSError: where it cannot be made.
    """
    run = secrets.token_hex(8)
    name = PREFIX + run
    os.mkdir(name, 0o700, dir_fd=parent)
    with _opened(name, parent) as folder:
        if names_in(folder):
            raise FileExistsError(errno.EEXIST, "someone else put another folder there", str(place / name))
        # Only the folder around it is closed to others: what is made in it has the rights that the user gives.
        os.mkdir(CONTENT, dir_fd=folder)
        inode = os.stat(CONTENT, dir_fd=folder, follow_symlinks=False).st_ino
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW
        marker = os.open(MARKER, flags, 0o600, dir_fd=folder)
        own = OwnFolder(place, parent, name, folder, marker, inode)
        try:
            try:
                fcntl.flock(marker, fcntl.LOCK_EX)
                own._note(_header(run, os.fstat(folder).st_ino, inode, purpose))
            except OSError:
                own.remove()
                raise
            yield own
        finally:
            os.close(marker)


def leftovers(place: Path, parent: int, purpose: str) -> Iterator[OwnFolder | None]:
    """What earlier runs of the same user and purpose left in ``parent``; None stands for a run that is at work."""
    for name in sorted(names_in(parent)):
        if NAME.fullmatch(name) is None:
            continue
        with suppress(OSError), _opened(name, parent) as folder, _opened_marker(folder) as marker:
            own = _read(place, parent, name, folder, marker, purpose)
            if own is None:
                continue
            yield own if _lock(marker) else None


def remove_tree(name: str, parent: int) -> None:
    """Removes a folder and all that is in it, its configuration first, so that what is left is no model.

    Raises:
        OSError: for what cannot be removed, and a mount, beyond which nothing is.
    """
    with _opened(name, parent) as folder:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name != "config.json"):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.name, folder)
            else:
                os.unlink(entry.name, dir_fd=folder)
    os.rmdir(name, dir_fd=parent)


def names_in(folder: int) -> list[str]:
    """Of the entries of an open folder."""
    return [entry.name for entry in os.scandir(folder)]


def find_mount(folder: int) -> PurePosixPath | None:
    """The first folder in an open one that is a mount, by its path in it."""
    for name in [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]:
        inner = os.open(name, FOLDER, dir_fd=folder)
        try:
            found = find_mount(inner) if mount_of(inner) == mount_of(folder) else PurePosixPath()
        finally:
            os.close(inner)
        if found is not None:
            return name / found
    return None


def mount_of(folder: int) -> tuple[int, str]:
    """Which mount an open folder is on: its device and, since one can be mounted twice, what Linux counts it as."""
    device = os.fstat(folder).st_dev
    try:
        found = re.search(r"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{folder}").read_text(), re.MULTILINE)
    except OSError:
        return device, ""
    return device, found[1] if found else ""


def _header(run: str, folder: int, content: int, purpose: str) -> dict[str, Any]:
    return {"format": FORMAT, "run": run, "folder": folder, "content": content, "purpose": purpose}


def _read(place: Path, parent: int, name: str, folder: int, marker: int, purpose: str) -> OwnFolder | None:
    """What a marker says, if it is one of ours in whole."""
    status, mine = os.fstat(folder), os.geteuid()
    if not status.st_uid == os.fstat(marker).st_uid == mine:
        return None
    # What follows the last end of a line was being written when the run was killed, and not yet made.
    first, *lines = os.pread(marker, MOST_BYTES, 0).split(b"\n")[:-1] or [b""]
    try:
        header, records = json.loads(first), [json.loads(line) for line in lines]
        own = OwnFolder(place, parent, name, folder, marker, header["content"])
        known = _header(name.removeprefix(PREFIX), status.st_ino, own.inode, purpose)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    for record in records:
        if isinstance(record, str) and _is_inside(record):
            own._made.append(record)
        elif record == {"all": True}:
            own._is_shared = True
        elif isinstance(record, dict) and record.keys() == {"replaces"}:
            own.replaced = record["replaces"]
        else:
            return None
    return own if header == known else None


def _is_inside(name: str) -> bool:
    """Whether a name in a marker is one that a run can have written there."""
    parts = name.removesuffix("/").split("/")
    return "\0" not in name and not {"", ".", ".."} & set(parts)


def _lock(marker: int) -> bool:
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(name: str, parent: int) -> Iterator[int]:
    """A folder in an open one; none that is a link or a mount."""
    folder = os.open(name, FOLDER, dir_fd=parent)
    try:
        if mount_of(folder) != mount_of(parent):
            raise OSError(errno.EBUSY, "a mount is not entered", name)
        yield folder
    finally:
        os.close(folder)


@contextmanager
def _opened_marker(folder: int) -> Iterator[int]:
    """Not waiting for whoever may write to what only looks like one."""
    marker = os.open(MARKER, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(marker).st_mode):
            raise OSError(errno.EINVAL, "no file", MARKER)
        yield marker
    finally:
        os.close(marker)


def _descend(parts: tuple[str, ...], folder: int) -> Iterator[int]:
    if not parts:
        yield folder
        return
    with _opened(parts[0], folder) as inner:
        yield from _descend(parts[1:], inner)


def _remove_if_empty(name: str, parent: int) -> None:
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
