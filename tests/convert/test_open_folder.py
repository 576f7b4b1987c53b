"""Open folders, and the folders and locks of runs, of both kinds: on Windows, CI runs this file as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from convert.folders import kind_of_folder  # noqa: F401  # a fixture for all tests

from qkv.convert.files import lock, open_folder, own_folder
from qkv.convert.files.own_folder import CONTENT, MARKER, find_leftovers, make_own_folder
from qkv.convert.files.renaming import move

BYTES = b"1\n2\r\n3\x1a4\r"
"""What Windows changes in text: ends of lines, and the end of a file."""


@pytest.fixture
def around(tmp_path):
    with open_folder.open_folder(tmp_path) as opened:
        yield opened


def test_bytes_are_written_and_read_as_they_are(around):
    with make_own_folder(around, "out") as own:
        with own.create("deep/down/file.bin") as file:
            file.write(BYTES)
        with own.open("deep/down/file.bin") as file:
            assert file.read() == BYTES
        assert (own.path / CONTENT / "deep" / "down" / "file.bin").read_bytes() == BYTES
        with pytest.raises(FileExistsError):
            own.create("deep/down/file.bin")
        own.sync()
        assert own.remove() is None
    assert around.names() == []


def test_a_result_is_moved_out_and_the_rest_removed(around, tmp_path):
    with make_own_folder(around, "out") as own:
        own.create("file.bin").close()
        move(CONTENT, own.folder, "out", around)
        assert around.inode_of("out") == own.inode
        assert own.remove() is None
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file.bin"]


def test_nothing_is_moved_over_a_folder(around, tmp_path):
    for name in ("one", "two"):
        around.make_folder(name)
        (tmp_path / name / name).touch()
    with pytest.raises(OSError, match="two"):
        move("one", around, "two", around)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one", "one", "two", "two"]


def test_a_file_takes_the_place_of_another(around, tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    around.take(tmp_path / "new", "old")
    assert around.names() == ["old"] and (tmp_path / "old").read_bytes() == b"new"


def test_a_tree_is_removed_with_what_is_in_it(around, tmp_path):
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").touch()
    (tmp_path / "tree" / "config.json").touch()
    assert dict(around.entries()) == {"tree": True}
    with around.enter("tree") as tree:
        assert tree.has_file("config.json") and not tree.has_file("deep") and not tree.has_file("none")
        assert tree.inode_of("none") is None and tree.free_bytes() > 0
    around.remove_tree("tree")
    assert around.names() == []


def test_links_are_not_followed(around, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "config.json").write_text("kept", encoding="utf-8")
    try:
        (tmp_path / "link").symlink_to(tmp_path / "victim", target_is_directory=True)
        (tmp_path / "file").symlink_to(tmp_path / "victim" / "config.json")
    except OSError as error:  # on Windows, a right that not every user has
        pytest.skip(f"links cannot be made: {error}")
    with pytest.raises(OSError):
        around.open("link")
    with pytest.raises(OSError):
        around.open_file("file", os.O_RDWR)
    with pytest.raises(OSError):
        around.remove_tree("link")
    assert Path(around.target_of("link")).name == "victim"
    assert around.has_file("file") and dict(around.entries())["link"] is False
    around.remove_file("link"), around.remove_file("file")
    assert (tmp_path / "victim" / "config.json").read_text(encoding="utf-8") == "kept"


def test_what_stands_for_another_place_on_windows_is_a_mount(tmp_path, monkeypatch):
    """A junction, which looks like a folder, is neither entered nor emptied."""
    (tmp_path / "out" / "junction").mkdir(parents=True)
    (tmp_path / "out" / "junction" / "precious").touch()
    lstat = Path.lstat

    def tagged(path):
        found = lstat(path)
        tag = 0xA0000003 if path.name == "junction" else 0
        fields = {name: getattr(found, name) for name in ("st_mode", "st_ino", "st_dev", "st_uid")}
        return SimpleNamespace(**fields, st_reparse_tag=tag)

    monkeypatch.setattr(Path, "lstat", tagged)
    around = open_folder.NamedFolder(tmp_path)
    assert around.find_mount() == Path("out", "junction")
    with pytest.raises(OSError, match="a mount is not entered"):
        around.remove_tree("out")
    assert (tmp_path / "out" / "junction" / "precious").exists()


def test_a_named_folder_that_is_replaced_is_noticed(tmp_path):
    """Of the other kind, it does not matter: what is done is done in the folder that was opened."""
    (tmp_path / "place").mkdir()
    folder = open_folder.NamedFolder(tmp_path / "place")
    folder.make_folder("before")
    (tmp_path / "place").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        folder.make_folder("after")
    (tmp_path / "place").mkdir()
    for change in (folder.make_folder, folder.remove_file, folder.remove_folder, folder.open):
        with pytest.raises(OSError, match="was moved or replaced by another process"):
            change("before")
    assert list((tmp_path / "place").iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from qkv.convert.files.open_folder import open_folder
from qkv.convert.files.own_folder import make_own_folder
with open_folder(Path(sys.argv[1])) as around, make_own_folder(around, "out") as own:
    own.create("half").close()
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_folder_of_another_process_is_left_alone_until_that_ends(around, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        assert list(find_leftovers(around, "out")) == [None]
        assert list(find_leftovers(around, "elsewhere")) == []
        process.kill()
    (left,) = (leftover.remove() for leftover in find_leftovers(around, "out"))
    assert left is None and around.names() == []


def test_a_lock_holds_until_its_file_is_closed(tmp_path):
    (tmp_path / "locked").write_bytes(b"content")
    first, second = (os.open(tmp_path / "locked", os.O_RDWR) for _ in range(2))
    assert lock.lock(first) and not lock.lock(second)
    assert os.read(second, 10) == b"content"
    os.close(first)
    assert lock.lock(second)
    lock.remove_locked(second, (tmp_path / "locked").unlink)
    assert not (tmp_path / "locked").exists()


@pytest.mark.parametrize("name", ["..\\victim", "a\\b", "C:file", "C:\\file", "\\file"])
def test_a_marker_names_no_path_of_windows(name, around, tmp_path, monkeypatch):
    """Where backslashes and colons make a path, they are no part of a name."""
    with make_own_folder(around, "out") as own:
        own.create("half").close()
        path = own.path
    with (path / MARKER).open("ab") as marker:
        marker.write(f'"{name}"\n'.replace("\\", "\\\\").encode())
    monkeypatch.setattr(own_folder, "PurePath", PureWindowsPath)
    assert list(find_leftovers(around, "out")) == []
    shutil.rmtree(path)
