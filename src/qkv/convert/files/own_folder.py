"""`OwnFolder`: a temporary folder that a run creates, and that this run or a later one can safely remove.

It has a random name, is created exclusively, and contains the file `MARKER` and the folder `CONTENT` for the result.
The first line of the marker identifies the run and both folders by inode; each further line names what the run is about
to create. A run locks its marker until it ends, in whatever way. So a later run recognises what a killed run left, and
removes exactly what the marker names.

All paths are relative to open folders, links are not followed, and mounts are not entered. Folders of other users,
copies, and folders that merely have such a name are left alone.
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
MAX_BYTES = 100_000_000
"""Bytes of a marker that are read."""

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class OwnFolder:
    """A folder of this run, or of a dead one whose lock this run has taken over."""

    def __init__(self, parent_path: Path, parent: int, name: str, folder: int, marker: int, inode: int) -> None:
        self.path = parent_path / name
        self.inode = inode
        """Inode of `CONTENT` when it was created."""
        self.replaced: int | None = None
        """Inode of the folder that the run was about to replace."""
        self._parent, self._name, self._folder, self._marker = parent, name, folder, marker
        self._made: list[str] = []
        self._is_shared = False

    @property
    def descriptor(self) -> int:
        """Descriptor of the open folder."""
        return self._folder

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
                    os.mkdir(folder.name, dir_fd=parent)
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
            (name for name in names if self.replaced is not None and self.inode_of(name) == self.replaced), None
        )

    def inode_of(self, name: str) -> int | None:
        """The inode of an entry; None where it does not exist."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def sync(self) -> None:
        """Flushes all directory entries of `CONTENT` to disk."""
        for name in ("", *(name for name in self._made if name.endswith("/"))):
            with self._parent_of(PurePosixPath(name) / "any") as folder:
                os.fsync(folder)

    def remove(self, *, with_replaced: bool = False) -> str | None:
        """Removes the created entries, optionally the replaced folder, and then this folder.

        Returns:
            why the folder could not be removed, or None.
        """
        try:
            if self.inode_of(CONTENT) == self.inode:
                self._remove_made()
            if with_replaced and (name := self.find_replaced()) is not None:
                remove_tree(name, self._folder)
            foreign = sorted(set(names_in(self._folder)) - {MARKER})
            if not foreign:
                os.unlink(MARKER, dir_fd=self._folder)
                os.rmdir(self._name, dir_fd=self._parent)
        except (OSError, RecursionError) as error:
            return f"could not remove {self.path}: {error}"
        return f"did not remove {self.path}: it contains {foreign[0]!r}, which qkv did not create" if foreign else None

    def _remove_made(self) -> None:
        """Removes the recorded entries of `CONTENT`, in reverse order."""
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
        """Records an entry of `CONTENT` that is about to be created."""
        self._note(name)
        self._made.append(name)

    def _note(self, record: object) -> None:
        """Appends a line to the marker."""
        line = json.dumps(record).encode() + b"\n"
        if os.write(self._marker, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / MARKER))

    def _open(self, path: PurePosixPath, flags: int) -> int:
        """Opens a file in `CONTENT`; returns its descriptor."""
        try:
            with self._parent_of(path) as parent:
                return os.open(path.name, flags | os.O_NOFOLLOW, 0o666, dir_fd=parent)
        except OSError as error:
            error.filename = str(self.path / CONTENT / path)
            raise

    @contextmanager
    def _parent_of(self, path: PurePosixPath) -> Iterator[int]:
        """The open parent folder of an entry of `CONTENT`."""
        with _opened(CONTENT, self._folder) as folder:
            yield from _descend(path.parts[:-1], folder)


@contextmanager
def make_own_folder(parent_path: Path, parent: int, purpose: str) -> Iterator[OwnFolder]:
    """Creates a folder in the open folder ``parent``, accessible to the user only. The caller removes it.

    Args:
        parent_path: the path of ``parent``, for messages and for programs that need paths.
        parent: descriptor of an open folder.
        purpose: the key by which `find_leftovers` finds it.

    Raises:
        OSError: where it cannot be created.
    """
    run = secrets.token_hex(8)
    name = PREFIX + run
    os.mkdir(name, 0o700, dir_fd=parent)
    with _opened(name, parent) as folder:
        if names_in(folder):
            raise FileExistsError(errno.EEXIST, "another process put a folder there", str(parent_path / name))
        # Only the outer folder is private: the contents have the permissions of the user's umask.
        os.mkdir(CONTENT, dir_fd=folder)
        inode = os.stat(CONTENT, dir_fd=folder, follow_symlinks=False).st_ino
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW
        marker = os.open(MARKER, flags, 0o600, dir_fd=folder)
        own = OwnFolder(parent_path, parent, name, folder, marker, inode)
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


