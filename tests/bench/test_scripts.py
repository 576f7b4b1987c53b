"""Scripts in benchmarks: what they cannot do is refused, not ignored."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_instructions_are_counted_for_all_calls_or_none() -> None:
    command = [sys.executable, str(BENCHMARKS / "instructions.py"), "decode"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unrecognized arguments: decode" in done.stderr


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_read_their_arguments(script: Path) -> None:
    source = script.read_text()
    assert "parse_args()" in source or "sys.argv" in source
