"""SmolLM2-135M-Instruct on llama.cpp and on an accelerated model of transformers: prefill, and a step behind it.

    python benchmarks/llamacpp.py                   measures, prints, and writes results/PROCESSOR/llamacpp.json
    python benchmarks/llamacpp.py --prompts 64 ...  other prompts, printed only

llama.cpp writes the weights of the demo's model in fp32, fp16 and bf16 itself, and both read those files' numbers. Its
cache has the type of the weights; flash attention is measured on and off, and the better counts. Both have the same
tokens and the same number of threads, in turns, with a rest between since each has a thread pool of its own. The
largest difference of their logits is recorded.
"""

import argparse
import ctypes
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers
from harness import limits, machine
from harness.case import DTYPES
from torch import Tensor

import qkv
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.shakespeare import works
from qkv.models.source import gguf_source

FILE_TYPES = {
    "fp32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "fp16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}
CACHE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 30}
"""ggml_type, of which the bindings name no bf16"""
PROMPTS = (64, 4096)
PREFILLS, STEPS = 3, 24
REST_SECONDS = 0.1
OURS = "qkv"
FLASH = {"llama.cpp, flash attention": True, "llama.cpp": False}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def say_nothing(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Takes the messages of llama.cpp, of which it has hundreds a file."""


def write_weights(source: Path, dtype: str, folder: Path) -> Path:
    """The weights of a GGUF file in another dtype, by llama.cpp."""
    path = folder / f"{dtype}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = FILE_TYPES[dtype], True, True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llamacpp: llama.cpp must write {dtype} from {source.name}; it returned {code}.")
    return path


class LlamaCpp:
    """The model on llama.cpp."""

    def __init__(self, path: Path, dtype: str, flash: bool, context: int) -> None:
        threads, cache = torch.get_num_threads(), CACHE_TYPES[dtype]
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            type_k=cache,
            type_v=cache,
            verbose=False,
        )

    def prefill(self, ids: Tensor) -> Tensor:
        """Reads a prompt; the logits of its last token."""
        self._llama.reset()
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        """Reads tokens after those so far; the logits of the last one."""
        self._llama.eval(ids[0].tolist())
        logits = self._llama._ctx.get_logits_ith(-1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy())


class Accelerated:
    """The model on transformers and qkv."""

    def __init__(self, model: Any) -> None:
        self._model = qkv.accelerate(model)
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """As `LlamaCpp.prefill`."""
        self._cache = None
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        """As `LlamaCpp.step`."""
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1].float()
        return logits


def timed(call: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[float, Tensor]:
    """Seconds of a call after a rest, and its result."""
    time.sleep(REST_SECONDS)
    start = time.perf_counter()
    logits = call(ids)
    return time.perf_counter() - start, logits


def measure(models: dict[str, LlamaCpp | Accelerated], ids: Tensor) -> tuple[dict[str, dict[str, float]], float]:
    """Median seconds of prefill and step by model, and the largest difference of logits, relative to ours."""
    prefills: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    last: dict[str, list[Tensor]] = {name: [] for name in models}
    for _ in range(PREFILLS):
        for name, model in models.items():
            found, logits = timed(model.prefill, ids)
            prefills[name].append(found)
            last[name].append(logits)
    for _ in range(STEPS):
        for name, model in models.items():
            model.step(ids[:, :1])  # Wakes its threads.
            found, logits = timed(model.step, ids[:, 1:2])
            steps[name].append(found)
            last[name].append(logits)
    difference = max(
        float((theirs - ours).norm() / ours.norm())
        for name in models
        for theirs, ours in zip(last[name], last[OURS], strict=True)
    )
    return {name: {"prefill": median(prefills[name]), "step": median(steps[name])} for name in models}, difference


@torch.no_grad()
def main() -> None:
    """Measures each dtype."""
    parser = argparse.ArgumentParser(description="qkv against llama.cpp on a whole model.")
    parser.add_argument("--prompts", type=int, nargs="+", metavar="TOKENS", help=f"lengths of prompts {PROMPTS}")
    given = parser.parse_args().prompts
    prompts = PROMPTS if given is None else tuple(given)
    if min(prompts) < 2:
        parser.error(f"--prompts must be at least 2; got {min(prompts)}.")
    transformers.logging.set_verbosity_error()
    llama_cpp.llama_log_set(say_nothing, ctypes.c_void_p(0))
    bounds = limits.measure(torch.get_num_threads())
    source, results = cached_weights(SMOLLM2_135M, Progress()), []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in FILE_TYPES:
            path = write_weights(source, dtype, Path(folder))
            language_model = load(gguf_source(path), DTYPES[dtype], Progress())
            text = language_model.tokenizer(works()[1], return_tensors="pt", verbose=False).input_ids
            models: dict[str, LlamaCpp | Accelerated] = {OURS: Accelerated(language_model.model)}
            for name, flash in FLASH.items():
                models[name] = LlamaCpp(path, dtype, flash, max(prompts) + 2 * STEPS + 1)
            for count in prompts:
                times, difference = measure(models, text[:, :count])
                results.append({"dtype": dtype, "tokens": count, "difference": difference, "seconds": times})
                print(f"{dtype} {count:>5} tokens: {times}, logits differ by {difference:.1e}", flush=True)
            path.unlink()
    if given is None:
        version = importlib.metadata.version("llama-cpp-python")
        machine.save("llamacpp", {"llama_cpp_python": version, "limits": bounds, "measurements": results})


if __name__ == "__main__":
    main()
