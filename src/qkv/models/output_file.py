"""`check_output` and `write_output`: a file that a command writes, whole or not at all."""

import os
import tempfile
from pathlib import Path

from qkv.models.errors import CommandError


def check_output(file: Path, overwrite: bool) -> None:
    """Raises a CommandError where `write_output` could not write a file: before the work that makes it."""
    if file.is_dir():
        raise CommandError(f"--out: {file} must be a file; it is a folder. Give a name within it.")
    if str(file) == "-":
        raise CommandError("--out: - must be the name of a file; pages are not written to standard output.")
    if file.exists() and not (file.is_file() and _is_at_home(file)):
        raise CommandError(f"--out: {file} must be a file; it is a device or leads to one. Give another name.")
    if not overwrite and (file.exists() or file.is_symlink()):
        raise CommandError(f"--out: {file} exists; give another name, or --overwrite.")
    if not file.parent.is_dir():
        raise CommandError(f"--out: the folder {file.parent} does not exist; make it first.")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise CommandError(f"--out: cannot write into {file.parent}: {error.strerror}.") from error


def _is_at_home(file: Path) -> bool:
    """Whether a file is no link into what the system makes up, such as /dev/stdout, which must stay."""
    return not (file.is_symlink() and str(file.readlink()).startswith(("/proc/", "/dev/")))


def write_output(file: Path, text: str, overwrite: bool) -> None:
    """Writes a text in UTF-8, which stands under its name when it is complete. A link is replaced, not followed.

    Raises:
        CommandError: as `check_output`, whatever has happened since.
    """
    check_output(file, overwrite)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    made = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o666 & ~mask)  # as open() makes files; those of mkstemp are the owner's alone
        if not overwrite:
            try:
                file.touch(exist_ok=False)  # takes the name, unless someone has since
            except FileExistsError as error:
                raise CommandError(f"--out: {file} exists; give another name, or --overwrite.") from error
        made.replace(file)
    finally:
        made.unlink(missing_ok=True)
