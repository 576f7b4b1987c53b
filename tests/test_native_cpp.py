"""The kernel's own tests in native/tests, on the library that is installed, once for each instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkv import kernels
from qkv.kernels import binding

ROOT = Path(__file__).parents[1]
LIBRARY = Path(binding.__file__).parent / "native.so"


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_the_kernel_passes_its_own_tests(tmp_path: Path) -> None:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "PATH": tools},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    run("cmake", "-S", ROOT / "native/tests", "-B", tmp_path, "-G", "Ninja", f"-DQKV_LIBRARY={LIBRARY}")
    run("cmake", "--build", tmp_path)
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error")
