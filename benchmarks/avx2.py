"""qkv and torch's SDPA restricted to AVX2, the instruction set of most machines.

python benchmarks/avx2.py     measures in a subprocess, prints, and writes results/PROCESSOR/avx2.json
"""

import argparse
import os
import subprocess
import sys

import torch
from harness import limits, machine
from harness.case import Case
from harness.measurement import measure
from harness.peers import torch_sdpa
from kernel import heading, line

from qkv import kernels

AVX2_ONLY = {
    "QKV_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""Environment variables that the libraries read when they are loaded."""

CASES = [Case("full, 2048", 2048, 2048), Case("causal, 2048", 2048, 2048, "causal")]


def measure_avx2() -> None:
    """Measures; the environment must contain `AVX2_ONLY`."""
    isa, torch_isa = kernels.absence() or kernels.loaded().isa, torch.backends.cpu.get_cpu_capability()
    if (isa, torch_isa) != ("avx2", "AVX2"):
        raise SystemExit(f"Both libraries must run on AVX2; got kernel: {isa}, torch: {torch_isa}.")
    bounds = limits.measure(torch.get_num_threads(), arch="haswell")
    print(heading())
    rows = [measure(case, "fp32", [torch_sdpa]) for case in CASES]
    for row in rows:
        print(line(row, bounds))
    machine.save("avx2", {"limits": bounds, "measurements": [row.as_json() for row in rows]})


if __name__ == "__main__":
    argparse.ArgumentParser(description="qkv and torch's SDPA restricted to AVX2.").parse_args()
    if AVX2_ONLY.items() <= os.environ.items():
        measure_avx2()
    else:
        sys.exit(subprocess.run([sys.executable, __file__], env=os.environ | AVX2_ONLY, check=False).returncode)
