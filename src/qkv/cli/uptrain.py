"""`qkv uptrain`: trains a converted model on a text."""

import json
import os
import sys
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qkv.cli.options import count_option
from qkv.cli.reports.uptrain import as_json, print_report
from qkv.convert import CheckpointError
from qkv.convert.files.staging import resolve_output
from qkv.integrations.transformers import register
from qkv.integrations.transformers.latent_decoders import register as register_latent_decoders
from qkv.models.errors import CommandError
from qkv.models.language_model import Opened, open_model, quiet
from qkv.models.model_folder import file_states, model_folder
from qkv.models.progress import Progress
from qkv.models.source import expand_home, find_model
from qkv.models.text import read_text
from qkv.models.uptraining import Settings, Uptraining, blocks_of, claimed, fingerprint, release
from qkv.starting import INTERRUPTED


class Schedule(str, Enum):
    """The values of ``--schedule``."""

    cosine = "cosine"
    constant = "constant_with_warmup"


def _above_zero(number: float | None) -> float | None:
    if number is not None and not number > 0:
        raise typer.BadParameter(f"it must be above 0; got {number:g}.")
    return number


def uptrain(
    model: Annotated[
        str,
        typer.Argument(
            help="What qkv convert wrote, or another causal language model with its tokenizer: a folder, a small GGUF "
            "file, or the name of a model on the Hugging Face Hub.",
            metavar="MODEL",
        ),
    ],
    text: Annotated[Path, typer.Argument(help="Text in UTF-8; its last twentieth is held out.", metavar="TEXT")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    original: Annotated[
        str | None,
        typer.Option(
            help="The model before conversion, whose loss is measured as well.", metavar="MODEL", show_default=False
        ),
    ] = None,
    max_steps: Annotated[int | None, count_option("Steps to train; or give --minutes.", "STEPS")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Approximate time to train.", metavar="MINUTES", callback=_above_zero, show_default=False),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate at its peak.", metavar="RATE", callback=_above_zero)
    ] = 3e-4,
    schedule: Annotated[Schedule, typer.Option(help="How the learning rate falls.")] = Schedule.cosine,
    batch: Annotated[int, count_option("Blocks a step.", "BLOCKS")] = 4,
    block: Annotated[int, count_option("Tokens a block; more than a window that is to be trained.", "TOKENS")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16, with weights in float32.")] = False,
    save_steps: Annotated[int, count_option("Steps between checkpoints.", "STEPS")] = 50,
    seed: Annotated[
        int, typer.Option(help="Random seed of the order of blocks.", metavar="NUMBER", min=0, max=2**32 - 1)
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model.")] = False,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Train a converted model on a text, to recover what conversion lost.

    Measures the loss on the last twentieth of TEXT, trains on the rest, measures again, and says whether the model is
    usable beside the original (if its loss is higher by 1 nat a token at most). OUT is a float32 model that plain
    transformers loads, written atomically.

    Checkpoints are kept in OUT.unfinished meanwhile. After an interruption, the same command resumes from the last one.
    """
    if (max_steps is None) == (minutes is None):
        raise typer.BadParameter("give either --max-steps or --minutes.")
    if block < 2:
        raise typer.BadParameter(f"it must be at least 2; got {block}.", param_hint="'--block'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            "qkv uptrain trains in one process; on several, train MODEL by transformers' Trainer, with "
            'attn_implementation="qkv".'
        )
    settings = Settings(max_steps, minutes, learning_rate, schedule.value, batch, block, bf16, save_steps, seed)
    progress = Progress()
    try:
        with ExitStack() as stack:
            target = resolve_output(expand_home(out), expand_home(Path(model)), overwrite)
            words = read_text(text, option="TEXT")
            folder = stack.enter_context(model_folder(model, progress))
            opened = _open(model, folder, progress)
            before = None
            if original is not None:
                before = _open(original, stack.enter_context(model_folder(original, progress)), progress)
            with progress.step("reading the text"), quiet():
                token_ids = opened.tokenizer(words, return_tensors="pt", verbose=False).input_ids[0]
            blocks = blocks_of(token_ids, block, str(text))
            options = {
                "MODEL": file_states(model, folder),
                "TEXT": fingerprint(token_ids),
                "--original": original,
                **{f"--{name.replace('_', '-')}": value for name, value in settings._asdict().items()},
            }
            work = stack.enter_context(claimed(target, options))
            run = Uptraining(opened, before, blocks, settings, work, progress)
            try:
                result = run.run(target, overwrite)
            except (CheckpointError, CommandError):
                raise
            except Exception as error:  # whatever a trainer meets: a full disk, no memory
                cause = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                raise CommandError(
                    f"training failed. {cause}\nThe same command resumes, from {_where(run)}."
                ) from error
            except KeyboardInterrupt:
                progress.notify(f"qkv: interrupted; the same command resumes, from {_where(run)}.")
                raise typer.Exit(INTERRUPTED) from None
            release(work)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    if as_document:
        print(json.dumps(as_json(model, text, out, original, result), indent=2, allow_nan=False))
    else:
        print_report(out, original, result, Console(file=sys.stdout))


def _open(model: str, folder: Path, progress: Progress) -> Opened:
    """A causal language model, without its weights; refused before anything is written."""
    with quiet():
        register()
        register_latent_decoders()
    opened = open_model(find_model(str(folder))._replace(name=model), progress)
    if opened.kind != "language model":
        raise CommandError(f"{model} must be a causal language model; got one of kind {opened.kind}.")
    return opened


def _where(run: Uptraining) -> str:
    last = run.last_checkpoint()
    return "the start" if last is None else f"step {last.name.removeprefix('checkpoint-')}"
