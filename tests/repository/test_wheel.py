"""The wheel: built twice with the same bytes, fit for others' machines, and complete in an environment of its own."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "packaging" / "wheel.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script builds wheels for Linux")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two builds, of which pip and CMake work in folders of their own."""
    built = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for folder in built:
        run(sys.executable, SCRIPT, "--out", folder)
    return built


@pytest.fixture
def wheel(folders: list[Path]) -> Path:
    (found,) = folders[0].glob("*.whl")
    return found


@pytest.mark.long
@pytest.mark.network
def test_two_builds_have_the_same_bytes(folders: list[Path]) -> None:
    files = [sorted(folder.iterdir()) for folder in folders]
    one, other = ([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in each] for each in files)
    assert one == other and len(one) == 2


@pytest.mark.long
@pytest.mark.network
def test_one_wheel_serves_all_pythons_and_old_systems(wheel: Path) -> None:
    assert re.fullmatch(r"qkv-[\d.]+-py3-none-[\w.]*manylinux_2_(1\d|2[0-8])_\w+\.whl", wheel.name)
    assert wheel.stat().st_size <= 5_000_000
    archive = zipfile.ZipFile(wheel)
    tops = {name.split("/")[0] for name in archive.namelist()}
    assert len(tops) == 2 and "qkv" in tops
    assert "qkv/kernels/native.so" in archive.namelist() and "qkv/py.typed" in archive.namelist()
    needed = set(re.findall(rb"GLIBC_2\.(\d+)", archive.read("qkv/kernels/native.so")))
    assert max(map(int, needed)) <= 28


@pytest.mark.long
@pytest.mark.network
def test_the_wheel_works_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which finds torch in this one's; the first example of the README."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, env=environment)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=environment).strip()
    (Path(site) / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # not what is editable there
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    code = f"{example}\nimport qkv; assert qkv.kernels.absence() is None; print(qkv.__file__)"
    assert run(python, "-c", code, cwd=tmp_path, env=environment).splitlines()[-1].startswith(site)
    command = python.with_name("qkv")
    version = run(command, "--version", env=environment)
    assert re.fullmatch(r"qkv \S+ \(torch \S+, kernel \w+, built by (GCC|Clang) [\d.]+\)\n", version)
    report = json.loads(run(command, "bench", "--length", "32", "--rounds", "2", "--json", env=environment))
    assert len(report["mechanisms"]) == 7


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_that_is_too_large_or_for_newer_systems_is_refused(script: ModuleType, tmp_path: Path) -> None:
    newer = tmp_path / "qkv-0.1.0-py3-none-manylinux_2_34_x86_64.whl"
    newer.write_bytes(b"")
    with pytest.raises(script.WheelError, match="a wheel must run on manylinux_2_28; auditwheel found that it is qkv-"):
        script.check(newer, "x86_64")
    large = tmp_path / "qkv-0.1.0-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    large.write_bytes(bytes(5_000_001))
    with pytest.raises(script.WheelError, match="must have at most 5,000,000 bytes; it has 5,000,001"):
        script.check(large, "x86_64")


def test_machines_without_a_compiler_are_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(script.WheelError, match=r"--machine must be \w+ or one of aarch64; got sparc"):
        script.toolchain("sparc")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(script.WheelError, match=r"needs aarch64-linux-gnu-g.*; install it, in Debian by apt"):
        script.toolchain("aarch64")


def test_dates_are_those_of_the_commit(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(script.WheelError, match="without git, set SOURCE_DATE_EPOCH"):
        script.date_of_commit()
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    run("git", "init", "--quiet", tmp_path)
    commit = ("git", "-C", tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    run(*commit, env={**os.environ, **identity, "GIT_COMMITTER_DATE": "1700000000 +0000"})
    assert script.date_of_commit() == "1700000000"


def test_an_output_that_is_no_folder_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # not that of a commit, which a copy lacks
    monkeypatch.setattr("sys.argv", ["wheel.py", "--out", str(taken / "dist")])
    assert script.main() == 1
    assert re.fullmatch(r"wheel: .*Not a directory: '.*/taken/dist'\n", capsys.readouterr().err)
    assert taken.read_text() == "mine"


def test_a_missing_tool_is_named_before_anything_is_built(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(script, "TOOLS", ("hashlib", "no_such_tool"))
    monkeypatch.setattr(script, "run", lambda *command, **options: pytest.fail("was run"))
    with pytest.raises(script.WheelError, match="needs no_such_tool, which this Python lacks; run make wheel"):
        script.build("x86_64", tmp_path)
