"""The guide to many machines says that its lines are the same under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository.fences import fences

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "many-machines.md"
REPLACED = (
    ('init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)', 'init_process_group("gloo")'),
    ('init_device_mesh("cpu", (1, 1), ', 'init_device_mesh("cpu", (2, 2), '),
)
"""What the page says that one writes instead in several processes."""


@pytest.mark.long
def test_its_code_runs_in_four_processes(tmp_path: Path) -> None:
    code = "\n".join(each.text for each in fences(PAGE.read_text()) if each.language == "python" and not each.reason)
    code = "\n".join(line for line in code.splitlines() if not line.startswith(">>>"))
    for here, there in REPLACED:
        assert code.count(here) == 1
        code = code.replace(here, there)
    lines = [line for line in code.splitlines() if not line.startswith(("(", "torch.Size("))]  # outputs of `>>>`
    script = tmp_path / "guide.py"
    script.write_text("\n".join([*lines, "print('done')"]) + "\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(script)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.count("done") == 4, found.stderr
