"""`OpenFolder`: a folder that is opened once, by which its entries are reached. No link among them is followed.

On POSIX it is a descriptor, to which names are relative: what becomes of its path meanwhile cannot redirect a run.
Windows has no such calls. There it is a path, which is compared with the folder that was opened before each call; what
another process does between the two is not noticed.
"""

import errno
import os
import re
import shutil
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME_SURROGATE = 0x20000000
"""Bit of the reparse tag of what stands for another place on Windows: links, junctions, mounted volumes."""
if sys.platform == "win32":
    FOLDER, NO_LINK, BINARY = 0, 0, os.O_BINARY  # without the last, ends of lines are translated
else:
    FOLDER, NO_LINK, BINARY = os.O_RDONLY | os.O_DIRECTORY, os.O_NOFOLLOW | os.O_NONBLOCK, 0


class OpenFolder(ABC):
    """An open folder, which is closed at the end of a ``with`` block. See `open_folder`.

    All methods raise OSError where the system refuses.
    """

    path: Path
    """The path by which it was opened, for messages and other programs."""

    @abstractmethod
    def status(self) -> os.stat_result:
        """The status of the folder itself."""

    @abstractmethod
    def status_of(self, name: str) -> os.stat_result:
        """The status of an entry; of a link itself."""

    @abstractmethod
    def has_file(self, name: str) -> bool:
        """Whether an entry is a file, or a link to one."""

    @abstractmethod
    def mount(self) -> tuple[int, str]:
        """What tells whether a folder is on the same mount as another."""

    @abstractmethod
    def entries(self) -> list[tuple[str, bool]]:
        """The names of its entries, and whether each is a folder."""

    @abstractmethod
    def open(self, name: str) -> "OpenFolder":
        """Opens a folder inside, even on another mount; raises OSError for a link."""

    @abstractmethod
    def open_file(self, name: str, flags: int, *, is_private: bool = False) -> int:
        """Opens a file, for bytes; returns its descriptor. Does not wait for the other end of a pipe.

        Args:
            name: of an entry; not a link.
            flags: as of `os.open`.
            is_private: whether a new file is for this user alone. On Windows the folder's permissions decide.
        """

    @abstractmethod
    def make_folder(self, name: str, *, is_private: bool = False) -> None:
        """Makes a folder; for this user alone if ``is_private``, as `open_file`."""

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Removes a file, or a link itself. On Windows it must not be open."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Removes an empty folder."""

    @abstractmethod
    def move_to(self, name: str, target: "OpenFolder", new_name: str) -> None:
        """Moves a folder into another open folder. On POSIX, an empty folder of that name is replaced."""

    @abstractmethod
    def take(self, file: Path, name: str) -> None:
        """Moves a file from a path into this folder, in place of an older one of that name."""

    @abstractmethod
    def target_of(self, name: str) -> str:
        """What a link leads to."""

    @abstractmethod
    def free_bytes(self) -> int:
        """The bytes that are free on its disk."""

    @abstractmethod
    def sync(self) -> None:
        """Flushes its entries to disk, where that can be asked for."""

    @abstractmethod
    def close(self) -> None:
        """Closes it."""

    def __enter__(self) -> "OpenFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def enter(self, name: str) -> Iterator["OpenFolder"]:
        """Opens a folder inside; raises OSError for links and mounts."""
        with self.open(name) as inner:
            if inner.mount() != self.mount():
                raise OSError(errno.EBUSY, "a mount is not entered", name)
            yield inner

    def names(self) -> list[str]:
        """The names of its entries."""
        return [name for name, _ in self.entries()]

    def inode_of(self, name: str) -> int | None:
        """The inode of an entry; None where it does not exist."""
        try:
            return self.status_of(name).st_ino
        except FileNotFoundError:
            return None

    def find_mount(self) -> Path | None:
        """The relative path of the first mount inside; None without mounts."""
        for name in [name for name, is_folder in self.entries() if is_folder]:
            with self.open(name) as inner:
                mount = inner.find_mount() if inner.mount() == self.mount() else Path()
            if mount is not None:
                return name / mount
        return None

    def remove_tree(self, name: str) -> None:
        """Removes a folder with its contents, ``config.json`` first, so that a partly removed model does not load.

        Raises:
            OSError: for entries that cannot be removed, and mounts, which are not entered.
        """
        with self.enter(name) as folder:
            for entry, is_folder in sorted(folder.entries(), key=lambda entry: entry[0] != "config.json"):
                if is_folder:
                    folder.remove_tree(entry)
                else:
                    folder.remove_file(entry)
        self.remove_folder(name)


