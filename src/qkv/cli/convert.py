"""`qkv convert`: converts a checkpoint to fewer key/value heads, or to latent attention."""

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

from qkv.cli.layers import describe, kv_bytes
from qkv.cli.options import count_option
from qkv.convert import (
    CheckpointError,
    CheckpointPlan,
    Inspection,
    plan_checkpoint,
    plan_latent_checkpoint,
    write_checkpoint,
)
from qkv.convert.files.gguf import check_bounds, read_gguf
from qkv.convert.files.safetensors import BITS, TORCH_DTYPES
from qkv.convert.files.staging import resolve_output
from qkv.convert.inspect.checkpoint import inspect_tensors
from qkv.models.divergence import describe_divergence, predict_original
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import expand_home, gguf_source


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
        count_option("Sets a sliding window in every layer, where the configuration can express it.", "TOKENS"),
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
    """Convert a model to fewer KV heads (multi-head to grouped-query or multi-query attention), or to latent attention.

    Weights are streamed, so memory does not grow with the number of layers. OUT is written atomically and includes the
    tokenizer and all other files. Pooling changes what a model computes, so the result needs further training; the
    report compares the predictions of original and result, for which each is loaded in turn.

    Latent attention is exact with all components and full rank. It has model types of qkv's own: call
    qkv.integrations.transformers.latent_decoders.register() before loading OUT.

    A GGUF file is first dequantised to float32 by transformers, into a temporary folder.
    """
    _check_options(kv_heads, latent, rope_heads, pool, window)
    progress, console = Progress(), Console(file=sys.stdout)
    try:
        source = expand_home(model)
        target = resolve_output(expand_home(out), source, overwrite)
        with tempfile.TemporaryDirectory(prefix="qkv-unpacked-") as temporary:
            if source.is_file():
                source = unpack_gguf(source, Path(temporary), progress)
            with progress.step("reading configuration and headers"), quiet():
                if latent is not None:
                    plan = plan_latent_checkpoint(source, latent, rope_heads=rope_heads)
                else:
                    assert kv_heads is not None
                    plan = plan_checkpoint(source, kv_heads, how=pool.value, seed=seed, window=window)
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
    except CheckpointError as error:
        raise CommandError(str(error)) from error


def _check_options(
    kv_heads: int | None, latent: int | None, rope_heads: int | None, pool: Pool, window: int | None
) -> None:
    """Raises BadParameter unless options belong to the same kind of conversion."""
    if (kv_heads is None) == (latent is None):
        raise typer.BadParameter("give either --kv-heads or --latent.")
    if latent is None and rope_heads is not None:
        raise typer.BadParameter("--rope-heads belongs to --latent.")
    if latent is not None and (pool is not Pool.mean or window is not None):
        raise typer.BadParameter("--pool and --window belong to --kv-heads.")


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
    line(f"  {describe(before.layers[0])}")
    line(f"  becomes {describe(after.layers[0])}")
    line(f"  {changed} of {len(outputs)} tensors changed, {len(plan.copied)} other files copied")
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
    console.print(table)
