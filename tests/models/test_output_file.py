"""Files that commands write: whole or not at all, and never over another without being told to."""

import os
import stat
from pathlib import Path

import pytest

from qkv.models.errors import CommandError
from qkv.models.output_file import check_output, write_output


def test_it_is_written_with_the_permissions_of_new_files(tmp_path: Path) -> None:
    file, other = tmp_path / "page.html", tmp_path / "other"
    other.write_text("")
    write_output(file, "größer", overwrite=False)
    assert file.read_bytes() == "größer".encode()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "page.html"]


def test_what_is_there_is_replaced_only_if_told_to(tmp_path: Path) -> None:
    file, kept, link = tmp_path / "page.html", tmp_path / "kept.html", tmp_path / "link.html"
    file.write_text("old")
    kept.write_text("kept")
    link.symlink_to(kept)
    for path in (file, link):
        for act in (lambda p: check_output(p, overwrite=False), lambda p: write_output(p, "new", overwrite=False)):
            with pytest.raises(CommandError, match=rf"--out: {path} exists; give another name, or --overwrite"):
                act(path)
        write_output(path, "new", overwrite=True)
        assert path.read_text() == "new" and not path.is_symlink()
    assert kept.read_text() == "kept"
    dangling = tmp_path / "dangling.html"
    dangling.symlink_to(tmp_path / "none")
    with pytest.raises(CommandError, match="exists"):
        write_output(dangling, "new", overwrite=False)


def test_devices_and_links_of_the_system_stay(tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    out.symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    to_pipe = tmp_path / "link"
    to_pipe.symlink_to(pipe)
    for path in (pipe, out, to_pipe):
        for act in (check_output, lambda p, overwrite: write_output(p, "new", overwrite)):
            with pytest.raises(CommandError, match="must be a file; it is a device or leads to one"):
                act(path, overwrite=True)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and out.is_symlink() and to_pipe.is_symlink()
    with pytest.raises(CommandError, match="- must be the name of a file"):
        check_output(Path("-"), overwrite=True)


def test_a_file_made_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fsync = tmp_path / "page.html", os.fsync

    def make_it(descriptor: int) -> None:
        fsync(descriptor)
        file.write_text("theirs")

    monkeypatch.setattr(os, "fsync", make_it)
    with pytest.raises(CommandError, match="exists"):
        write_output(file, "ours", overwrite=False)
    assert file.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_nothing_is_left_of_a_text_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    with pytest.raises(UnicodeEncodeError):
        write_output(file, "x" * 100_000 + "\ud800", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="must be a file; it is a folder"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(CommandError, match="does not exist; make it first"):
        check_output(tmp_path / "none" / "page.html", overwrite=True)
