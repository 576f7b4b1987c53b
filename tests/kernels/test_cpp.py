"""The kernel's own tests in native/tests, on the library that is installed, once for each instruction set."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkv.kernels import LIBRARY, supported_isas

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "native-tests"
"""Kept, so that only changed files are recompiled."""


def run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built() -> None:
    """One process compiles at a time, and those that waited for it find nothing left to do."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT / "native/tests", "-B", BUILD, "-G", "Ninja", f"-DQKV_LIBRARY={LIBRARY}")
        run("cmake", "--build", BUILD)


# The contract in Python runs on all of them; here, the best does in `make test`.
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.long if i else ()) for i, isa in enumerate(supported_isas())]
)
def test_the_kernel_passes_its_own_tests(built: None, isa: str) -> None:
    found = run("ctest", "--test-dir", BUILD, "-R", f"^{isa}$", "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in found and "Skipped" not in found
