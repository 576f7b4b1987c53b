"""What a measurement ran on, for the record."""

import importlib.util
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import qkv
from qkv import kernels


def describe() -> dict[str, object]:
    """The machine, the versions and the time."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    installed = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernel": kernels.absence() or kernels.loaded().isa,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qkv": qkv.__version__,
        **{name: metadata.version(name) for name in installed},
    }
