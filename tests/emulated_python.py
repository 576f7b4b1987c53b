"""A Python for aarch64 under QEMU, in ``build/aarch64-python``, and tests in it: `make qemu-python`.

python tests/emulated_python.py [ARGUMENTS OF PYTEST]     by default, the contract on the kernel, and calls in Python

Debian's Python and the libraries that it needs, of the release of this machine, and torch from the package index. Both
are kept. The kernel is that of ``build/qemu-aarch64``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "aarch64-python"
KERNEL = ROOT / "build" / "qemu-aarch64" / "native.so"
CALLS = ("calls_of_tensors_refuse_other_arguments", "the_fast_path_gives_the_bits_of_the_validated_path")
CONTRACT = ("tests/contract", *(f"tests/kernels/test_native.py::test_{name}" for name in CALLS), "-k", "native")
"""and functions of Python that the kernel makes"""
TORCH = "torch==2.10.0"
"""whose wheel for aarch64 needs nothing of CUDA; the first that gives tensors to functions of C"""
SYSTEM, SITE, TREE = HOME / "system", HOME / f"site of {TORCH}", HOME / "qkv"
OTHERS = (
    *("numpy", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"),
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers"),
)
"""What torch and the tests import: pip would take what a wheel needs on this machine for what it needs there."""


def make_system() -> None:
    """Unpacks packages of Debian, which a package manager with a state of its own resolves as on an empty machine."""
    state, cache = HOME / "apt" / "state", HOME / "apt" / "cache"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = ["APT::Architecture=arm64", "APT::Architectures=arm64", "Debug::NoLocking=1", "APT::Sandbox::User="]
    settings += [f"Dir::State={state}", f"Dir::State::status={state}/status", f"Dir::Cache={cache}"]
    apt = ["apt-get", "--quiet", "--yes", *(part for setting in settings for part in ("--option", setting))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run(
        [*apt, "install", "--download-only", "--no-install-recommends", "python3", "libstdc++6"],
        check=True,
    )
    unpacked = SYSTEM.with_name("system.partial")
    shutil.rmtree(unpacked, ignore_errors=True)
    for package in sorted((cache / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, unpacked], check=True)
    unpacked.rename(SYSTEM)


def python() -> Path:
    """The interpreter, whose name has its version."""
    (found,) = (path for path in (SYSTEM / "usr/bin").glob("python3.*") if path.suffix[1:].isdigit())
    return found


def make_site() -> None:
    """Wheels for that Python, with the versions of constraints.txt but for torch."""
    unpacked = SITE.with_name("site.partial")
    shutil.rmtree(unpacked, ignore_errors=True)
    constraints = HOME / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")) + "\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", unpacked, "--no-deps"),
            *("--constraint", constraints, "--only-binary", ":all:", "--implementation", "cp"),
            *("--python-version", python().name.removeprefix("python")),
            *("--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64", TORCH, *OTHERS),
        ],
        check=True,
    )
    unpacked.rename(SITE)


def make_tree() -> None:
    """The package and its tests, with the kernel for aarch64."""
    shutil.rmtree(TREE, ignore_errors=True)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", TREE)
    shutil.copy(KERNEL, TREE / "src" / "qkv" / "kernels")


def run(arguments: list[str]) -> int:
    """Runs pytest there, and returns its status."""
    libraries = ":".join(str(SYSTEM / name / "aarch64-linux-gnu") for name in ("lib", "usr/lib"))
    settings = {
        "LD_LIBRARY_PATH": libraries,
        "PYTHONHOME": f"{SYSTEM}/usr",
        "PYTHONPATH": f"{TREE}/src:{SITE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    emulated = ["qemu-aarch64", "-cpu", "max", "-L", str(SYSTEM)]
    emulated += [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    command = [*emulated, str(python()), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=TREE, env={**os.environ, "PYTHONPATH": ""}, check=False).returncode


def main() -> int:
    """Prepares what is not there yet, then runs the tests."""
    missing = [name for name in ("qemu-aarch64", "apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        print(f"emulated_python: needs {', '.join(missing)}: Debian, and its qemu-user.", file=sys.stderr)
        return 1
    if not KERNEL.exists():
        print(f"emulated_python: {KERNEL} is not there; run make build/qemu-aarch64.", file=sys.stderr)
        return 1
    if not SYSTEM.exists():
        make_system()
    if not SITE.exists():
        make_site()
    make_tree()
    return run(sys.argv[1:] or list(CONTRACT))


if __name__ == "__main__":
    sys.exit(main())
