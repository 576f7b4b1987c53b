"""Models with random weights as transformers computes them and after `qkv.accelerate(model)`.

    python benchmarks/one_line.py             measures, prints, and writes results/PROCESSOR/one_line.json
    python benchmarks/one_line.py NAME ...    measures models whose name contains it, and prints

- Llamas of SmolLM2-135M's sizes and of one billion parameters: the prompt is computed three times by each, in turns, as
  are the steps that follow. A step reads each weight and the KV cache once; its GB/s are beside those of reading memory
  in turns with it.
- An encoder of MiniLM-L6's sizes on 256 sentences in batches of 32, also with ``unpad=True``.

All have transformers' default settings. Models before and after share their weights, so memory has them once.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from harness import limits, machine, reading
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

import qkv
from qkv.bench.timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS, STEPS = 3, 24
STOCK, OURS, UNPADDED = "transformers", "accelerated", "accelerated, unpadded"


class Decoder(NamedTuple):
    """A Llama, and the numbers of tokens of its prompts."""

    config: LlamaConfig
    prompts: tuple[int, ...]


DECODERS = {
    "Llama of SmolLM2-135M's sizes": Decoder(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        (64, 1024, 4096),
    ),
    "Llama of 1.0 billion parameters": Decoder(
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        (1024,),
    ),
}
ENCODER = "encoder of MiniLM-L6's sizes"
MINILM = BertConfig(
    vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
BATCHES, SENTENCES = 8, 32
WORDS = (6, 40)
"""Tokens of the shortest and the longest sentence."""


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def twin(model: Any) -> Any:
    """A copy of a model with the same parameters."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def measure(
    models: dict[str, Any], prompt: Tensor, read_memory: reading.Reading, steps: int = STEPS
) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of the prompt and of a step, each in the median, by kind; and GB/s of reading memory between steps."""
    caches: dict[str, Any] = {}
    prefills: dict[str, list[float]] = {kind: [] for kind in models}
    times: dict[str, list[float]] = {kind: [] for kind in models}

    def run(kind: str, ids: Tensor) -> tuple[float, Any]:
        options = {"past_key_values": caches.get(kind), "use_cache": True, "logits_to_keep": 1}
        return seconds(lambda: models[kind](ids, **options))

    for kind in [*models] * PROMPTS:
        caches.pop(kind, None)
        taken, out = run(kind, prompt)
        prefills[kind].append(taken)
        caches[kind] = out.past_key_values
    readings = []
    for _ in range(steps):
        for kind in models:
            times[kind].append(run(kind, prompt[:, :1])[0])
        readings.append(seconds(read_memory)[0])
    medians = {kind: (statistics.median(prefills[kind]), statistics.median(times[kind])) for kind in models}
    rate = read_memory.gb_per_s(statistics.median(readings) * 1e6)
    return {kind: {"prefill": prefill, "step": step} for kind, (prefill, step) in medians.items()}, rate


def step_bytes(model: Any, tokens: int) -> int:
    """Bytes that a step reads: each weight once, and the keys and values of the tokens behind it."""
    config = model.config
    numbers: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    weights: int = sum(weight.nbytes for weight in model.parameters())
    return weights + numbers * int(model.dtype.itemsize)


def measure_decoder(name: str, dtype: str, read_memory: reading.Reading) -> list[dict[str, Any]]:
    """The prompts of a Llama."""
    torch.manual_seed(0)
    config, prompts = DECODERS[name]
    stock = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    models = {STOCK: stock, OURS: qkv.accelerate(twin(stock))}
    measure(models, torch.randint(config.vocab_size, (1, 16)), read_memory, steps=2)
    found = []
    for tokens in prompts:
        times, limit = measure(models, torch.randint(config.vocab_size, (1, tokens)), read_memory)
        read = step_bytes(stock, tokens)
        case = {"model": name, "dtype": dtype, "tokens": tokens, "step_bytes": read}
        found.append({**case, "seconds": times, "reading_gb_per_s": limit})
        ratios = {part: round(times[STOCK][part] / times[OURS][part], 2) for part in times[OURS]}
        rate = read / times[OURS]["step"] / 1e9
        share = f"{rate:.1f} GB/s, {rate / limit:.0%} of reading"
        print(f"{name}, {dtype}, {tokens} tokens: {times}, times as fast {ratios}, {share}", flush=True)
    return found


def sentences() -> list[dict[str, Tensor]]:
    """Batches of random sentences, padded to the longest of each."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        lengths = torch.randint(WORDS[0], WORDS[1] + 1, (SENTENCES, 1), generator=generator)
        keep = torch.arange(int(lengths.max())) < lengths
        ids = torch.randint(MINILM.vocab_size, keep.shape, generator=generator)
        batches.append({"input_ids": ids, "attention_mask": keep.long()})
    return batches


def measure_encoder(dtype: str) -> dict[str, Any]:
    """Seconds for all sentences, by kind."""
    torch.manual_seed(0)
    stock, batches = AutoModel.from_config(MINILM, dtype=DTYPES[dtype]).eval(), sentences()
    models = {
        STOCK: stock,
        OURS: qkv.accelerate(twin(stock)),
        UNPADDED: qkv.accelerate(twin(stock), unpad=True),
    }

    def embed(model: Any) -> Callable[[], list[Any]]:
        return lambda: [model(**batch).last_hidden_state for batch in batches]

    spreads = interleaved({kind: embed(model) for kind, model in models.items()}, rounds=9)
    padding = 1 - float(torch.cat([batch["attention_mask"].flatten() for batch in batches]).float().mean())
    times = {kind: spread["median_us"] / 1e6 for kind, spread in spreads.items()}
    print(f"{ENCODER}, {dtype}, {padding:.0%} padding: {times}", flush=True)
    return {"model": ENCODER, "dtype": dtype, "padding": padding, "seconds": times}


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16, short prompts and long ones."""
    parser = argparse.ArgumentParser(description="Models before and after qkv.accelerate(model).")
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of a model; all by default")
    names, known = parser.parse_args().names, [*DECODERS, ENCODER]
    chosen = [model for model in known if not names or any(name in model for name in names)]
    if not chosen:
        parser.error(f"no model's name contains {' or '.join(names)}. Give a part of one of: {'; '.join(known)}")
    transformers.logging.set_verbosity_error()
    bounds, read_memory = limits.measure(torch.get_num_threads()), reading.Reading()
    decoders = [
        found
        for name in chosen
        if name in DECODERS
        for dtype in DTYPES
        for found in measure_decoder(name, dtype, read_memory)
    ]
    encoders = [measure_encoder(dtype) for dtype in DTYPES if ENCODER in chosen]
    if not names:
        bounds = limits.larger(bounds, limits.measure(torch.get_num_threads()))
        machine.save("one_line", {"limits": bounds, "measurements": decoders, "encoders": encoders})


if __name__ == "__main__":
    main()
