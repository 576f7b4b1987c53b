"""`describe` and `save`: the machine of a measurement, and its results in one folder per processor."""

import importlib.util
import json
import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv import kernels
from qkv.bench.machine import processor

RESULTS = Path(__file__).parents[1] / "results"


def describe() -> dict[str, Any]:
    """Processor, threads, versions and date."""
    installed = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernel": kernels.absence() or kernels.loaded().isa,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qkv": qkv.__version__,
        **{name: metadata.version(name) for name in installed},
    }


def save(name: str, results: dict[str, Any]) -> None:
    """Writes results/PROCESSOR/NAME.json: the machine and the results."""
    record = {"machine": describe(), **results}
    words = re.sub(r"\(.*?\)|processor", " ", record["machine"]["cpu"].lower())
    folder = RESULTS / ("-".join(re.findall(r"[a-z0-9]+", words)) or "unknown")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
