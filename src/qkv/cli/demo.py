"""`qkv demo`: compares a language model on transformers' attention and on qkv's."""

import json
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console

from qkv.cli.demo_report import DemoReport, as_json, print_report
from qkv.cli.options import Dtype, count_option
from qkv.models.comparison import OURS, REFERENCE, compare
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.kv_cache_size import cache_sizes, layer_shapes
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.source import find_model, gguf_source


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise typer.BadParameter(f"it must not be empty; got {prompt!r}.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # Python's replacement for undecodable bytes.
        raise typer.BadParameter(f"it must be text in the encoding of the terminal; got {prompt!r}.")
    return prompt


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder written by save_pretrained, GGUF file, or name of a model on the Hugging Face Hub. "
            "Default: SmolLM2-135M-Instruct, downloaded once (93 MB).",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt for the model.", metavar="TEXT", callback=_check_prompt)
    ] = "What is attention in a transformer?",
    max_new_tokens: Annotated[int, count_option("Maximum number of tokens to generate.", "TOKENS")] = 64,
    length: Annotated[int, count_option("Sequence length for the table of KV cache sizes.", "TOKENS")] = 4096,
    window: Annotated[int, count_option("Sliding window for the table of KV cache sizes.", "TOKENS")] = 512,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the model.")] = Dtype.float32,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Generate with transformers' attention and with qkv's, and compare.

    Prints both texts, which must be identical in float32 (else exit code 1), tokens per second of both, and the size of
    the model's KV cache as multi-head, grouped-query and multi-query attention, with and without a sliding window.
    """
    progress = Progress()
    source = gguf_source(cached_weights(SMOLLM2_135M, progress)) if model is None else find_model(model)
    torch_dtype: torch.dtype = getattr(torch, dtype.value)
    language_model = load(source, torch_dtype, progress)
    inputs = language_model.encode(prompt, max_new_tokens)
    comparison = compare(language_model, inputs, max_new_tokens, progress)
    layers = layer_shapes(language_model.model.config, comparison.runs[REFERENCE][0].cache)
    report = DemoReport(
        model=language_model.name,
        dtype=dtype.value,
        prompt=prompt,
        layers=layers,
        comparison=comparison,
        texts={name: language_model.decode(comparison.runs[name][0].tokens) for name in (REFERENCE, OURS)},
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
