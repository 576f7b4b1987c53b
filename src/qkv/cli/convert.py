"""`qkv convert`: converts a checkpoint to fewer key/value heads, windows in some layers, or latent attention."""

import re
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qkv.cli.layers import LENGTH, describe, describe_kinds, kv_bytes
from qkv.cli.options import SINK_TOKENS, count_option
from qkv.convert import (
    CheckpointError,
    CheckpointPlan,
    Inspection,
    plan_checkpoint,
    plan_latent_checkpoint,
    write_checkpoint,
)
from qkv.convert.files.fields import COUNT, SIZE, check_fields, list_of
from qkv.convert.files.gguf import check_bounds, read_gguf
from qkv.convert.files.json_document import read_document
from qkv.convert.files.safetensors import BITS, TORCH_DTYPES
from qkv.convert.files.staging import resolve_output
from qkv.convert.inspect.checkpoint import inspect_tensors
from qkv.models.divergence import describe_divergence, predict_original
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import expand_home, gguf_source

RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
"""A layer number of ``--layers``, or two with all between them."""
PROPOSAL = {"window": COUNT, "sink_tokens": SIZE, "layers": list_of(SIZE)}
"""Fields of what ``qkv see`` proposes."""


class Pool(str, Enum):
    """The values of ``--pool``."""

    mean = "mean"
    first = "first"
    random = "random"
    aligned = "aligned"


def convert(
    model: Annotated[
        Path, typer.Argument(help="Folder with config.json and safetensors, or a small GGUF file.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    kv_heads: Annotated[int | None, count_option("KV heads of the result, a divisor of the model's.", "HEADS")] = None,
    latent: Annotated[
        int | None,
        count_option("Makes latent attention instead, with latents of this width (Llama, Mistral, Qwen2).", "RANK"),
    ] = None,
    rope_heads: Annotated[
        int | None,
        count_option(
            "For --latent: how many components of the keys keep their positions, of as many as the model has KV heads. "
            "Default: all.",
            "HEADS",
        ),
    ] = None,
    pool: Annotated[
        Pool,
        typer.Option(
            help="How to pool the heads of a group: their mean, the first, a random initialisation, or the mean after "
            "aligning (reordering and rotating) similar heads.",
        ),
    ] = Pool.mean,
    seed: Annotated[int, typer.Option(help="Random seed, for --pool random.", metavar="NUMBER")] = 0,
    window: Annotated[
        int | None,
        count_option("Sets a sliding window: the keys that a query sees at most, its own included.", "TOKENS"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="The layers that get the window, from 0, such as 0,2,5-9. Default: all.",
            metavar="NUMBERS",
            show_default=False,
        ),
    ] = None,
    sink_tokens: Annotated[
        int,
        typer.Option(
            *SINK_TOKENS,
            help="First tokens that all queries see besides the window. No configuration can express them, so only 0 "
            "is taken.",
            metavar="TOKENS",
            min=0,
        ),
    ] = 0,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Takes window and layers that qkv see proposes, from what its --json wrote.",
            metavar="REPORT",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file on whose first 512 tokens original and result are compared. Default: a built-in text, if "
            "the model has a tokenizer and at most 2 GiB of weights.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report, but write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model.")] = False,
) -> None:
    """Convert a model to fewer KV heads (multi-head to grouped-query or multi-query attention), to sliding windows in
    some layers, to both, or to latent attention.

    Weights are streamed, so memory does not grow with the number of layers. OUT is written atomically and includes the
    tokenizer and all other files. Pooling changes what a model computes, so the result needs further training; the
    report compares the predictions of original and result, for which each is loaded in turn.

    Windows are set in config.json; no weights change. Layers can differ in Llama, Mistral, Ministral, Qwen2, Qwen3,
    Gemma 2, Gemma 3 and SmolLM3; Phi-3 and StarCoder2 have one window for all. Llama, and Mistral with windows in some
    layers, are written as model type ministral, which computes the same.

    Latent attention is exact with all components and full rank. It has model types of qkv's own: call
    qkv.integrations.transformers.latent_decoders.register() before loading OUT.

    A GGUF file is first dequantised to float32 by transformers, into a temporary folder.
    """
    _check_options(kv_heads, latent, rope_heads, pool)
    _check_window_options(latent, window, layers, sink_tokens, like)
    if kv_heads is None and latent is None and window is None and like is None:
        raise typer.BadParameter("give --kv-heads, --latent, --window or --like.")
    chosen = None if layers is None else parse_layers(layers)
    progress, console = Progress(), Console(file=sys.stdout)
    try:
        source = expand_home(model)
        target = resolve_output(expand_home(out), source, overwrite)
        if like is not None:
            window, chosen = read_proposal(expand_home(like))
        with tempfile.TemporaryDirectory(prefix="qkv-unpacked-") as temporary:
            if source.is_file():
                source = unpack_gguf(source, Path(temporary), progress)
            with progress.step("reading configuration and headers"), quiet():
                if latent is not None:
                    plan = plan_latent_checkpoint(source, latent, rope_heads=rope_heads)
                else:
                    plan = plan_checkpoint(source, kv_heads, how=pool.value, seed=seed, window=window, layers=chosen)
                before = inspect_tensors(str(source), plan.source.config, plan.source.tensors)
                after = inspect_tensors(str(out), plan.conversion.config, plan.tensors)
            if not dry_run:
                dtype = TORCH_DTYPES[before.dtype]
                original = predict_original(plan.source, dtype, text, progress)
                with progress.step("converting", 2 * plan.num_bytes, "bytes") as on_progress:
                    write_checkpoint(plan, target, overwrite=overwrite, on_progress=on_progress, notify=progress.notify)
            _print(plan, before, after, "would write" if dry_run else "wrote", out, console)
            if not dry_run:
                for line in describe_divergence(original, target, dtype, progress):
                    console.print(Text(line), soft_wrap=True)
                if window is not None and not isinstance(original, str) and window >= original.token_ids.shape[1]:
                    line = f"    a window of {window} cuts nothing of {original.token_ids.shape[1]} tokens"
                    console.print(Text(line), soft_wrap=True)
    except CheckpointError as error:
        raise CommandError(str(error)) from error


