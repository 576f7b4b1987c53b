"""`qkv demo`: a language model on transformers' attention and on qkv's, and what its KV cache weighs."""

import json
import sys
from enum import Enum
from typing import Annotated

import torch
import typer
from rich.console import Console

from qkv.cli.demo_report import DemoReport, as_json, print_report
from qkv.cli.options import count
from qkv.models.comparison import OURS, STOCK, compare
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.kv_cache_size import cache_sizes, layer_shapes
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.source import find_model, gguf_source


class Dtype(str, Enum):
    """The dtypes that ``--dtype`` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _a_text(prompt: str) -> str:
    if not prompt.strip():
        raise typer.BadParameter(f"it must hold a text for the model to continue; got {prompt!r}.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # What Python makes of bytes it cannot decode.
        raise typer.BadParameter(f"it must be text in the encoding of the terminal; got {prompt!r}.")
    return prompt


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder as transformers saves it, a GGUF file, or the name of a model on the Hugging Face hub. "
            "Default: SmolLM2-135M-Instruct, downloaded once (93 MB).",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What the model is asked.", metavar="TEXT", callback=_a_text)
    ] = "What is attention in a transformer?",
    max_new_tokens: Annotated[int, count("The most tokens to generate.", "TOKENS")] = 64,
    length: Annotated[int, count("Length of the text in the table of KV caches.", "TOKENS")] = 4096,
    window: Annotated[
        int, count("Keys that a query sees in the table of KV caches, its own included.", "TOKENS")
    ] = 512,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    as_document: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, and nothing else, on standard output.")
    ] = False,
) -> None:
    """Generate with transformers' attention and with qkv's, and compare.

    Prints both texts, which must be the same in float32 (exit code 1 if they are not), the tokens per second of each,
    and what the model's KV cache weighs as multi-head, grouped-query and multi-query attention, with and without a
    sliding window.
    """
    progress = Progress()
    source = gguf_source(cached_weights(SMOLLM2_135M, progress)) if model is None else find_model(model)
    torch_dtype: torch.dtype = getattr(torch, dtype.value)
    language_model = load(source, torch_dtype, progress)
    inputs = language_model.encode(prompt, max_new_tokens)
    comparison = compare(language_model, inputs, max_new_tokens, progress)
    layers = layer_shapes(language_model.model.config, comparison.runs[STOCK][0].cache)
    report = DemoReport(
        model=language_model.name,
        dtype=dtype.value,
        prompt=prompt,
        layers=layers,
        comparison=comparison,
        texts={name: language_model.decode(comparison.runs[name][0].tokens) for name in (STOCK, OURS)},
        length=length,
        window=window,
        cache_sizes=cache_sizes(layers, length, window, torch_dtype.itemsize),
    )
    if as_document:
        print(json.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        print_report(report, Console(file=sys.stdout))
    if dtype is Dtype.float32 and not report.comparison.identical:
        raise typer.Exit(1)
