"""`move` and `exchange`: renaming between open folders, without replacing anything, or in one step both ways."""

import ctypes
import errno
import os

NOREPLACE, EXCHANGE = 1, 2
"""Flags of renameat2 (Linux 3.15)."""
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a system or a file system says that does not know a flag."""


def move(name: str, source: int, new_name: str, target: int) -> None:
    """Renames a folder from one open folder into another, where nothing may be of that name.

    Raises:
        OSError: where there is something. Without renameat2 an empty folder is not seen, and replaced.
    """
    if not _rename(name, source, new_name, target, NOREPLACE):
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)


def exchange(name: str, source: int, other: str, target: int) -> bool:
    """Two entries of two open folders change places in one step; returns whether the system can do that.

    Raises:
        OSError: where one of them is not there, or may not be renamed.
    """
    return _rename(name, source, other, target, EXCHANGE)


def _rename(name: str, source: int, new_name: str, target: int, flag: int) -> bool:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(source, os.fsencode(name), target, os.fsencode(new_name), flag) == 0:
        return True
    if (error := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(error, os.strerror(error), new_name)