def _check_options(kv_heads: int | None, latent: int | None, rope_heads: int | None, pool: Pool) -> None:
    """Raises BadParameter unless options belong to the same kind of conversion."""
    if kv_heads is not None and latent is not None:
        raise typer.BadParameter("give either --kv-heads or --latent.")
    if latent is None and rope_heads is not None:
        raise typer.BadParameter("--rope-heads belongs to --latent.")
    if kv_heads is None and pool is not Pool.mean:
        raise typer.BadParameter("--pool belongs to --kv-heads.")


def _check_window_options(
    latent: int | None, window: int | None, layers: str | None, sink_tokens: int, like: Path | None
) -> None:
    """Raises BadParameter unless the options of windows agree."""
    if latent is not None and (window is not None or like is not None):
        raise typer.BadParameter("--window and --like do not go with --latent.")
    if like is not None and (window is not None or layers is not None):
        raise typer.BadParameter("--like gives window and layers; give either it or --window and --layers.")
    if window is None and layers is not None:
        raise typer.BadParameter("--layers belongs to --window.")
    if window is None and sink_tokens:
        raise typer.BadParameter("--sink-tokens belongs to --window.")
    _refuse_sink_tokens("--sink-tokens", sink_tokens)


def _refuse_sink_tokens(where: str, sink_tokens: int) -> None:
    """Raises a CommandError for windows that no configuration of transformers can express."""
    if sink_tokens:
        raise CommandError(
            f"{where}: a configuration of transformers has windows without sink tokens; got {sink_tokens}. Convert "
            "without them, or run them in layers of qkv, with qkv.SlidingKVCache(window, sink_tokens)."
        )


