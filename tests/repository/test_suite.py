"""The hooks of conftest.py: no test is skipped silently, and none reaches the network."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SKIPPED_AS_A_WHOLE = "import pytest\npytest.importorskip('no_such_module')\ndef test_lost(): pass\n"

TESTS = """
import socket
import pytest

@pytest.mark.skip(reason="not today")
def test_skipped_for_a_reason_of_its_own(): pass

@pytest.mark.skip(reason="memory is measured in forked processes")
def test_skipped_for_a_reason_that_is_not_true_here(): pass

def test_skipped_inside(): pytest.importorskip("no_such_module")

def test_reaches_out():
    with pytest.raises(OSError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail(): raise AssertionError

def test_reaches_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
"""


def test_unlisted_skips_and_connections_fail(tmp_path: Path) -> None:
    (tmp_path / "test_whole.py").write_text(SKIPPED_AS_A_WHOLE)
    (tmp_path / "test_parts.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "conftest", "--tb=line"]
    command += ["--continue-on-collection-errors", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "COLUMNS": "200"}  # reasons are cut at the width
    shown = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert set(re.findall(r"^([A-Z]+) \S*?::(test_\w+)(?: |$)", shown, re.MULTILINE)) == {
        ("ERROR", "test_skipped_for_a_reason_of_its_own"),
        ("ERROR", "test_skipped_for_a_reason_that_is_not_true_here"),
        ("FAILED", "test_skipped_inside"),
        ("PASSED", "test_reaches_out"),
        ("ERROR", "test_reaches_out"),  # afterwards, since what it calls may swallow the error
        ("XFAIL", "test_expected_to_fail"),
        ("PASSED", "test_reaches_this_machine"),
    }, shown
    assert re.search(r"^ERROR \S*test_whole.py - skipped, for a reason that is", shown, re.MULTILINE), shown
