"""Instructions of the kernel on aarch64, counted under QEMU: what can be known of its speed without such a machine.

python benchmarks/instructions.py     after `make build/qemu-aarch64`: prints, and writes instructions.json

A count is that of one more call in a process: three calls, less two. It is divided by how many multiply-adds of four
numbers (fmla) the two products need, hidden keys not counted. Less than 1 needs instructions that multiply more than
four numbers, or tiles that are not computed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BUILD = HERE.parent / "build/qemu-aarch64"
RESULTS = HERE / "instructions.json"
SYSROOT = "/usr/aarch64-linux-gnu"
ISAS = ("neon", "neonbf16")


class Call(NamedTuple):
    """A forward pass of one thread."""

    name: str
    dtype: str
    keys_dtype: str
    causal: bool
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    most: float
    """instructions for each multiply-add that is needed, at most"""

    def multiply_adds(self) -> float:
        """Of four numbers, in both products."""
        first = self.keys - self.queries
        pairs = sum(first + i + 1 if self.causal else self.keys for i in range(self.queries))
        return self.heads * pairs * 2 * self.width / 4

    def arguments(self, calls: int) -> list[str]:
        return [str(int(field) if isinstance(field, bool) else field) for field in self[1:-1]] + [str(calls)]


_PREFILL = (False, 1, 1, 512, 512, 64)
_DECODE = (False, 8, 2, 1, 4096, 128)
CALLS = [
    Call("prefill", "f32", "f32", *_PREFILL, most=2.1),
    Call("prefill, causal", "f32", "f32", True, 1, 1, 512, 512, 64, most=2.3),
    Call("prefill", "bf16", "bf16", *_PREFILL, most=2.3),
    Call("prefill", "f16", "f16", *_PREFILL, most=2.3),
    Call("decode", "f32", "f32", *_DECODE, most=4.5),
    Call("decode", "bf16", "bf16", *_DECODE, most=4.5),
    Call("decode", "f16", "f16", *_DECODE, most=4.5),
    Call("decode", "bf16", "i8", *_DECODE, most=4.5),
    Call("decode", "f32", "i8", *_DECODE, most=4.5),
]


def build(folder: Path) -> None:
    """The plugin of QEMU and the program that it counts."""
    plugin: list[str | Path] = ["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", folder / "count.so"]
    subprocess.run([*plugin, HERE / "instructions/count.c"], check=True)
    program: list[str | Path] = [
        "aarch64-linux-gnu-g++",
        "-O1",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-I",
        HERE.parent / "native/src",
    ]
    linked: list[str | Path] = [BUILD / "native.so", f"-Wl,-rpath,{BUILD}", "-o", folder / "calls"]
    subprocess.run([*program, HERE / "instructions/calls.cpp", *linked], check=True)


def executed(folder: Path, isa: str, call: Call, calls: int) -> int:
    """Instructions of a process with so many calls."""
    qemu: list[str | Path] = [
        "qemu-aarch64",
        "-cpu",
        "max",
        "-L",
        SYSROOT,
        "-plugin",
        folder / "count.so",
        "-d",
        "plugin",
    ]
    done = subprocess.run(
        [*qemu, folder / "calls", *call.arguments(calls)],
        env=os.environ | {"QKV_ISA": isa},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return int(re.findall(r"^\d+$", done.stdout, re.MULTILINE)[-1])


def main() -> int:
    """Counts, prints and writes. Returns 1 if a call takes more instructions than it may."""
    argparse.ArgumentParser(
        description="Count instructions of the kernel on aarch64; writes instructions.json."
    ).parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        print(f"{'':16} {'q':5} {'k, v':5}" + "".join(f" {isa:>9}" for isa in ISAS) + "   at most")
        for call in CALLS:
            found = {}
            for isa in ISAS:
                instructions = executed(folder, isa, call, 3) - executed(folder, isa, call, 2)
                found[isa] = round(instructions / call.multiply_adds(), 2)
            counts = "".join(f" {found[isa]:9.2f}" for isa in ISAS)
            print(f"{call.name:16} {call.dtype:5} {call.keys_dtype:5}{counts} {call.most:9.1f}", flush=True)
            measured.append({**call._asdict(), "instructions": found})
    version = subprocess.run(["qemu-aarch64", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    compiler = subprocess.run(["aarch64-linux-gnu-g++", "--version"], stdout=subprocess.PIPE, text=True, check=True)
    tools = {"emulator": version.splitlines()[0], "compiler": compiler.stdout.splitlines()[0]}
    RESULTS.write_text(json.dumps({**tools, "calls": measured}, indent=1) + "\n")
    return int(any(count > call["most"] for call in measured for count in call["instructions"].values()))


if __name__ == "__main__":
    sys.exit(main())
