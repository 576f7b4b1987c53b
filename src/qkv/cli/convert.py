"""`qkv convert`: converts a checkpoint to fewer key/value heads, windows in some layers, or latent attention."""

import json
import re
import sys
import tempfile
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qkv.cli.options import SINK_TOKENS, count_option
from qkv.cli.reports.convert import ConvertReport, as_json, next_command, print_changes, print_comparison
from qkv.convert import CheckpointError, CheckpointPlan, plan_checkpoint, plan_latent_checkpoint, write_checkpoint
from qkv.convert.files.fields import COUNT, SIZE, check_fields, list_of
from qkv.convert.files.json_document import read_document
from qkv.convert.files.safetensors import TORCH_DTYPES
from qkv.convert.files.staging import resolve_output
from qkv.convert.heads.pooling import ConversionMethod, divisors
from qkv.convert.inspect.checkpoint import inspect_tensors
from qkv.convert.inspect.inspection import Inspection
from qkv.models.divergence import compare_with, predict_original
from qkv.models.errors import CommandError
from qkv.models.language_model import quiet
from qkv.models.model_folder import model_folder
from qkv.models.progress import Progress
from qkv.models.source import expand_home

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
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Folder with config.json and safetensors, small GGUF file, or name of a model on the Hugging Face "
            "Hub.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder to write; not needed with --dry-run.", metavar="OUT", show_default=False),
    ] = None,
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
        Pool | None,
        typer.Option(
            help="How to pool the heads of a group: their mean, the first, a random initialisation, or the mean after "
            "aligning (reordering and rotating) similar heads. Default: aligned; mean for encoder-decoders.",
            show_default=False,
        ),
    ] = None,
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check, compare and report, but write nothing that stays, whatever OUT is or contains."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model.")] = False,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Convert a model to fewer KV heads (multi-head to grouped-query or multi-query attention), to sliding windows in
    some layers, to both, or to latent attention.

    Weights are streamed, so memory does not grow with the number of layers. OUT is written atomically and includes the
    tokenizer and all other files. Pooling changes what a model computes, so the result needs further training; the
    report compares the predictions of original and result, for which each is loaded in turn, says whether the result
    is usable before that (if its loss is up by 1 nat a token at most), and which command comes next.

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
    if out is None and not dry_run:
        raise typer.BadParameter("give the folder to write, or --dry-run.", param_hint="'OUT'")
    chosen = None if layers is None else parse_layers(layers)
    progress, console = Progress(), Console(file=sys.stdout)
    try:
        with ExitStack() as stack:
            target = None
            if out is not None and not dry_run:
                target = resolve_output(expand_home(out), expand_home(Path(model)), overwrite)
            if like is not None:
                window, chosen = read_proposal(expand_home(like))
            source = stack.enter_context(model_folder(model, progress))
            with progress.step("reading configuration and headers"), quiet():
                if latent is not None:
                    plan = plan_latent_checkpoint(source, latent, rope_heads=rope_heads)
                else:
                    how: ConversionMethod | None = None if pool is None else pool.value
                    plan = plan_checkpoint(source, kv_heads, how=how, seed=seed, window=window, layers=chosen)
                before = inspect_tensors(str(source), plan.source.config, plan.source.tensors)
                after = inspect_tensors("the result", plan.conversion.config, plan.tensors)
            _refuse_same_heads(model, before, kv_heads)
            report = ConvertReport(model, None if target is None else out, plan, before, after, window)
            original = predict_original(plan.source, TORCH_DTYPES[before.dtype], text, progress)
            if target is not None:
                written = target
                _write(plan, written, overwrite, progress)
            else:
                written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qkv-trial-")), "result")
                if not isinstance(original, str):  # what cannot be compared need not be made
                    _write(plan, written, False, progress)
            if not as_document:
                print_changes(report, console)
            elif target is not None:
                progress.notify(f"wrote {out}")
            compared = compare_with(original, written, TORCH_DTYPES[before.dtype], progress)
            command = _without_dry_run(context) if target is None else next_command(report, compared)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    if as_document:
        print(json.dumps(as_json(report, compared, command), indent=2, allow_nan=False))
    else:
        print_comparison(report, compared, command, console)


def _write(plan: CheckpointPlan, target: Path, overwrite: bool, progress: Progress) -> None:
    with progress.step("converting", 2 * plan.num_bytes, "bytes") as on_progress:
        write_checkpoint(plan, target, overwrite=overwrite, on_progress=on_progress, notify=progress.notify)


def _refuse_same_heads(model: str, before: Inspection, kv_heads: int | None) -> None:
    """Raises a CommandError for as many KV heads as a model has: nothing would be pooled."""
    has = {layer.num_kv_heads for layer in before.layers}
    if kv_heads is None or has != {kv_heads}:
        return
    fewer = ", ".join(map(str, divisors(kv_heads)[1:]))
    remedy = f"Give fewer: {fewer}." if fewer else "It has no fewer to pool to."
    heads = "1 KV head" if kv_heads == 1 else f"{kv_heads} KV heads"
    raise CommandError(f"--kv-heads: {model} has {heads} already, so nothing would be pooled. {remedy}")


def _without_dry_run(context: typer.Context) -> list[str]:
    """The command that was given, without --dry-run, as arguments."""
    arguments = ["qkv", "convert"]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params[name]
        if parameter.param_type_name == "argument":
            arguments.append("OUT" if value is None else str(value))
        elif _is_given(context, name) and name != "dry_run":
            arguments.append(max(parameter.opts, key=len))
            if not isinstance(value, bool):
                arguments.append(str(value.value if isinstance(value, Enum) else value))
    return arguments


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _check_options(kv_heads: int | None, latent: int | None, rope_heads: int | None, pool: Pool | None) -> None:
    """Raises BadParameter unless options belong to the same kind of conversion."""
    if kv_heads is not None and latent is not None:
        raise typer.BadParameter("give either --kv-heads or --latent.")
    if latent is None and rope_heads is not None:
        raise typer.BadParameter("--rope-heads belongs to --latent.")
    if kv_heads is None and pool is not None:
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
