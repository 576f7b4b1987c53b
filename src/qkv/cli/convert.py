"""`qkv convert`: a checkpoint with fewer key/value heads, streamed from one folder to another."""

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

from qkv.cli.divergence import describe_divergence, predict_original
from qkv.cli.inspect import describe, kv_bytes
from qkv.cli.options import count
from qkv.convert import CheckpointError, CheckpointPlan, Inspection, plan_checkpoint, write_checkpoint
from qkv.convert.files.gguf import check_bounds, read_gguf
from qkv.convert.files.safetensors import BITS, TORCH_DTYPES
from qkv.convert.files.staging import resolve_output
from qkv.convert.inspect.checkpoint import inspect_tensors
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import expand_home, gguf_source


class Pool(str, Enum):
    """What ``--pool`` takes."""

    mean = "mean"
    first = "first"
    random = "random"
    aligned = "aligned"


def convert(
    model: Annotated[
        Path, typer.Argument(help="A folder with config.json and safetensors, or a small GGUF file.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    kv_heads: Annotated[int, count("KV heads of the result, a divisor of those there are.", "HEADS")],
    pool: Annotated[
        Pool,
        typer.Option(
            help="How the heads of a group become one: their mean, the first, drawn anew, or the mean of heads that "
            "are reordered and turned before so that they agree.",
        ),
    ] = Pool.mean,
    seed: Annotated[int, typer.Option(help="Of --pool random.", metavar="NUMBER")] = 0,
    window: Annotated[
        int | None, count("Gives each layer a window of so many keys, where the configuration can say so.", "TOKENS")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text; the model is compared before and after on its first 512 tokens. Default: a short one, if the "
            "model has a tokenizer and takes at most 2 GiB.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, report, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model.")] = False,
) -> None:
    """Pool the keys and values of a model to fewer heads.

    Reads and writes a tensor at a time, or a layer's attention with --pool aligned, so that memory does not grow with
    the number of layers. OUT appears whole or not at all, with tokenizer and all other files. It is a start for further
    training: pooling changes what a model computes. How much is measured on a text, for which the whole model is
    loaded, before and after.

    The weights of a GGUF file are loaded and unpacked to float32 by transformers, into a folder for the time being.
    """
    progress, console = Progress(), Console(file=sys.stdout)
    try:
        source = expand_home(model)
        place = resolve_output(expand_home(out), source, overwrite)
        with tempfile.TemporaryDirectory(prefix="qkv-unpacked-") as temporary:
            if source.is_file():
                source = unpack(source, Path(temporary), progress)
            with progress.step("reading configuration and headers"), quiet():
                plan = plan_checkpoint(source, kv_heads, how=pool.value, seed=seed, window=window)
                before = inspect_tensors(str(source), plan.source.config, plan.source.tensors)
                after = inspect_tensors(str(out), plan.conversion.config, plan.tensors)
            if not dry_run:
                dtype = TORCH_DTYPES[before.dtype]
                original = predict_original(plan.source, dtype, text, progress)
                with progress.step("converting", 2 * plan.num_bytes, "bytes") as on_progress:
                    write_checkpoint(plan, place, overwrite=overwrite, on_progress=on_progress, notify=progress.notify)
            _print(plan, before, after, "would write" if dry_run else "wrote", out, console)
            if not dry_run:
                for line in describe_divergence(original, place, dtype, progress):
                    console.print(Text(line), soft_wrap=True)
    except CheckpointError as error:
        raise CommandError(str(error)) from error


def unpack(file: Path, folder: Path, progress: Progress) -> Path:
    """The model of a GGUF file, saved as a folder."""
    source = gguf_source(file.absolute())
    with progress.step("reading the header"):
        check_bounds(file, read_gguf(file))  # transformers would read it for minutes before it finds the end missing
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