def find_leftovers(parent_path: Path, parent: int, purpose: str) -> Iterator[OwnFolder | None]:
    """The folders of earlier runs of the same user and purpose in ``parent``; None for a run that is still active."""
    for name in sorted(names_in(parent)):
        if NAME.fullmatch(name) is None:
            continue
        with suppress(OSError), _opened(name, parent) as folder, _opened_marker(folder) as marker:
            own = _read_marker(parent_path, parent, name, folder, marker, purpose)
            if own is None:
                continue
            yield own if _lock(marker) else None


def remove_tree(name: str, parent: int) -> None:
    """Removes a folder with its contents, ``config.json`` first, so that a partly removed model does not load.

    Raises:
        OSError: for entries that cannot be removed, and mounts, which are not entered.
    """
    with _opened(name, parent) as folder:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name != "config.json"):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.name, folder)
            else:
                os.unlink(entry.name, dir_fd=folder)
    os.rmdir(name, dir_fd=parent)


def names_in(folder: int) -> list[str]:
    """The names of the entries of an open folder."""
    return [entry.name for entry in os.scandir(folder)]


def find_mount(folder: int) -> PurePosixPath | None:
    """The relative path of the first mount in an open folder; None without mounts."""
    for name in [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]:
        inner = os.open(name, FOLDER, dir_fd=folder)
        try:
            mount = find_mount(inner) if mount_of(inner) == mount_of(folder) else PurePosixPath()
        finally:
            os.close(inner)
        if mount is not None:
            return name / mount
    return None


def mount_of(folder: int) -> tuple[int, str]:
    """The device of an open folder and, on Linux, its mount id, since a device may be mounted twice."""
    device = os.fstat(folder).st_dev
    try:
        match = re.search(r"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{folder}").read_text(), re.MULTILINE)
    except OSError:
        return device, ""
    return device, match[1] if match else ""


def _header(run: str, folder: int, content: int, purpose: str) -> dict[str, Any]:
    """The first line of a marker."""
    return {"format": FORMAT, "run": run, "folder": folder, "content": content, "purpose": purpose}


def _read_marker(parent_path: Path, parent: int, name: str, folder: int, marker: int, purpose: str) -> OwnFolder | None:
    """The folder that a marker describes; None unless it is valid, belongs to this user and has this purpose."""
    status, mine = os.fstat(folder), os.geteuid()
    if not status.st_uid == os.fstat(marker).st_uid == mine:
        return None
    # An incomplete last line was being written when the run was killed; its entry was not created yet.
    first, *lines = os.pread(marker, MAX_BYTES, 0).split(b"\n")[:-1] or [b""]
    try:
        header, records = json.loads(first), [json.loads(line) for line in lines]
        own = OwnFolder(parent_path, parent, name, folder, marker, header["content"])
        expected = _header(name.removeprefix(PREFIX), status.st_ino, own.inode, purpose)
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
    return own if header == expected else None


def _is_inside(name: str) -> bool:
    """Whether a name in a marker is a valid path inside of `CONTENT`."""
    parts = name.removesuffix("/").split("/")
    return "\0" not in name and not {"", ".", ".."} & set(parts)


def _lock(marker: int) -> bool:
    """Locks a marker without waiting; returns False if another run holds the lock."""
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(name: str, parent: int) -> Iterator[int]:
    """Opens a folder inside an open one; raises OSError for links and mounts."""
    folder = os.open(name, FOLDER, dir_fd=parent)
    try:
        if mount_of(folder) != mount_of(parent):
            raise OSError(errno.EBUSY, "a mount is not entered", name)
        yield folder
    finally:
        os.close(folder)


@contextmanager
def _opened_marker(folder: int) -> Iterator[int]:
    """Opens the marker; raises OSError unless it is a regular file. Does not block on a FIFO of that name."""
    marker = os.open(MARKER, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(marker).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", MARKER)
        yield marker
    finally:
        os.close(marker)


def _descend(parts: tuple[str, ...], folder: int) -> Iterator[int]:
    """Opens nested folders and yields the descriptor of the last one."""
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