def parse_layers(text: str) -> list[int]:
    """The layer numbers of ``--layers``.

    Raises:
        BadParameter: for anything but numbers and ranges that ascend.

    Example:
        >>> parse_layers("0,2,5-9")
        [0, 2, 5, 6, 7, 8, 9]
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        first, last = (None, None) if match is None else (int(match[1]), int(match[2] or match[1]))
        if first is None or last is None or first > last:
            raise typer.BadParameter(f"--layers: it must be like 0,2,5-9, with ranges that ascend; got {part!r}.")
        numbers.extend(range(first, last + 1))
    return numbers


def read_proposal(report: Path) -> tuple[int, list[int]]:
    """The window and the layers that ``qkv see`` proposes.

    Raises:
        CheckpointError: for a file that is missing or broken.
        CommandError: for a report without proposal, and for one with sink tokens.
    """
    proposal = read_document(report).get("proposal")
    if not isinstance(proposal, dict) or not proposal.keys() >= {"window", "layers"}:
        raise CommandError(
            f"--like: {report} must have a proposal with window and layers. It has one after\n"
            f"qkv see MODEL --text FILE --window W --measure --json > {report}"
        )
    check_fields(f"--like: proposal of {report}", proposal, PROPOSAL)
    _refuse_sink_tokens(f"--like: proposal of {report}", proposal.get("sink_tokens", 0))
    return proposal["window"], proposal["layers"]


def unpack_gguf(file: Path, folder: Path, progress: Progress) -> Path:
    """Dequantises a GGUF file to float32, saves the model in ``folder`` and returns that."""
    source = gguf_source(file.absolute())
    with progress.step("reading the header"):
        check_bounds(file, read_gguf(file))  # transformers takes minutes to notice a truncated file
    loaded = load(source, torch.float32, progress)
    with progress.step("unpacking"), quiet():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return folder


def _print(plan: CheckpointPlan, before: Inspection, after: Inspection, did: str, out: Path, console: Console) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    outputs = plan.conversion.outputs
    changed = sum(output.compute is not None for output in outputs.values())
    line(f"{did} {out}", "bold")
    for found, becomes in ((before, ""), (after, "becomes ")):
        own = [layer for layer in found.layers if not layer.cross]
        for kind in [describe(own[0])] if len(set(own)) == 1 else describe_kinds(own):
            line(f"  {becomes}{kind}")
    line(f"  {changed} of {len(outputs)} tensors changed, {len(plan.copied)} other files copied")
    if before.model_type != after.model_type:
        line(f"  model type {before.model_type} becomes {after.model_type}")
    if plan.skipped_weights:
        line(f"  not copied (weights of the original model): {', '.join(map(str, plan.skipped_weights))}")
    if plan.skipped_links:
        line(f"  not copied (links to folders, dangling links): {', '.join(map(str, plan.skipped_links))}")
    console.print()
    table = Table("", box=None, pad_edge=False)
    for title in ("before", "after", "of before"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, old, new in (
        ("  parameters", before.parameters, after.parameters),
        ("  in attention", before.attention_parameters, after.attention_parameters),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.1%}")
    width = BITS[after.dtype] // 8
    old, new = kv_bytes(before, 1, 1, width), kv_bytes(after, 1, 1, width)
    table.add_row("  KV cache a token", readable_bytes(old), readable_bytes(new), f"{new / old:.1%}")
    if any(layer.window != other.window for layer, other in zip(before.layers, after.layers, strict=True)):
        old, new = kv_bytes(before, LENGTH, 1, width), kv_bytes(after, LENGTH, 1, width)
        table.add_row(f"  KV cache of {LENGTH} tokens", readable_bytes(old), readable_bytes(new), f"{new / old:.1%}")
    console.print(table)
