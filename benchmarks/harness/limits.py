"""`measure`: the peak arithmetic and memory bandwidth of the machine, measured by limits.cpp."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TypedDict

SOURCE = Path(__file__).with_suffix(".cpp")


class Limits(TypedDict):
    """Peaks with all threads; None where not measured or not supported by the instruction set."""

    fp32_gflops: float | None
    bf16_gflops: float | None
    read_gb_per_s: float | None


UNKNOWN: Limits = {"fp32_gflops": None, "bf16_gflops": None, "read_gb_per_s": None}


def measure(threads: int, arch: str = "native") -> Limits:
    """Peak FMA rate in fp32, peak dot-product rate in bf16, and read bandwidth.

    Args:
        threads: number of threads.
        arch: the instruction set, for the compiler's ``-march``.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        print("The limits of this machine are not measured: no C++ compiler found (c++, g++, clang++ or $CXX).")
        return UNKNOWN
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        options = ("-std=c++17", "-O3", f"-march={arch}", "-pthread")
        built = subprocess.run([compiler, *options, SOURCE, "-o", program], capture_output=True, text=True, check=False)
        if built.returncode:
            print(f"The limits of this machine are not measured: {compiler} fails on {SOURCE.name}.\n{built.stderr}")
            return UNKNOWN
        run = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
    limits: Limits = json.loads(run.stdout)
    return limits


def larger(a: Limits, b: Limits) -> Limits:
    """The larger of two measurements of each limit: other load on the machine can only lower it."""

    def of(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else max(x, y)

    return {
        "fp32_gflops": of(a["fp32_gflops"], b["fp32_gflops"]),
        "bf16_gflops": of(a["bf16_gflops"], b["bf16_gflops"]),
        "read_gb_per_s": of(a["read_gb_per_s"], b["read_gb_per_s"]),
    }
