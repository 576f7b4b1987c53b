"""The range in pyproject.toml is what is tested: the oldest and the newest release of each in it.

`python tests/releases.py` makes an environment for each under ``build/releases``, with everything else as in
``constraints.txt``, and runs there what touches the other library. `python tests/releases.py torch` runs the two
releases of torch, `python tests/releases.py torch==2.9.0` a single one, and `python tests/releases.py torch --nightly
INDEX` the newest build of torch that an index of its nightly builds has.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELEASES = ROOT / "build" / "releases"

TESTS = {
    "torch": [
        "tests/repository/test_private_names.py",  # first: it names what is gone
        *(
            "tests/contract/test_grid.py",
            "tests/test_functional.py",
            "tests/layers/test_layers.py",
            "tests/test_masks.py",
        ),
        *("tests/layers/test_step.py", "tests/layers/test_projection.py", "tests/layers/test_rotary.py"),
        *(f"tests/kernels/test_{name}.py" for name in ("linear", "rotation", "rms_norm", "gated_mlp")),
        *(
            "tests/cache/test_buffer.py",
            "tests/cache/test_compiled.py",
            "tests/test_export.py",
            "tests/test_tracing.py",
            "tests/mechanisms",
        ),
        "tests/integrations/transformers/test_compiled.py",  # which reads what Dynamo knows
        *("tests/integrations/torch/test_accelerate.py", "tests/integrations/torch/test_varlen.py", "tests/upstream"),
    ],
    "transformers": [
        "tests/repository/test_private_names.py",
        *("tests/integrations/transformers", "tests/test_tracing.py", "tests/families", "tests/upstream"),
        *(f"tests/convert/test_{name}.py" for name in ("families", "encoder_decoder", "windows")),
    ],
    "matplotlib": ["tests/plots"],
}
"""What runs on another release of each."""


def ends(package: str) -> list[str]:
    """The first release that pyproject.toml admits, and the last one that the index has."""
    found = re.search(rf'"{package}>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise SystemExit(f"releases: pyproject.toml must give {package} as a range, '{package}>=A.B,<C'.")
    first, limit = found.groups()
    return [f"{package}=={first}.0", f"{package}>={first},<{limit}"]


def prepare(requirement: str, options: tuple[str, ...]) -> Path:
    """The Python of an environment with qkv, this release, and everything else as in constraints.txt.

    ``options`` are more of pip's.
    """
    folder = RELEASES / re.sub(r"[^\w.]+", "-", requirement)
    python = folder / "bin" / "python"
    package = re.split(r"\W", requirement, maxsplit=1)[0]
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in pinned if not re.match(rf"{package}\W", line)))
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), "--upgrade", *options]
    subprocess.run([*install, requirement, "setuptools", f"{ROOT}[dev]"], check=True)
    return python


def run(requirement: str, options: tuple[str, ...] = ()) -> bool:
    """Whether the tests pass on a release."""
    python = prepare(requirement, options)
    package = re.split(r"\W", requirement, maxsplit=1)[0]
    version = f"import importlib.metadata as m; print('{package}', m.version('{package}'), flush=True)"
    subprocess.run([str(python), "-c", version], check=True)
    # What another release calls deprecated is an error with the pinned one, where it can be mended.
    warnings = ["-W", "default::DeprecationWarning", "-W", "default::FutureWarning"]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *warnings, *TESTS[package]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}).returncode == 0


def main() -> None:
    """Runs all that are asked for, all without arguments, and exits with 1 where one fails."""
    if sys.argv[1:3] == ["torch", "--nightly"] and len(sys.argv) == 4 and sys.argv[3]:
        sys.exit(not run(ends("torch")[1], ("--pre", "--extra-index-url", sys.argv[3])))
    if "--nightly" in sys.argv:
        raise SystemExit("releases: it must be `torch --nightly INDEX`, with the address of an index.")
    arguments = sys.argv[1:] or [*TESTS]
    wanted = [release for argument in arguments for release in (ends(argument) if argument in TESTS else [argument])]
    failed = [requirement for requirement in wanted if not run(requirement)]
    print("failed: " + ", ".join(failed) if failed else f"all of {', '.join(wanted)} pass")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
