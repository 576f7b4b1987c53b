"""Builds the kernel's own tests in native/tests: before the tests in Python start, in `make test`."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from qkv.kernels import LIBRARY

ROOT = Path(__file__).parents[1]
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


def build() -> None:
    """One process compiles at a time, and those that waited for it find nothing left to do."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT / "native/tests", "-B", BUILD, "-G", "Ninja", f"-DQKV_LIBRARY={LIBRARY}")
        run("cmake", "--build", BUILD)


if __name__ == "__main__":
    build()
