"""Builds a wheel for Linux that installs on others' machines, and checks it: ``python packaging/wheel.py --help``.

The same commit gives the same bytes, whatever the folder: dates are those of the commit or of SOURCE_DATE_EPOCH, tools
are as in constraints.txt, and what the environment adds to compilers is taken out. The compiler is that of the machine,
so that two machines agree if their compilers do; `qkv --version` names it.
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEWEST_GLIBC = 28
"""A wheel must run on glibc 2.28, the oldest that torch's own wheels for Linux support."""
MOST_BYTES = 5_000_000
CROSS = {"aarch64": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")}
"""For machines other than this one: the compiler that the toolchain file names, and its package in Debian."""
TOOLS = ("build", "auditwheel", "check_wheel_contents")
"""Modules of this Python that are run."""
COMPILER_SETTINGS = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CC", "CXX", "CMAKE_ARGS", "CMAKE_GENERATOR")


class WheelError(Exception):
    """What stands against a wheel: one that cannot be built, or one that is not fit to be published."""


def build(machine: str, out: Path) -> Path:
    """Builds the source distribution, from that a wheel, and writes both to ``out``; returns the wheel.

    Raises:
        WheelError: if a tool fails or finds a fault.
    """
    settings = []
    environment = {name: value for name, value in os.environ.items() if name not in COMPILER_SETTINGS}
    environment["SOURCE_DATE_EPOCH"] = os.environ.get("SOURCE_DATE_EPOCH") or date_of_commit()
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    if machine != platform.machine():
        settings = [f"--config-setting=cmake.define.CMAKE_TOOLCHAIN_FILE={toolchain(machine)}"]
        environment["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    os.umask(0o022)
    out.mkdir(parents=True, exist_ok=True)
    missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
    if missing:  # the kernel compiles for minutes first
        raise WheelError(
            f"needs {' and '.join(missing)}, which this Python lacks; run make wheel, which installs them."
        )
    with tempfile.TemporaryDirectory() as folder:
        run("build", "--outdir", folder, *settings, str(ROOT), environment=environment)
        (sdist,) = Path(folder).glob("*.tar.gz")
        (built,) = Path(folder).glob("*.whl")
        if not any(name.endswith("/native.so") for name in zipfile.ZipFile(built).namelist()):
            raise WheelError("the wheel has no kernel; see what CMake says against the compiler.")
        repaired = Path(folder) / "repaired"
        run(*("auditwheel", "repair", "--patcher", "none", "--plat", "auto"),
            *("--wheel-dir", str(repaired), str(built)), environment=environment)  # fmt: skip
        (wheel,) = repaired.glob("*.whl")
        check(wheel, machine)
        shutil.copy(sdist, out)
        return Path(shutil.copy(wheel, out))


def check(wheel: Path, machine: str) -> None:
    """Raises a WheelError if a wheel is too large, needs a newer glibc, or `check-wheel-contents` finds a fault."""
    needed = [int(minor) for minor in re.findall(rf"manylinux_2_(\d+)_{machine}\b", wheel.name)]
    if min(needed, default=NEWEST_GLIBC + 1) > NEWEST_GLIBC:
        raise WheelError(f"a wheel must run on manylinux_2_{NEWEST_GLIBC}; auditwheel found that it is {wheel.name}.")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        raise WheelError(f"{wheel.name} must have at most {MOST_BYTES:,} bytes; it has {size:,}.")
    run("check_wheel_contents", str(wheel))


def toolchain(machine: str) -> Path:
    """CMake's toolchain file for a machine other than this one, whose compiler is installed."""
    if machine not in CROSS:
        raise WheelError(f"--machine must be {platform.machine()} or one of {', '.join(CROSS)}; got {machine}.")
    compiler, package = CROSS[machine]
    if shutil.which(compiler) is None:
        raise WheelError(f"a wheel for {machine} needs {compiler}; install it, in Debian by apt install {package}.")
    return ROOT / "native" / f"{machine}.cmake"


def date_of_commit() -> str:
    """The date of the last commit, in seconds since 1970."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError("without git, set SOURCE_DATE_EPOCH to the date that files in the wheel shall have.")
    return done.stdout.strip()


def run(module: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs a tool of this Python; raises a WheelError with what it printed if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise WheelError(f"{module} failed:\n{done.stdout}")


def main() -> int:
    """Builds a wheel; prints its path, its size and its hash."""
    parser = argparse.ArgumentParser(description="Build a wheel for Linux, and check it.")
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64; this machine by default")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel and the sdist; dist/")
    arguments = parser.parse_args()
    try:
        if sys.platform != "linux":
            raise WheelError(f"this builds wheels for Linux, on Linux; here, {sys.platform}, cibuildwheel does.")
        wheel = build(arguments.machine, arguments.out)
    except (WheelError, OSError) as error:  # such as an --out that is no folder
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    content = wheel.read_bytes()
    print(f"{wheel}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
