"""`move` and `exchange`: atomic renames between open folders that never overwrite."""

import ctypes
import errno
import os

from qkv.convert.files.open_folder import DescribedFolder, OpenFolder

NOREPLACE, EXCHANGE = 1, 2
"""Flags of renameat2 (Linux 3.15)."""
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Errors of systems and file systems that do not support a flag."""


def move(name: str, source: OpenFolder, new_name: str, target: OpenFolder) -> None:
    """Moves a folder from one open folder to another, without overwriting.

    Raises:
        OSError: where ``new_name`` exists. On POSIX without renameat2, an empty folder of that name is replaced.
    """
    if not _rename(name, source, new_name, target, NOREPLACE):
        source.move_to(name, target, new_name)


def exchange(name: str, source: OpenFolder, other: str, target: OpenFolder) -> bool:
    """Swaps two entries of open folders atomically; returns False where the system does not support it.

    Raises:
        OSError: where one of them does not exist or may not be renamed.
    """
    return _rename(name, source, other, target, EXCHANGE)


def _rename(name: str, source: OpenFolder, new_name: str, target: OpenFolder, flag: int) -> bool:
    """Calls renameat2; returns False where it or the flag is not supported."""
    if not (isinstance(source, DescribedFolder) and isinstance(target, DescribedFolder)):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(source.descriptor, os.fsencode(name), target.descriptor, os.fsencode(new_name), flag) == 0:
        return True
    if (error := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(error, os.strerror(error), new_name)
