"""SmolLM2-135M with one key/value head: converted, trained for a few minutes, and measured.

python studies/multi_query_smollm2/run.py [--minutes 5]   measures, and writes results.json and README.md
python studies/multi_query_smollm2/run.py --report        writes README.md from results.json
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qkv.bench.timing import interleaved
from qkv.cli import main as qkv
from qkv.cli.reports.layers import kv_bytes
from qkv.convert import inspect_checkpoint, measure_divergence
from qkv.integrations.transformers import QKVCache
from qkv.integrations.transformers.attention import register
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.model_folder import unpack_gguf
from qkv.models.progress import Progress
from qkv.models.shakespeare import works

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QKV = (sys.executable, "-c", "import sys; sys.argv[0] = 'qkv'; from qkv.cli import main; sys.exit(main())")
"""The command in a process of its own, which gives its memory back."""
MACHINE = ROOT / "benchmarks" / "harness" / "machine.py"

HELD_OUT = 60_000
"""Held-out characters; 19 times as many are trained on, since qkv uptrain holds out the last 1/20."""
TRAINING = ("--bf16", "--learning-rate", "3e-4", "--batch", "4", "--block", "256")
ORIGINAL = "original"
METHODS = ("mean", "aligned")
PROMPT = "KING.\nMy lords, what news is this from France? Speak, for"
NEW_TOKENS = 40
DIVERGENCE_TOKENS = 512
CONTEXT = 4096


def study(folder: Path, minutes: float) -> dict[str, Any]:
    """Converts with each method, trains the original and all conversions for equally many steps, and measures."""
    folders = {ORIGINAL: folder / ORIGINAL}
    progress = Progress()
    unpack_gguf(cached_weights(SMOLLM2_135M, progress), folders[ORIGINAL], progress)
    for how in METHODS:
        folders[how] = folder / how
        if qkv(["convert", str(folders[ORIGINAL]), str(folders[how]), "--kv-heads", "1", "--pool", how]):
            raise SystemExit(1)
    train, held_out = works()
    text = folder / "text.txt"
    text.write_text(train[: 19 * HELD_OUT] + held_out[:HELD_OUT], encoding="utf-8")
    models, length = {}, ("--minutes", str(minutes))
    # A conversion goes first: its number of steps in the given time applies to all.
    for name in (*METHODS, ORIGINAL):
        report = uptrain(folders[name], text, folder / f"{name}-uptrained", length)
        length = ("--max-steps", str(report["steps"]))
        models[name] = report | {
            "texts": [sample(folders[name]), sample(folder / f"{name}-uptrained")],
            "kv_bytes_per_token": kv_bytes(inspect_checkpoint(folders[name]), 1, 1, 4),
            "divergence": divergence(folders[ORIGINAL], folders[name], held_out),
        }
        print(name, models[name], flush=True)
    return {
        "machine": runpy.run_path(str(MACHINE))["describe"](),
        "minutes": minutes,
        "training": " ".join(TRAINING),
        "models": models,
        "context": CONTEXT,
        "decoding": decoding({name: folders[name] for name in (ORIGINAL, METHODS[0])}),
    }


def uptrain(model: Path, text: Path, out: Path, length: tuple[str, str]) -> dict[str, Any]:
    """Runs qkv uptrain in a subprocess and returns its report."""
    command = [*QKV, "uptrain", model, text, out, *TRAINING, *length, "--save-steps", "1000000"]
    subprocess.run(list(map(str, command)), check=True)
    report: dict[str, Any] = json.loads((out / "uptraining.json").read_text())
    return report


def open_model(folder: Path) -> Any:
    """Loads a model with qkv's attention."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="qkv").eval()


def sample(folder: Path) -> str:
    """The greedy continuation of PROMPT."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = open_model(folder).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def divergence(original: Path, converted: Path, text: str) -> dict[str, Any]:
    """The divergence of the untrained converted model from the original, on held-out text."""
    inputs = AutoTokenizer.from_pretrained(original)(text[: 10 * DIVERGENCE_TOKENS], return_tensors="pt")
    tokens = inputs.input_ids[:, :DIVERGENCE_TOKENS]
    return measure_divergence(open_model(original), open_model(converted), tokens)._asdict()


@torch.no_grad()
def decoding(folders: dict[str, Path]) -> dict[str, Any]:
    """The time of a decoding step with CONTEXT cached tokens, interleaved over the models."""
    token = torch.zeros(1, 1, dtype=torch.long)

    def step(model: Any, cache: QKVCache) -> None:
        model(token, past_key_values=cache)
        cache.crop(-1)

    candidates = {}
    for name, folder in folders.items():
        model = open_model(folder)
        cache = QKVCache(model.config)
        model(token.expand(1, CONTEXT), past_key_values=cache, logits_to_keep=1)
        candidates[name] = partial(step, model, cache)
    return {**interleaved(candidates, seconds_per_round=0.2)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="training time of each model (5)")
    parser.add_argument("--report", action="store_true", help="only write the page")
    options, path = parser.parse_args(), HERE / "results.json"
    if not options.report:
        logging.set_verbosity_error()
        register()
        with tempfile.TemporaryDirectory(prefix="qkv-study-") as folder:
            path.write_text(json.dumps(study(Path(folder), options.minutes), indent=1) + "\n")
    write(json.loads(path.read_text()), HERE / "README.md")


if __name__ == "__main__":
    main()
