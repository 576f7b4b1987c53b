"""Conversion of multi-head to grouped-query attention: its loss, and the effect of uptraining.

python studies/grouped_query/run.py            trains and measures (half an hour), and writes results.json and the page
python studies/grouped_query/run.py --report   rewrites the page and its figure from results.json

results.json is written after each seed; an interrupted run continues with the next one.
"""

import argparse
import json
import runpy
import time
from itertools import product
from pathlib import Path
from typing import Any

import report
import torch
from decoding import decoding
from model import LanguageModel, converted
from settings import Settings
from text import Text, bigram_loss, encode
from training import Training, held_out_loss

from qkv.models.shakespeare import works

HERE = Path(__file__).parent
MACHINE = HERE.parents[1] / "benchmarks" / "harness" / "machine.py"


def study(settings: Settings, text: Text, path: Path) -> None:
    """For each seed, trains a multi-head model, converts and uptrains it with all methods, and writes the results."""
    results = {
        "machine": runpy.run_path(str(MACHINE))["describe"](),
        "settings": settings._asdict(),
        "text": {
            "train_tokens": len(text.train),
            "held_out_tokens": len(text.held_out),
            "bigram_loss": bigram_loss(text),
        },
        "runs": _earlier_runs(path, settings),
    }
    for seed in settings.seeds:
        if seed not in {run["seed"] for run in results["runs"]}:
            results["runs"] += runs_of_seed(settings, text, seed)
            _write(results, path)
    results["decoding"] = decoding(settings)
    _write(results, path)


def runs_of_seed(settings: Settings, text: Text, seed: int) -> list[dict[str, Any]]:
    """The losses of the multi-head model and of all conversions, by percent of uptraining."""
    torch.manual_seed(seed)
    model, start = LanguageModel(settings), time.perf_counter()
    Training(model, text.train, settings, seed).run(range(settings.steps))
    print(f"seed {seed}: {settings.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    runs = []
    # With all KV heads, conversion changes nothing: this is the multi-head model, trained further.
    for heads, how in [(settings.num_heads, "mean"), *product(settings.num_kv_heads, settings.methods)]:
        losses = uptrain(converted(model, heads, how, seed), text, settings, seed)
        runs.append({"seed": seed, "num_kv_heads": heads, "how": how, "losses": losses})
        print(runs[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    return runs


def uptrain(model: LanguageModel, text: Text, settings: Settings, seed: int) -> dict[str, float]:
    """The held-out loss by percent of uptraining (of the steps before conversion)."""
    training, losses, done = Training(model, text.train, settings, seed), {}, settings.steps
    for percent in settings.percents:
        end = settings.steps * (100 + percent) // 100
        training.run(range(done, end))
        losses[str(percent)], done = held_out_loss(model, text.held_out, settings), end
    return losses


def _earlier_runs(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """The runs in results.json, if its settings are the same; else none."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = earlier.get("settings") == json.loads(json.dumps(settings._asdict()))
    return earlier["runs"] if same else []


def _write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page and its figure")
    path = HERE / "results.json"
    if not parser.parse_args().report:
        settings = Settings()
        study(settings, encode(*works(), settings.vocabulary), path)
    report.write(json.loads(path.read_text()), HERE)


if __name__ == "__main__":
    main()