class DescribedFolder(OpenFolder):
    """A folder of POSIX, by a descriptor.

    Args:
        path: of the folder. Links in it are followed, but for the last part of one that is ``inside``.
        inside: the folder that it is in, to be opened as an entry of that.
    """

    def __init__(self, path: Path, inside: "DescribedFolder | None" = None) -> None:
        self.path = path
        if inside is None:
            self.descriptor = os.open(path, FOLDER)
        else:
            self.descriptor = os.open(path.name, FOLDER | NO_LINK, dir_fd=inside.descriptor)

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor)

    def status_of(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has_file(self, name: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self.descriptor).st_mode)
        except OSError:
            return False

    def mount(self) -> tuple[int, str]:
        """The device and, on Linux, the id of the mount, since a device may be mounted twice."""
        device = self.status().st_dev
        try:
            text = Path(f"/proc/self/fdinfo/{self.descriptor}").read_text(encoding="ascii")
        except OSError:
            return device, ""
        match = re.search(r"^mnt_id:\s*(\d+)", text, re.MULTILINE)
        return device, match[1] if match else ""

    def entries(self) -> list[tuple[str, bool]]:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(self.descriptor)]

    def open(self, name: str) -> OpenFolder:
        return DescribedFolder(self.path / name, self)

    def open_file(self, name: str, flags: int, *, is_private: bool = False) -> int:
        mode = 0o600 if is_private else 0o666
        return os.open(name, flags | NO_LINK, mode, dir_fd=self.descriptor)

    def make_folder(self, name: str, *, is_private: bool = False) -> None:
        os.mkdir(name, 0o700 if is_private else 0o777, dir_fd=self.descriptor)

    def remove_file(self, name: str) -> None:
        os.unlink(name, dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        os.rmdir(name, dir_fd=self.descriptor)

    def move_to(self, name: str, target: OpenFolder, new_name: str) -> None:
        assert isinstance(target, DescribedFolder)
        os.rename(name, new_name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    def take(self, file: Path, name: str) -> None:
        os.replace(file, name, dst_dir_fd=self.descriptor)

    def target_of(self, name: str) -> str:
        return os.readlink(name, dir_fd=self.descriptor)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.descriptor).free

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


class NamedFolder(OpenFolder):
    """A folder of Windows, by its path.

    Args:
        path: of the folder.
        inside: the folder that it is in; without, links in the path are followed.
    """

    def __init__(self, path: Path, inside: "NamedFolder | None" = None) -> None:
        self.path = path
        self._place = path.resolve(strict=True) if inside is None else inside._at(path.name)
        self._opened = self._place.lstat()
        if not stat.S_ISDIR(self._opened.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def _at(self, name: str) -> Path:
        """The path of an entry; raises OSError if this is no longer the folder that was opened."""
        if not os.path.samestat(self._place.lstat(), self._opened):
            raise FileNotFoundError(errno.ENOENT, "was moved or replaced by another process", str(self.path))
        return self._place / name

    def status(self) -> os.stat_result:
        return self._opened

    def status_of(self, name: str) -> os.stat_result:
        return self._at(name).lstat()

    def has_file(self, name: str) -> bool:
        return self._at(name).is_file()

    def mount(self) -> tuple[int, str]:
        """The device, and the path of a junction or mounted volume, which is like no other."""
        is_elsewhere = getattr(self._opened, "st_reparse_tag", 0) & NAME_SURROGATE
        return self._opened.st_dev, str(self._place) if is_elsewhere else ""

    def entries(self) -> list[tuple[str, bool]]:
        with os.scandir(self._at("")) as found:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]

    def open(self, name: str) -> OpenFolder:
        return type(self)(self.path / name, self)

    def open_file(self, name: str, flags: int, *, is_private: bool = False) -> int:
        path = self._at(name)
        if not flags & os.O_CREAT and not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        opened = os.open(path, flags | BINARY)
        if os.path.samestat(path.lstat(), os.fstat(opened)):
            return opened
        os.close(opened)
        raise OSError(errno.EINVAL, "a link is not followed", str(path))

    def make_folder(self, name: str, *, is_private: bool = False) -> None:
        self._at(name).mkdir()

    def remove_file(self, name: str) -> None:
        self._at(name).unlink()

    def remove_folder(self, name: str) -> None:
        self._at(name).rmdir()

    def move_to(self, name: str, target: OpenFolder, new_name: str) -> None:
        assert isinstance(target, NamedFolder)
        self._at(name).rename(target._at(new_name))

    def take(self, file: Path, name: str) -> None:
        file.replace(self._at(name))

    def target_of(self, name: str) -> str:
        return str(self._at(name).readlink())

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._at("")).free

    def sync(self) -> None:
        """Windows cannot be asked to."""

    def close(self) -> None:
        """Nothing is open."""


def open_folder(path: Path) -> OpenFolder:
    """Opens the folder at a path, in which links are followed."""
    return NamedFolder(path) if sys.platform == "win32" else DescribedFolder(path)
