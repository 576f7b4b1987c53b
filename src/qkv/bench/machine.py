"""`processor`: the name of the processor, for reports of timings."""

import platform
from pathlib import Path


def processor() -> str:
    """The name of the processor, as the system has it; empty where it has none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
