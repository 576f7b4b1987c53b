"""Both kinds of open folder, wherever tests run, and what Windows refuses."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from qkv.convert.files import lock, open_folder, staging
from qkv.convert.files.open_folder import DescribedFolder, NamedFolder, OpenFolder
from qkv.models import default_weights, uptraining


class WindowsFolder(NamedFolder):
    """A folder as on Windows: what is open can be neither removed nor moved."""

    def remove_file(self, name: str) -> None:
        self._refuse_if_open(name)
        super().remove_file(name)

    def remove_folder(self, name: str) -> None:
        self._refuse_if_open(name)
        super().remove_folder(name)

    def move_to(self, name: str, target: OpenFolder, new_name: str) -> None:
        self._refuse_if_open(name)
        if target.inode_of(new_name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name)
        super().move_to(name, target, new_name)

    def _refuse_if_open(self, name: str) -> None:
        place, descriptors = str(self._at(name)), Path("/proc/self/fd")
        for descriptor in descriptors.iterdir() if descriptors.exists() else ():
            with suppress(FileNotFoundError):  # the one that lists them
                if f"{descriptor.readlink()}/".startswith(f"{place}/"):
                    raise PermissionError(errno.EACCES, "is open", place)


KINDS = [WindowsFolder] if os.name == "nt" else [DescribedFolder, WindowsFolder]


@pytest.fixture(params=KINDS, autouse=True)
def kind_of_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[OpenFolder]:
    """The class of all open folders. Imported by the tests that run for both."""
    for module in (open_folder, staging, default_weights, uptraining):
        monkeypatch.setattr(module, "open_folder", request.param)
    if request.param is WindowsFolder:
        monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="win32"))  # closes files before it removes them
    return request.param


only_by_descriptor = pytest.mark.parametrize("kind_of_folder", [DescribedFolder], indirect=True)
"""For what Windows has no calls for."""
