"""`qkv demo`: compares a language model as transformers runs it and after `qkv.accelerate(model)`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from qkv.cli.options import Dtype, count_option
from qkv.cli.reports.demo import DemoReport, Measurement, as_json, print_report
from qkv.models.comparison import NAMES, REFERENCE, Comparison, compare
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.kv_cache_size import cache_sizes, layer_shapes
from qkv.models.language_model import LanguageModel, load
from qkv.models.progress import Progress
from qkv.models.source import find_model, gguf_source
from qkv.models.text import KING_LEAR, read_text

QUESTION = "What is this scene about?"


def _check_prompt(prompt: str | None) -> str | None:
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter(f"it must not be empty; got {prompt!r}.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt or ""):  # Python's replacement for undecodable bytes.
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
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text in UTF-8 to read before the prompt. Default: a scene of King Lear; with --prompt, none.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt for the model. Default: {QUESTION}",
            metavar="TEXT",
            callback=_check_prompt,
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, count_option("Maximum number of tokens to generate.", "TOKENS")] = 24,
    length: Annotated[int, count_option("Sequence length for the table of KV cache sizes.", "TOKENS")] = 4096,
    window: Annotated[int, count_option("Sliding window for the table of KV cache sizes.", "TOKENS")] = 512,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the model. Default: float32, then bfloat16.", show_default=False)
    ] = None,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Run a model of transformers on transformers and on qkv, and compare.

    The model reads a text and answers a question on it, before and after qkv.accelerate(model). Prints tokens per
    second of both, the texts, which must be identical in float32 (else exit code 1), and the size of the model's KV
    cache as multi-head, grouped-query and multi-query attention, in int8, and with a sliding window. The defaults take
    about two minutes on two cores.
    """
    if text is not None and prompt is None:
        raise typer.BadParameter("it needs a question on the text; give --prompt.", param_hint="'--text'")
    text = KING_LEAR if prompt is None else text
    question = QUESTION if prompt is None else prompt
    whole_prompt = question if text is None else f"{read_text(text).strip()}\n\n{question}"
    dtypes = [Dtype.float32, Dtype.bfloat16] if dtype is None else [dtype]
    progress = Progress()
    source = gguf_source(cached_weights(SMOLLM2_135M, progress)) if model is None else find_model(model)
    language_model = load(source, _torch_dtype(dtypes[0]), progress)
    inputs = language_model.encode(whole_prompt, max_new_tokens)
    measurements = {}
    for each in dtypes:
        if each is not dtypes[0]:
            language_model.cast(_torch_dtype(each))
        comparison = compare(language_model, inputs, max_new_tokens, progress)
        layers = layer_shapes(language_model.model.config, comparison.runs[REFERENCE].prefills[0].cache)
        sizes = cache_sizes(layers, length, window, _torch_dtype(each).itemsize)
        measurements[each.value] = Measurement(comparison, _texts(language_model, comparison), layers, sizes)
    report = DemoReport(
        language_model.name, None if text is None else text.name, question, length, window, measurements
    )
    if as_document:
        print(json.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        print_report(report, Console(file=sys.stdout))
    if not all(found.comparison.identical for name, found in measurements.items() if name == "float32"):
        raise typer.Exit(1)


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def _texts(language_model: LanguageModel, comparison: Comparison) -> dict[str, str]:
    """The generated texts, by implementation."""
    return {name: language_model.decode(comparison.runs[name].tokens) for name in NAMES}
