"""Attention over ranks: bytes on the wire against the formulas, times over links, and many ranks by simulation.

python studies/scale_out/run.py            measures (minutes), and writes results.json and the page
python studies/scale_out/run.py --report   rewrites the page and its figures from results.json

It needs Linux, with `unshare`, `ip` and `tc`, and no rights: all happens in networks of its own.
"""

import argparse
import json
import os
import runpy
from pathlib import Path

import report
from measuring import compute, measured
from settings import Settings

HERE = Path(__file__).parent
MACHINE = HERE.parents[1] / "benchmarks" / "harness" / "machine.py"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page and its figures")
    path = HERE / "results.json"
    if not parser.parse_args().report:
        settings = Settings()
        results = {
            "machine": runpy.run_path(str(MACHINE))["describe"](),
            "load": os.getloadavg()[0],
            "settings": settings._asdict(),
            "operations": compute(settings),
            "measured": measured(settings),
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
    report.write(json.loads(path.read_text()), HERE)


if __name__ == "__main__":
    main()
