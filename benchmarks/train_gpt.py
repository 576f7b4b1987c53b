"""The GPT of examples/train.py, trained on qkv's attention and on torch's, step by step in turns.

    python benchmarks/train_gpt.py              measures, prints, and writes results/PROCESSOR/train_gpt.json
    python benchmarks/train_gpt.py --steps 5    fewer steps, printed only

6 layers of 384, 16 sequences of 256 bytes, the same weights and batches. What both leave to torch is most of a step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness import machine

EXAMPLE = Path(__file__).parents[1] / "examples" / "train.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STEPS = 100
TOKENS = 16 * 256
"""of a step"""


def compare(dtype: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step, and the last losses, of each library."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--compare", "--steps", str(steps), "--dtype", DTYPES[dtype], "--save-steps", str(min(steps, 50))]
        subprocess.run([sys.executable, str(EXAMPLE), folder, *options], check=True)
        history = json.loads(Path(folder, "loss.json").read_text())
    return {
        "dtype": dtype,
        "steps": steps,
        "tokens": TOKENS,
        "seconds": {peer: median(seconds) for peer, seconds in history["seconds"].items()},
        "loss": {peer: losses[-1] for peer, losses in history["train"].items()},
        "held_out": {peer: evaluated[-1][1] for peer, evaluated in history["held_out"].items()},
    }


def main() -> None:
    """Measures both dtypes."""
    parser = argparse.ArgumentParser(description="Training on qkv's attention and on torch's.")
    parser.add_argument("--steps", type=int, help=f"steps of training ({STEPS})")
    given = parser.parse_args().steps
    results = [compare(dtype, given or STEPS) for dtype in DTYPES]
    print(json.dumps(results, indent=1))
    if given is None:
        machine.save("train_gpt", {"measurements": results})


if __name__ == "__main__":
    main()
