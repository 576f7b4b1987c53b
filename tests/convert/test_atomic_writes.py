"""Results are written atomically: kills, full disks, and outputs that must not be written."""

import errno
import os
import resource
import shutil
import signal

import pytest
from convert import kill, models
from convert.folders import kind_of_folder, only_by_descriptor  # noqa: F401  # a fixture for all tests

from qkv.convert import CheckpointError, checkpoint, convert_checkpoint, plan_checkpoint, write_checkpoint
from qkv.convert.files import staging
from qkv.convert.files.own_folder import OwnFolder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("source"), "llama", shards="60KB")


def test_killed_runs_leave_a_whole_model_or_none():
    """A few kills; ``python tests/convert/kill.py`` makes many."""
    assert len(list(kill.reports(times=3, stride=101, seed=0))) == 6


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while(source, out, module, name, replacing=die, **options):
    """Converts in a process that is killed when it calls ``module.name``."""
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


def test_rerun_removes_leftovers_and_reports_them(tmp_path, source):
    kill_while(source, tmp_path / "out", checkpoint, "_check_shard")
    (left,) = names(tmp_path)
    notices = []
    write_checkpoint(plan_checkpoint(source, 2), tmp_path / "out", notify=notices.append)
    assert notices == [f"removed {left} of an interrupted run"]
    assert names(tmp_path) == ["out"]
    models.load(tmp_path / "out")


def test_leftovers_of_another_output_stay(tmp_path, source):
    kill_while(source, tmp_path / "out", checkpoint, "_check_shard")
    (left,) = names(tmp_path)
    convert_checkpoint(source, tmp_path / "other", 2)
    assert names(tmp_path) == ["other", left]


def test_replaced_model_is_removed_by_the_next_run(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 4)
    kill_while(source, tmp_path / "out", OwnFolder, "remove", overwrite=True)
    assert models.load(tmp_path / "out").config.num_key_value_heads == 2
    assert len(names(tmp_path)) == 2
    convert_checkpoint(source, tmp_path / "out", 4, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_model_moved_aside_is_restored(tmp_path, source, overwrite):
    """And replaced only with ``overwrite``."""
    convert_checkpoint(source, tmp_path / "out", 4)
    before, notices = models.digest(tmp_path / "out"), []
    kill_between_renames(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = lambda: write_checkpoint(
        plan_checkpoint(source, 1), tmp_path / "out", overwrite=overwrite, notify=notices.append
    )
    if overwrite:
        run()
        assert models.load(tmp_path / "out").config.num_key_value_heads == 1
    else:
        with pytest.raises(CheckpointError, match="out exists; give another folder, or --overwrite"):
            run()
        assert models.digest(tmp_path / "out") == before
    assert notices == [f"restored {tmp_path / 'out'}, which an interrupted run was about to replace"]
    assert names(tmp_path) == ["out"]


def test_model_moved_aside_is_kept_if_the_output_exists(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 4)
    before, notices = models.digest(tmp_path / "out"), []
    kill_between_renames(source, tmp_path / "out")
    shutil.copytree(source, tmp_path / "out")
    write_checkpoint(plan_checkpoint(source, 1), tmp_path / "out", overwrite=True, notify=notices.append)
    (line,) = notices
    assert "/old: it was " in line and f"but {tmp_path / 'out'} exists now" in line
    (old,) = tmp_path.glob("*/old")
    assert models.digest(old) == before


def test_concurrent_run_to_the_same_output_is_refused(tmp_path, source, monkeypatch):
    """The second run begins while the first is writing."""
    check, refused = checkpoint._check_shard, []

    def begin_another(*arguments):
        with pytest.raises(
            CheckpointError, match=r"another run is writing .*out; wait for it, or give another"
        ) as raised:
            convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
        refused.append(raised)
        check(*arguments)

    monkeypatch.setattr(checkpoint, "_check_shard", begin_another)
    convert_checkpoint(source, tmp_path / "out", 2)
    assert refused and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_created_by_another_process_is_not_touched(tmp_path, source, monkeypatch, overwrite):
    """A new folder, or with ``overwrite`` another one in place of the old model at the last moment."""
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


@only_by_descriptor
@pytest.mark.parametrize("can_exchange", [True, False])
def test_old_model_stays_if_it_cannot_be_replaced(tmp_path, source, monkeypatch, can_exchange):
    """An I/O error while renaming or syncing."""
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


def test_full_disk_leaves_nothing(tmp_path, source):
    """Simulated by a limit on file sizes: writing stops within a tensor."""
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


def test_too_little_disk_space_is_an_error_before_writing(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    needed = plan_checkpoint(source, 2).num_bytes
    with pytest.raises(CheckpointError, match=f"must have {needed} bytes free for the result; got 5"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_read_back_mismatch_is_an_error(tmp_path, source, monkeypatch):
    def write_wrong(file, piece):
        file.write(bytes(piece)[:-1] + bytes([bytes(piece)[-1] ^ 1]) if len(piece) == 256 else piece)

    monkeypatch.setattr(checkpoint, "_write_all", write_wrong)
    with pytest.raises(CheckpointError, match=r"read-back mismatch in tensor 'model\.layers"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_partial_writes_are_continued():
    class Half:
        written = b""

        def write(self, piece):
            self.written += bytes(piece[: max(1, len(piece) // 2)])
            return max(1, len(piece) // 2)

    file = Half()
    checkpoint._write_all(file, b"0123456789")
    assert file.written == b"0123456789"


def test_source_that_changes_while_converting_is_an_error(tmp_path, source):
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
def test_output_that_overlaps_the_source_is_refused(tmp_path, source, out):
    copy = shutil.copytree(source, tmp_path / "a" / "source")
    before = models.digest(copy)
    with pytest.raises(CheckpointError, match="must not contain the source"):
        convert_checkpoint(copy, copy / out, 2, overwrite=True)
    assert models.digest(copy) == before


def test_only_a_model_or_an_empty_folder_is_replaced(tmp_path, source):
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
def test_unwritable_outputs_are_refused(tmp_path, source, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError,
        match=r"cannot write .*: (the parent folder .*/(none|file) does not exist|No such file|Read-only|Permission)",
    ):
        convert_checkpoint(source, tmp_path / place, 2)


@pytest.mark.parametrize("refuses", ["access", "mkdir"])
def test_read_only_output_is_refused(tmp_path, source, monkeypatch, refuses):
    """Checked before anything is read; for root, ``access`` succeeds and ``mkdir`` fails."""

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, refuses, refuse if refuses == "mkdir" else lambda path, mode: False)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*out: (Read-only file system|the parent folder .* is not writable)"
    ):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert not names(tmp_path)
