"""What a review says of the seven attention mechanisms, measured sentence by sentence.

python studies/the_review/run.py            measures (two minutes), and writes results.json, the page and its figures
python studies/the_review/run.py --report   rewrites the page and its figures from results.json
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import report
import torch
from heads import between, shared_heads
from layers import causal, cross, multi_head
from scores import scaled_dot_product
from settings import Settings
from windows import sliding_window

HERE = Path(__file__).parent
HARNESS = HERE.parents[1] / "benchmarks" / "harness"


def study(settings: Settings) -> dict[str, Any]:
    """All measurements, by mechanism."""
    return {
        "machine": runpy.run_path(str(HARNESS / "machine.py"))["describe"](),
        "limits": limits(),
        "settings": settings._asdict(),
        "scaled dot-product": scaled_dot_product(settings),
        "multi-head": multi_head(),
        "cross": cross(),
        "causal": causal(),
        "sliding-window": sliding_window(settings),
        "multi-query": shared_heads(settings),
        "grouped-query": between(settings),
    }


def limits() -> dict[str, float | None]:
    """The arithmetic and the memory of this machine at their best."""
    found: dict[str, float | None] = runpy.run_path(str(HARNESS / "limits.py"))["measure"](torch.get_num_threads())
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page and its figures")
    path = HERE / "results.json"
    if not parser.parse_args().report:
        path.write_text(json.dumps(study(Settings()), indent=1) + "\n")
    report.write(json.loads(path.read_text()), HERE)


if __name__ == "__main__":
    main()
