"""A hundred random shapes: qkv with ``backend="auto"`` against torch's SDPA.

    python benchmarks/grid.py          measures, prints slow shapes, and writes results/PROCESSOR/grid.json
    python benchmarks/grid.py draw     draws new shapes into benchmarks/grid.json

Shapes are random, so that they are not hand-picked, and stored, so that runs are comparable.
"""

import argparse
import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import machine
from harness.case import DTYPES, Case
from harness.measurement import Measurement, measure
from harness.peers import torch_sdpa

SHAPES = Path(__file__).parent / "grid.json"
SEED = 20261124
COUNT = 100
ROUNDS = 9
SLOW = 0.95
"""Shapes below this ratio of torch's speed are printed."""

MAX_WORK = 6e9
"""Limit of scores * head_dim, so that torch finishes."""
LONGEST = 8192
HEADS = [(8, 8), (8, 2), (8, 1), (12, 12), (16, 4), (32, 8), (32, 32), (9, 3), (6, 1), (14, 2), (10, 2)]
HEAD_DIMS = [32, 64, 64, 80, 96, 128, 128, 256, 40, 72, 100, 37]


def draw() -> list[dict[str, Any]]:
    """Draws the shapes: fields of a `Case`, and a dtype."""
    choose = random.Random(SEED)
    shapes: list[dict[str, Any]] = []
    while len(shapes) < COUNT:
        lk = _log_uniform(choose, 1, LONGEST)
        lq = choose.choice([1, lk, lk, _log_uniform(choose, 1, lk)])
        heads, kv_heads = choose.choice(HEADS)
        head_dim, batch = choose.choice(HEAD_DIMS), choose.randint(1, 4)
        kind = choose.choice(["full", "causal", "window", "padding"])
        window = _log_uniform(choose, 1, lk) if kind == "window" else None
        dtype = choose.choice(list(DTYPES))
        if batch * heads * lq * lk * head_dim > MAX_WORK:
            continue
        mask: Any = "causal" if kind == "window" else kind
        case = Case(f"{len(shapes)}", lq, lk, mask, window, batch, heads, kv_heads, head_dim)
        shapes.append({"case": asdict(case), "dtype": dtype})
    return shapes


def _log_uniform(choose: random.Random, least: int, most: int) -> int:
    return round(math.exp(choose.uniform(math.log(least), math.log(most))))


def describe(row: Measurement) -> str:
    """A line with a shape and its ratio."""
    case = row.case
    mask = case.mask if case.window is None else f"window {case.window}"
    shape = f"{case.batch} x {case.heads} on {case.kv_heads} heads of {case.head_dim}, {case.lq} x {case.lk}"
    return f"{row.ratio('torch'):5.2f}  {case.name:>3}  {row.dtype} {mask:<12} {shape:<46} {row.backend}"


def main() -> None:
    """Draws the shapes or measures them."""
    parser = argparse.ArgumentParser(description="A hundred random shapes: qkv against torch's SDPA.")
    parser.add_argument("what", nargs="?", choices=["draw"], help="draw new shapes instead of measuring")
    if parser.parse_args().what == "draw":
        lines = ",\n".join(map(json.dumps, draw()))
        SHAPES.write_text(f"[\n{lines}\n]\n")
        return
    rows = []
    for shape in json.loads(SHAPES.read_text()):
        row = measure(Case(**shape["case"]), shape["dtype"], [torch_sdpa], ROUNDS)
        rows.append(row)
        print(describe(row), flush=True)
    ratios = {row.case.name: row.ratio("torch") or math.nan for row in rows}
    slow = [row for row in rows if ratios[row.case.name] < SLOW]
    print(f"\nBelow {SLOW}:", *(map(describe, slow) if slow else ["none"]), sep="\n")
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    print(f"\nGeometric mean of {len(ratios)} shapes: {mean:.2f} times torch's speed.")
    record = {
        "geometric_mean": round(mean, 3),
        "slow": SLOW,
        "measurements": [row.as_json() for row in rows],
    }
    machine.save("grid", record)


if __name__ == "__main__":
    main()
