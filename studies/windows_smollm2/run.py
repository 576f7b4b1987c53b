"""Windows in SmolLM2-135M: which layers can have one, whether a single pass tells, and what training wins back.

python studies/windows_smollm2/run.py            measures and trains (40 minutes), and writes results.json and the page
python studies/windows_smollm2/run.py --report   rewrites the page and its figures from results.json

results.json is written after each stage: a text with and without sinks, and each model that is trained. An interrupted
run continues with the next one.
"""

import argparse
import json
import runpy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from findings import half_of
from measuring import measured
from settings import Settings
from training import trained
from transformers.utils import logging

from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.language_model import load
from qkv.models.model_folder import unpack_gguf
from qkv.models.progress import Progress
from qkv.models.shakespeare import works
from qkv.models.source import gguf_source

HERE = Path(__file__).parent
MACHINE = HERE.parents[1] / "benchmarks" / "harness" / "machine.py"
SECOND = "THE TEMPEST"
"""The words with which the second of the held-out works begins."""


def study(settings: Settings, path: Path) -> None:
    """All stages that results.json does not have yet."""
    results = {"machine": runpy.run_path(str(MACHINE))["describe"](), "settings": settings._asdict()}
    results |= earlier(path, settings)
    save = partial(write, results, path)
    train, held_out = works()
    weights, progress = cached_weights(SMOLLM2_135M, Progress()), Progress()
    measure(results, load(gguf_source(weights), torch.float32, progress), texts_of(held_out), settings, save)
    with tempfile.TemporaryDirectory(prefix="qkv-study-") as name:
        folder = Path(name)
        if len(results["trained"]) < 3:
            original = unpack_gguf(weights, folder / "original", progress)
            text = folder / "text.txt"
            text.write_text(train[: 19 * settings.held_out] + held_out[: settings.held_out], encoding="utf-8")
            trained(original, folder, text, half_of(results), settings, results["trained"], save)


def measure(results: dict[str, Any], loaded: Any, texts: dict[str, str], settings: Settings, save: Any) -> None:
    """Screens and prices, on each text, with each number of sinks."""
    for name, text in texts.items():
        token_ids = loaded.tokenizer(text[: 8 * settings.tokens], return_tensors="pt").input_ids[:, : settings.tokens]
        for sinks in settings.sinks:
            stage = f"{name}, {sinks}"
            if stage not in results["measured"]:
                results["measured"][stage] = measured(loaded.model, token_ids, sinks, settings)
                save()
                print(stage, results["measured"][stage]["price"], flush=True)


def texts_of(held_out: str) -> dict[str, str]:
    """The two held-out works, apart."""
    at = held_out.index(SECOND)
    return {"King Lear": held_out[:at], "The Tempest": held_out[at:]}


def earlier(path: Path, settings: Settings) -> dict[str, Any]:
    """The stages in results.json, if its settings are the same; else none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = found.get("settings") == json.loads(json.dumps(settings._asdict()))
    return {name: found[name] if same else {} for name in ("measured", "trained")}


def write(results: dict[str, Any], path: Path) -> None:
    """Writes results.json."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page and its figures")
    path = HERE / "results.json"
    if not parser.parse_args().report:
        logging.set_verbosity_error()
        study(Settings(), path)
    report.write(json.loads(path.read_text()), HERE)


if __name__ == "__main__":
    main()
