"""The kernel's own tests in native/tests, on the library that is installed, once for each instruction set."""

import os
import subprocess
import sys
from pathlib import Path

from qkv.kernels import LIBRARY

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "native-tests"
"""Stays, so that only what has changed is compiled anew."""


def test_the_kernel_passes_its_own_tests() -> None:
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

    run("cmake", "-S", ROOT / "native/tests", "-B", BUILD, "-G", "Ninja", f"-DQKV_LIBRARY={LIBRARY}")
    run("cmake", "--build", BUILD)
    assert "100% tests passed" in run("ctest", "--test-dir", BUILD, "-j2", "--output-on-failure", "--no-tests=error")
