"""Nothing is written or removed through a link, beyond a mount, or if another process created it."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from convert import kill, models
from convert.folders import kind_of_folder, only_by_descriptor  # noqa: F401  # a fixture for all tests

from qkv.convert import CheckpointError, checkpoint, convert_checkpoint, plan_checkpoint, write_checkpoint
from qkv.convert.files import open_folder, own_folder, renaming, staging
from qkv.convert.files.own_folder import CONTENT, MARKER, PREFIX


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("source"), "llama", num_hidden_layers=1)


@pytest.fixture
def victim(tmp_path):
    """A folder of the user's that must not be touched; it has a config.json, but is not a model."""
    for name in ("victim/deep/precious.txt", "victim/precious.txt", "victim/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path / "victim"


def snapshot(folder):
    """Paths in a folder, with the content of files and the targets of links, without following them."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def leftover_of_killed_run(source, out):
    """The folder that a run leaves if it is killed while writing."""
    before = set(out.parent.iterdir())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_check_shard", lambda *arguments: os.kill(os.getpid(), 9))
        assert not kill.in_child(lambda: convert_checkpoint(source, out, 2))
    (left,) = set(out.parent.iterdir()) - before
    return left


NAMES = ("out.qkv-unfinished", "out.qkv-replaced", f"{PREFIX}{1:016x}", f"{PREFIX}{2:016x}/{CONTENT}")
NAMES += (f"{PREFIX}{3:016x}/{MARKER}",)


@pytest.mark.parametrize("kind", ["link", "folder", "dangling", "loop", "file", "pipe"])
def test_entries_of_others_with_our_names_are_not_touched(tmp_path, source, victim, kind):
    for name in NAMES:
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        if kind == "link":
            place.symlink_to(victim)
        elif kind == "folder":
            shutil.copytree(victim, place)
        elif kind == "dangling":
            place.symlink_to("nowhere")
        elif kind == "loop":
            place.symlink_to(place.name)
        elif kind == "file":
            place.write_text("precious")
        else:
            os.mkfifo(place)
    before = snapshot(tmp_path)
    convert_checkpoint(source, tmp_path / "out", 4)
    convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    shutil.rmtree(tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.fixture
def around(tmp_path):
    with open_folder.open_folder(tmp_path) as opened:
        yield opened


def leftover_without_weights(around):
    """The folder that a run leaves if it is killed before it writes a tensor."""
    with own_folder.make_own_folder(around, "out") as own, own.create("deep/notes.txt"):
        return own.path


def found(around):
    return [left and left.path for left in own_folder.find_leftovers(around, "out")]


def test_folder_with_our_marker_is_recognized(tmp_path, around):
    left = leftover_without_weights(around)
    assert found(around) == [left]
    (left / MARKER).write_text((left / MARKER).read_text() + '"half of a na')
    assert found(around) == [left]
    with own_folder.make_own_folder(around, "out"):
        assert None in found(around)


@pytest.mark.parametrize(
    "change",
    [
        lambda marker, lines: lines[0].update(format="another"),
        lambda marker, lines: lines[0].update(run="0" * 16),
        lambda marker, lines: lines[0].update(purpose="elsewhere"),
        lambda marker, lines: lines[0].update(folder=1),
        lambda marker, lines: lines[0].pop("content"),
        lambda marker, lines: lines.insert(1, "../../victim/precious.txt"),
        lambda marker, lines: lines.insert(1, "/etc/precious"),
        lambda marker, lines: lines.insert(1, {"replaces": 1, "more": 2}),
        lambda marker, lines: lines.insert(1, 7),
        lambda marker, lines: lines.__setitem__(0, []),
        lambda marker, lines: lines.clear(),
    ],
)
def test_folder_with_another_marker_is_not_recognized(tmp_path, around, change):
    marker = leftover_without_weights(around) / MARKER
    lines = [json.loads(line) for line in marker.read_text().splitlines()]
    change(marker, lines)
    marker.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert found(around) == []


def test_folder_of_another_user_is_not_recognized(tmp_path, around, monkeypatch):
    leftover_without_weights(around)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert found(around) == []


def test_copied_or_renamed_folder_is_not_recognized(tmp_path, around):
    left = leftover_without_weights(around)
    shutil.copytree(left, tmp_path / "copy")
    left.rename(tmp_path / "elsewhere")
    (tmp_path / "copy").rename(left)
    (tmp_path / "elsewhere").rename(tmp_path / f"{PREFIX}{0:016x}")
    assert found(around) == []


def test_cleanup_removes_only_files_that_the_run_created(tmp_path, source, victim):
    """A file that the user saved there stays, and so does the target of a link in place of a file."""
    left = leftover_of_killed_run(source, tmp_path / "out")
    made = left / CONTENT / "notes.txt"
    made.unlink()
    made.symlink_to(victim / "precious.txt")
    (left / CONTENT / "thesis.txt").write_text("precious")
    notices = []
    write_checkpoint(plan_checkpoint(source, 2), tmp_path / "out", notify=notices.append)
    assert notices == [f"did not remove {left}: it contains 'new', which qkv did not create"]
    assert snapshot(left / CONTENT) == {"thesis.txt": b"precious"}
    assert len(snapshot(victim)) == 4


def test_cleanup_does_not_follow_links(tmp_path, source, victim):
    with_folder = shutil.copytree(source, tmp_path / "source")
    (with_folder / "deep").mkdir()
    (with_folder / "deep" / "precious.txt").write_text("to be carried over")
    left = leftover_of_killed_run(with_folder, tmp_path / "out")
    shutil.rmtree(left / CONTENT / "deep")
    (left / CONTENT / "deep").symlink_to(victim / "deep")
    notices = []
    write_checkpoint(plan_checkpoint(with_folder, 2), tmp_path / "out", notify=notices.append)
    assert "could not remove" in notices[0]
    assert (victim / "deep" / "precious.txt").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["victim", "nowhere", "out", "source/model.safetensors"])
def test_link_at_the_output_path_is_refused(tmp_path, source, victim, target, overwrite):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "out").symlink_to(target)
    before = snapshot(tmp_path)
    message = f"(out is a link to '{target}'; links are not followed or replaced|must not contain the source)"
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", 2, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_links_in_parent_folders_are_followed(tmp_path, source):
    (tmp_path / "real").mkdir()
    (tmp_path / "short").symlink_to("real")
    convert_checkpoint(source, tmp_path / "short" / "out", 2)
    assert snapshot(tmp_path).keys() >= {"real/out/config.json"}
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["short", "short/out", "real/source/out", "real"])
def test_output_that_overlaps_the_source_through_links_is_refused(tmp_path, source, out):
    shutil.copytree(source, tmp_path / "real" / "source")
    (tmp_path / "short").symlink_to("real/source")
    before = snapshot(tmp_path)
    for name in ("real/source", "short"):
        with pytest.raises(CheckpointError, match="must not contain the source"):
            convert_checkpoint(tmp_path / name, tmp_path / out, 2, overwrite=True)
    assert snapshot(tmp_path) == before


def test_replaced_model_may_contain_links(tmp_path, source, victim):
    """As in the hub's cache; they are removed, their targets are not."""
    convert_checkpoint(source, tmp_path / "out", 4)
    (tmp_path / "out" / "deep").symlink_to(victim / "deep")
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "notes.txt").symlink_to(victim / "precious.txt")
    before = snapshot(victim)
    convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    assert snapshot(victim) == before
    assert not (tmp_path / "out" / "deep").exists()


