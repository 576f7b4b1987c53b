"""A result appears whole or not at all: kills, full disks, places that must not be written."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from convert import models

from qkv.convert import CheckpointError, checkpoint, convert_checkpoint, plan_checkpoint, staging, write_checkpoint

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("source"), "llama", shards="60KB")


def test_kills():
    """A few; by hand, ``python tests/convert/kill.py`` does many."""
    script = Path(__file__).with_name("kill.py")
    arguments = [sys.executable, str(script), "--times", "3", "--stride", "31"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") == 4


def test_rerun_says_what_it_found(tmp_path, source):
    convert_checkpoint(source, tmp_path / "old", 4)
    (tmp_path / "old").rename(tmp_path / f"out{staging.REPLACED}")
    (tmp_path / f"out{staging.SUFFIX}" / "deep").mkdir(parents=True)
    (tmp_path / f"out{staging.SUFFIX}" / "model.safetensors").write_text("half")
    said = []
    write_checkpoint(plan_checkpoint(source, 2), tmp_path / "out", overwrite=True, say=said.append)
    assert said == [
        "out.qkv-unfinished was left by an interrupted run; starting over",
        f"{tmp_path / 'out'} was put back, which an interrupted run was about to replace",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    models.load(tmp_path / "out")


def test_model_put_back_is_not_replaced_without_being_told(tmp_path, source):
    convert_checkpoint(source, tmp_path / "old", 4)
    before = models.digest(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / f"out{staging.REPLACED}")
    with pytest.raises(CheckpointError, match="out exists; give another folder, or --overwrite"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert models.digest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_at_work_is_respected(tmp_path, source):
    work = tmp_path / f"out{staging.SUFFIX}"
    work.mkdir()
    (work / "theirs").write_text("kept")
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match=r"another run is writing .*out\.qkv-unfinished; wait for it"):
            convert_checkpoint(source, tmp_path / "out", 2)
    finally:
        os.close(held)
    assert (work / "theirs").read_text() == "kept"


def test_run_that_finishes_while_another_begins(tmp_path, source, monkeypatch):
    """What the second has opened is renamed to the result of the first before it can lock it."""
    work = tmp_path / f"out{staging.SUFFIX}"
    work.mkdir()
    (work / "config.json").write_text("finished")
    lock = fcntl.flock

    def finish_first(descriptor, operation):
        if work.exists():
            work.rename(tmp_path / "out")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(CheckpointError, match="another run is writing"):
        convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_run_removes_what_it_wrote(tmp_path, source, monkeypatch, error):
    def interrupt(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "_check_shard", interrupt)
    with pytest.raises(error):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_old_model_stays_where_the_new_one_cannot_take_its_place(tmp_path, source, monkeypatch):
    convert_checkpoint(source, tmp_path / "out", 4)
    before, rename = models.digest(tmp_path / "out"), Path.rename

    def refuse(self, target):
        if self.name.endswith(staging.SUFFIX):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    assert models.digest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_disk_that_fills_up(tmp_path, source):
    """A limit on the size of files stands for it: writing stops half-way in a tensor."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"model-0.*safetensors: 'model\..*' cannot be written: File too large"
        ):
            convert_checkpoint(source, tmp_path / "out", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small_is_told_beforehand(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    needed = plan_checkpoint(source, 2).num_bytes
    with pytest.raises(CheckpointError, match=f"must have {needed} bytes free for the result; it has 5"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_bytes_that_read_back_wrong(tmp_path, source, monkeypatch):
    def write_wrong(file, piece):
        file.write(bytes(piece)[:-1] + bytes([bytes(piece)[-1] ^ 1]) if len(piece) == 256 else piece)

    monkeypatch.setattr(checkpoint, "_write_all", write_wrong)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers.*' reads back other than it was written"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_writing_goes_on_where_the_system_stops_half_way():
    class Half:
        written = b""

        def write(self, piece):
            self.written += bytes(piece[: max(1, len(piece) // 2)])
            return max(1, len(piece) // 2)

    file = Half()
    checkpoint._write_all(file, b"0123456789")
    assert file.written == b"0123456789"


def test_source_that_changes_meanwhile(tmp_path, source):
    copy = shutil.copytree(source, tmp_path / "source")
    plan = plan_checkpoint(copy, 2)
    shard = next(copy.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed by someone else meanwhile"):
        write_checkpoint(plan, tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor '.*' ends too early"):
        write_checkpoint(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("out", [".", "..", "inside", "inside/deeper"])
def test_source_and_result_are_apart(tmp_path, source, out):
    copy = shutil.copytree(source, tmp_path / "a" / "source")
    before = models.digest(copy)
    with pytest.raises(CheckpointError, match="must be folders apart"):
        convert_checkpoint(copy, copy / out, 2, overwrite=True)
    assert models.digest(copy) == before


def test_what_is_no_model_is_not_replaced(tmp_path, source):
    for place in ("folder", "file", "link"):
        (tmp_path / place).mkdir() if place == "folder" else None
    (tmp_path / "folder" / "thesis.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for place in ("folder", "file", "link"):
        with pytest.raises(CheckpointError, match=f"{place} is not replaced, since it is no folder with a config.json"):
            convert_checkpoint(source, tmp_path / place, 2, overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", 2, overwrite=True)
    models.load(tmp_path / "empty")


@pytest.mark.parametrize("place", ["none/out", "file/out", "/proc/out"])
def test_places_that_cannot_be_written(tmp_path, source, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot be written: (.*/(none|file) must be a folder|No such file|Read-only|Permission)"
    ):
        convert_checkpoint(source, tmp_path / place, 2)


def test_read_only_place(tmp_path, source, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"out\.qkv-unfinished cannot be written: Read-only file system"):
        convert_checkpoint(source, tmp_path / "out", 2)
