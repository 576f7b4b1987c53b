"""`lock`: a lock on an open file, which ends when the file is closed or the process ends, in whatever way.

Not filelock's, which torch requires: that opens the file itself, by a path. Here it is open already, by
`OpenFolder.open_file`.
"""

import os
import sys
from collections.abc import Callable

if sys.platform == "win32":
    import msvcrt

    BEYOND = 1 << 30
    """The byte that is locked, since nobody else can read it: more than a locked file has."""

    def lock(descriptor: int) -> bool:
        """Locks a file that is open for writing, without waiting; False if it is locked already."""
        os.lseek(descriptor, BEYOND, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def lock(descriptor: int) -> bool:
        """Locks a file that is open for writing, without waiting; False if it is locked already."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def remove_locked(descriptor: int, remove: Callable[[], None]) -> None:
    """Removes a locked file by ``remove``, and closes it afterwards: nobody can lock in between what is about to go.

    On Windows, which removes no open file, it is closed before.
    """
    if sys.platform == "win32":
        os.close(descriptor)
        remove()
        return
    try:
        remove()
    finally:
        os.close(descriptor)