def test_source_is_read_through_links(tmp_path, source):
    """A snapshot of the hub's cache: each file is a link. Links to folders and dangling links are skipped."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    (tmp_path / "snapshot" / "folder").symlink_to("../blobs")
    (tmp_path / "snapshot" / "nowhere").symlink_to("../blobs/none")
    (tmp_path / "snapshot" / "loop").symlink_to("loop")
    plan = convert_checkpoint(tmp_path / "snapshot", tmp_path / "out", 2)
    convert_checkpoint(source, tmp_path / "plain", 2)
    assert models.digest(tmp_path / "out") == models.digest(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert list(map(str, plan.skipped_links)) == ["folder", "loop", "nowhere"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_dangling_link_in_place_of_a_file_is_refused(tmp_path, source, name):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / name).unlink()
    (copy / name).symlink_to("../blobs/none")
    with pytest.raises(CheckpointError, match=f"{name} is a dangling link to '../blobs/none'"):
        convert_checkpoint(copy, tmp_path / "out", 2)


@only_by_descriptor
def test_parent_folder_that_is_replaced_while_writing_is_an_error(tmp_path, source, victim, monkeypatch):
    """The run writes to the folder that it opened, and raises instead of leaving its result at another path."""
    (tmp_path / "around").mkdir()
    check = checkpoint._check_shard

    def replace(*arguments):
        (tmp_path / "around").rename(tmp_path / "moved")
        (tmp_path / "around").symlink_to(victim)
        check(*arguments)

    monkeypatch.setattr(checkpoint, "_check_shard", replace)
    before = snapshot(victim)
    with pytest.raises(CheckpointError, match="around was moved or replaced by another process meanwhile"):
        convert_checkpoint(source, tmp_path / "around" / "out", 2)
    assert snapshot(victim) == before
    assert not list((tmp_path / "moved").iterdir())


def test_link_planted_in_the_work_folder_is_not_followed(tmp_path, source, victim, monkeypatch):
    """As another process of the same user could."""
    copy_file = checkpoint._copy_file

    def plant(opened, work, name):
        (work.path / CONTENT / name).symlink_to(victim / "precious.txt")
        copy_file(opened, work, name)

    monkeypatch.setattr(checkpoint, "_copy_file", plant)
    before = snapshot(victim)
    with pytest.raises(CheckpointError, match=f"cannot copy .* to .*: {os.strerror(errno.EEXIST)}"):
        convert_checkpoint(source, tmp_path / "out", 2)
    assert snapshot(victim) == before
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


@only_by_descriptor
def test_permissions_follow_the_umask(tmp_path, source, monkeypatch):
    """Private while it is written, then as the umask says."""
    seen, check = [], checkpoint._check_shard

    def look(work, *arguments):
        seen.append(stat.S_IMODE(work.path.stat().st_mode))
        check(work, *arguments)

    monkeypatch.setattr(checkpoint, "_check_shard", look)
    before = os.umask(0o027)
    try:
        convert_checkpoint(source, tmp_path / "out", 2)
    finally:
        os.umask(before)
    assert seen == [0o700]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


@only_by_descriptor
@pytest.mark.parametrize("place", ["out", "out/deep"])
def test_mount_is_neither_replaced_nor_emptied(tmp_path, source, monkeypatch, place):
    """With a patched mount id; the next test makes a real mount where the system allows it."""
    convert_checkpoint(source, tmp_path / "out", 4)
    (tmp_path / "out" / "deep").mkdir()
    (tmp_path / "out" / "deep" / "precious.txt").write_text("")
    mounted, mount = (tmp_path / place).stat().st_ino, open_folder.DescribedFolder.mount

    def counted(folder):
        return (-1, "") if folder.status().st_ino == mounted else mount(folder)

    monkeypatch.setattr(open_folder.DescribedFolder, "mount", counted)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=f"{place}: it is a mount point. Unmount it"):
        convert_checkpoint(source, tmp_path / "out", 2, overwrite=True)
    assert snapshot(tmp_path) == before
    with open_folder.open_folder(tmp_path) as around, pytest.raises(OSError, match="a mount is not entered"):
        around.remove_tree("out")
    assert (tmp_path / "out" / "deep" / "precious.txt").is_file()


@only_by_descriptor
def test_real_mount_is_not_emptied(tmp_path, source):
    """The same folder mounted a second time, on one device, in its own mount namespace."""
    convert_checkpoint(source, tmp_path / "out", 4)
    for name in ("out/deep", "victim"):
        (tmp_path / name).mkdir()
    (tmp_path / "victim" / "precious.txt").write_text("")
    code = f"""
from pathlib import Path
from qkv.convert.files.open_folder import open_folder
around = open_folder(Path({str(tmp_path)!r}))
found = around.open("out").find_mount()
try:
    around.remove_tree("out")
except OSError as error:
    print(found, error.strerror)
"""
    (tmp_path / "remove.py").write_text(code)
    script = f"mount --bind {tmp_path}/victim {tmp_path}/out/deep && exec {sys.executable} {tmp_path}/remove.py"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "unshare" in done.stderr:
        pytest.skip(f"this system does not allow mounting: {done.stderr}")
    assert done.stdout == "deep a mount is not entered\n", done.stderr
    assert (tmp_path / "victim" / "precious.txt").is_file()


@only_by_descriptor
def test_files_are_addressed_relative_to_an_open_folder():
    """The modules that write and remove files use no call that follows links or takes a path."""
    for module in (own_folder, staging, renaming, checkpoint):
        text = Path(module.__file__).read_text()
        for call in ("shutil.rmtree", "shutil.copy", "write_text", "write_bytes", ".mkdir(", ".unlink(", ".rename("):
            found = text.count(call) - text.count(f"os{call}")
            assert found == 0, f"{module.__name__}: {call}"
