"""The pages of benchmarks/results: each file of results has its table on the page of its machine."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINES = sorted(path.parent.name for path in (BENCHMARKS / "results").glob("*/kernel.json"))
MACHINE = {
    "date": "2026-12-01",
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "isa": "AVX2",
    "kernel": "avx2",
    "torch": "2.13.0",
    "qkv": "0.2.0",
}
LIMITS = {"fp32_gflops": 100.0, "bf16_gflops": None, "read_gb_per_s": 20.0}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("page")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("page", "harness", "grid", "kernel"):
            del sys.modules[name]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_file_of_results_is_on_the_page_of_its_machine(machine: str, page: Any, tmp_path: Path) -> None:
    folder = tmp_path / machine
    shutil.copytree(BENCHMARKS / "results" / machine, folder)
    read = []
    load, page.load = page.load, lambda folder, name: read.append(name) or load(folder, name)
    parts = [part for section in page.SECTIONS for part in section(folder)]
    assert {path.stem for path in folder.glob("*.json")} <= set(read)
    titles = [part.splitlines()[0] for part in parts if part.startswith("## ")]
    assert len(titles) == len(set(titles)) and "## Against its peers" in titles
    for part in parts:
        rows = [line.count(" | ") for line in part.splitlines() if line.startswith("| ")]
        assert len(set(rows)) <= 1, part.splitlines()[0]


def test_a_model_beside_llamacpp(page: Any, tmp_path: Path) -> None:
    seconds = {
        "qkv": {"prefill": 2.0, "step": 0.010},
        "llama.cpp, flash attention": {"prefill": 3.0, "step": 0.015},
        "llama.cpp": {"prefill": 5.0, "step": 0.012},
    }
    one = {"dtype": "bf16", "tokens": 64, "difference": 0.0123, "seconds": seconds}
    record = {"machine": MACHINE, "limits": LIMITS, "llama_cpp_python": "0.3.1", "measurements": [one]}
    (tmp_path / "llamacpp.json").write_text(json.dumps(record))
    heading, table = page.llamacpp_section(tmp_path)
    assert heading.startswith("## SmolLM2-135M-Instruct beside llama.cpp\n") and "llama-cpp-python 0.3.1" in heading
    assert [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")] == [
        *("bf16", "64", "2.00 s", "1.50", "10.0 ms", "1.20", "1.2e-02"),
    ]
    assert page.training_section(tmp_path) == []


def test_training_beside_torch(page: Any, tmp_path: Path) -> None:
    one = {
        "dtype": "fp32",
        "steps": 100,
        "tokens": 4096,
        "seconds": {"qkv": 1.0, "torch": 1.28},
        "loss": {"qkv": 2.5, "torch": 2.5001},
        "held_out": {"qkv": 2.6, "torch": 2.61},
    }
    (tmp_path / "train_gpt.json").write_text(json.dumps({"machine": MACHINE, "measurements": [one]}))
    heading, table = page.training_section(tmp_path)
    assert heading.startswith("## Training a small GPT\n\n2026-12-01, 2 threads on 2 cores of a processor")
    assert [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")] == [
        *("fp32", "100", "3,200", "4,096", "1.28", "2.5001", "2.5000", "2.6100", "2.6000"),
    ]
