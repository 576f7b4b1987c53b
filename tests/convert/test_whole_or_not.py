"""A result appears whole or not at all: kills, full disks, places that must not be written."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from convert import kill, models

from qkv.convert import CheckpointError, checkpoint, convert_checkpoint, plan_checkpoint, write_checkpoint
from qkv.convert.files import staging
from qkv.convert.files.own_folder import OwnFolder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("source"), "llama", shards="60KB")


def test_kills():
    """A few; by hand, ``python tests/convert/kill.py`` does many."""
    script = Path(__file__).with_name("kill.py")
    arguments = [sys.executable, str(script), "--times", "3", "--stride", "67"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") == 6


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while(source, out, module, name, replacing=die, **options):
    """Converts in a process that ends where it comes to a function of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, replacing)
        assert not kill.in_child(lambda: convert_checkpoint(source, out, 2, **options))


def kill_between_renames(source, out):
    """As on a system that cannot exchange two folders."""
    move = staging.move

    def die_second(name, *arguments):
        move(name, *arguments) if name == out.name else die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "exchange", lambda *arguments: False)
        kill_while(source, out, staging, "move", die_second, overwrite=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rerun_removes_what_was_left_and_says_so(tmp_path, source):
    kill_while(source, tmp_path / "out", checkpoint, "_check_shard")
    (left,) = names(tmp_path)
    said = []
    write_checkpoint(plan_checkpoint(source, 2), tmp_path / "out", notify=said.append)
    assert said == [f"removed {left} of an interrupted run"]
    assert names(tmp_path) == ["out"]
    models.load(tmp_path / "out")


def test_what_was_left_for_another_place_stays(tmp_path, source):
    kill_while(source, tmp_path / "out", checkpoint, "_check_shard")
    (left,) = names(tmp_path)
    convert_checkpoint(source, tmp_path / "other", 2)
    assert names(tmp_path) == ["other", left]


def test_old_model_is_removed_by_the_next_run_where_the_new_one_is_in_its_place(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 4)
    kill_while(source, tmp_path / "out", OwnFolder, "remove", overwrite=True)
    assert models.load(tmp_path / "out").config.num_key_value_heads == 2
    assert len(names(tmp_path)) == 2
    convert_checkpoint(source, tmp_path / "out", 4, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_model_that_stood_aside_is_put_back(tmp_path, source, overwrite):
    """And replaced only where that is asked for."""
    convert_checkpoint(source, tmp_path / "out", 4)
    before, said = models.digest(tmp_path / "out"), []
    kill_between_renames(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = lambda: write_checkpoint(
        plan_checkpoint(source, 1), tmp_path / "out", overwrite=overwrite, notify=said.append
    )
    if overwrite:
        run()
        assert models.load(tmp_path / "out").config.num_key_value_heads == 1
    else:
        with pytest.raises(CheckpointError, match="out exists; give another folder, or --overwrite"):
            run()
        assert models.digest(tmp_path / "out") == before
    assert said == [f"restored {tmp_path / 'out'}, which an interrupted run was about to replace"]
    assert names(tmp_path) == ["out"]


def test_model_that_stood_aside_is_kept_where_another_took_its_place(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 4)
    before, said = models.digest(tmp_path / "out"), []
    kill_between_renames(source, tmp_path / "out")
    shutil.copytree(source, tmp_path / "out")
    write_checkpoint(plan_checkpoint(source, 1), tmp_path / "out", overwrite=True, notify=said.append)
    (line,) = said
    assert "/old: it was " in line and f"but {tmp_path / 'out'} exists now" in line
    (old,) = tmp_path.glob("*/old")
    assert models.digest(old) == before


def test_another_run_at_work_is_respected(tmp_path, source, monkeypatch):
    """Here it begins while the first is writing."""
    check, refused = checkpoint._check_shard, []

    def begin_another(*arguments):
        with pytest.raises(
            CheckpointError, match=r"another run is writing .*out; wait for it, or give another"
        ) as told:
            convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
        refused.append(told)
        check(*arguments)

    monkeypatch.setattr(checkpoint, "_check_shard", begin_another)
    convert_checkpoint(source, tmp_path / "out", 2)
    assert refused and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_left(tmp_path, source, monkeypatch, overwrite):
    """A folder, and where one was to be replaced, another in its place at the last moment."""
    out, check, swap = tmp_path / "out", checkpoint._check_shard, staging.exchange
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("kept")

    def appear(*arguments):
        if not out.exists():
            (tmp_path / "theirs").rename(out)
        return check(*arguments)

    def swap_late(*arguments):
        if (tmp_path / "theirs").exists():
            out.rename(tmp_path / "first")
            (tmp_path / "theirs").rename(out)
        return swap(*arguments)

    if overwrite:
        shutil.copytree(source, out)
        monkeypatch.setattr(staging, "exchange", swap_late)
    else:
        monkeypatch.setattr(checkpoint, "_check_shard", appear)
    with pytest.raises(
        CheckpointError, match=r"(out exists|was replaced by another process meanwhile and not touched)"
    ):
        convert_checkpoint(source, out, 2, overwrite=overwrite)
    assert (out / "precious").read_text() == "kept"
    assert names(tmp_path) == (["first", "out"] if overwrite else ["out"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_run_removes_what_it_wrote(tmp_path, source, monkeypatch, error):
    def interrupt(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "_check_shard", interrupt)
    with pytest.raises(error):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_old_model_stays_where_the_new_one_cannot_take_its_place(tmp_path, source, monkeypatch, can_exchange):
    """Neither the renaming nor the disk may fail half-way."""
    convert_checkpoint(source, tmp_path / "out", 4)
    before, around = models.digest(tmp_path / "out"), tmp_path.stat().st_ino
    sync, move = os.fsync, staging.move

    def fail(descriptor):
        if os.fstat(descriptor).st_ino == around:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    def refuse(name, source, new_name, target):
        if new_name == "out" and name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(name, source, new_name, target)

    monkeypatch.setattr(os, "fsync", fail)
    if not can_exchange:
        monkeypatch.setattr(staging, "exchange", lambda *arguments: False)
        monkeypatch.setattr(staging, "move", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Input/output error"):
        convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    assert models.digest(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_disk_that_fills_up(tmp_path, source):
    """A limit on the size of files stands for it: writing stops half-way in a tensor."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write 'model\..*' of model-0.*safetensors in .*: File too large"
        ):
            convert_checkpoint(source, tmp_path / "out", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small_is_told_beforehand(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    needed = plan_checkpoint(source, 2).num_bytes
    with pytest.raises(CheckpointError, match=f"must have {needed} bytes free for the result; got 5"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_bytes_that_read_back_wrong(tmp_path, source, monkeypatch):
    def write_wrong(file, piece):
        file.write(bytes(piece)[:-1] + bytes([bytes(piece)[-1] ^ 1]) if len(piece) == 256 else piece)

    monkeypatch.setattr(checkpoint, "_write_all", write_wrong)
    with pytest.raises(CheckpointError, match=r"read-back mismatch in tensor 'model\.layers"):
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
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed by another process meanwhile"):
        write_checkpoint(plan, tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor '.*' ends too early"):
        write_checkpoint(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("out", [".", "..", "inside", "inside/deeper"])
def test_source_and_result_are_apart(tmp_path, source, out):
    copy = shutil.copytree(source, tmp_path / "a" / "source")
    before = models.digest(copy)
    with pytest.raises(CheckpointError, match="must not contain the source"):
        convert_checkpoint(copy, copy / out, 2, overwrite=True)
    assert models.digest(copy) == before


def test_what_is_no_model_is_not_replaced(tmp_path, source):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for place, fault in (("folder", "it contains no config.json"), ("file", "it is not a folder")):
        with pytest.raises(CheckpointError, match=f"refusing to replace .*{place}: {fault}. Remove it first"):
            convert_checkpoint(source, tmp_path / place, 2, overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", 2, overwrite=True)
    models.load(tmp_path / "empty")


@pytest.mark.parametrize("place", ["none/out", "file/out", "/proc/out"])
def test_places_that_cannot_be_written(tmp_path, source, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError,
        match=r"cannot write .*: (the parent folder .*/(none|file) does not exist|No such file|Read-only|Permission)",
    ):
        convert_checkpoint(source, tmp_path / place, 2)


@pytest.mark.parametrize("refuses", ["access", "mkdir"])
def test_read_only_place(tmp_path, source, monkeypatch, refuses):
    """Told before anything is read, where the system says so; root is told otherwise."""

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, refuses, refuse if refuses == "mkdir" else lambda path, mode: False)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*out: (Read-only file system|the parent folder .* is not writable)"
    ):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not names(tmp_path)
