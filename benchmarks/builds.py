"""Compares two builds of the kernel, interleaved in one process.

    python benchmarks/builds.py BEFORE.so AFTER.so [NAME ...] [--dtype fp32] [--rounds N]

Measures the cases of kernel.py whose name contains a NAME (default: all) and prints both times. A build is a copy of
src/qkv/kernels/native.so. On a shared machine, only interleaved runs resolve differences of 10%.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from harness.case import DTYPES, Case
from harness.measurement import ROUNDS
from kernel import CASES

from qkv import kernels
from qkv.bench.attention_call import qkv_call
from qkv.bench.timing import interleaved


def load(path: Path) -> kernels.Library:
    """Loads a build of the kernel."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist. Give two copies of src/qkv/kernels/native.so.")
    library = kernels.load(path)
    if isinstance(library, str):
        raise SystemExit(f"{path}: {library}.")
    return library


def compare(libraries: dict[str, kernels.Library], case: Case, dtype: str, rounds: int) -> str:
    """Measures one case; returns a line of the table."""
    q, k, v = case.inputs(DTYPES[dtype])
    call = qkv_call(q, k, v, case.as_mask(), case.offset)

    def with_library(library: kernels.Library) -> Callable[[], object]:
        def run() -> object:
            with kernels.use(library):
                return call()

        return run

    times = interleaved({name: with_library(library) for name, library in libraries.items()}, rounds=rounds)
    before, after = (times[name]["median_us"] for name in libraries)
    spreads = [f"{found['low_us']:.0f}-{found['high_us']:.0f}" for found in times.values()]
    return f"{case.name:<46} {before:>10.0f} {spreads[0]:>17} {after:>10.0f} {spreads[1]:>17} {after / before:>7.3f}"


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description="Compares two builds of the kernel.")
    parser.add_argument("before", type=Path, help="a native.so")
    parser.add_argument("after", type=Path, help="another native.so")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="measure the cases whose name contains it; all by default"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp32 by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measurements of each ({ROUNDS}), at least 2")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles; got {arguments.rounds}.")
    libraries = {"before": load(arguments.before), "after": load(arguments.after)}
    print(f"{'case':<46} {'before us':>10} {'quartiles':>17} {'after us':>10} {'quartiles':>17} {'ratio':>7}")
    for case in CASES:
        if not arguments.names or any(name in case.name for name in arguments.names):
            print(compare(libraries, case, arguments.dtype, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
