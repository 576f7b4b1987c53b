"""`Uptraining`: trains a converted model on a text to recover its quality (Ainslie et al. 2023), resumable.

A run keeps its checkpoints in a folder of its own beside the result, which it removes at the end. The result is staged
like that of a conversion: it stands under its name when it is whole, or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.convert.files.lock import lock, remove_locked
from qkv.convert.files.open_folder import OpenFolder, open_folder
from qkv.convert.files.staging import staged
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, Opened, quiet
from qkv.models.progress import OnProgress, Progress

WARM_UP = 0.1
"""Share of the steps with a rising learning rate."""
HELD_OUT = 20
"""One part in this many, the last of the text, is held out."""
TRIAL_STEPS = 4
"""Steps of a trial run that turns minutes into a number of steps, which the learning rate needs."""
LINES = 20
"""Lines of progress, at most."""
RECORD, FORMAT, REPORT = "run.json", "qkv uptraining, 1", "uptraining.json"
LOCK = "run.lock"
"""File that a run locks, and removes at its end."""


class Settings(NamedTuple):
    """How to train."""

    max_steps: int | None
    minutes: float | None
    """Approximate training time; instead of ``max_steps``."""
    learning_rate: float
    """At its peak."""
    schedule: str
    """Of the learning rate, as transformers names it."""
    batch: int
    """Blocks a step."""
    block: int
    """Tokens a block."""
    bf16: bool
    """Whether to compute in bf16, with weights in fp32."""
    save_steps: int
    """Steps between checkpoints."""
    seed: int
    """Of the order of blocks."""


class Uptrained(NamedTuple):
    """What a run did."""

    steps: int
    tokens: int
    tokens_per_second: int | None
    """None where a run resumed after the last step."""
    held_out_tokens: int
    losses: dict[str, float]
    """On the held-out text, in nats a token: of the original if there is one, the converted model, the result."""


def blocks_of(token_ids: Tensor, block: int, name: str) -> list[dict[str, Tensor]]:
    """A text ``(L,)`` in blocks; an incomplete last one is dropped.

    Raises:
        CommandError: for fewer than two.
    """
    if len(token_ids) < 2 * block:
        raise CommandError(
            f"{name} must have at least two blocks of {block} tokens; got {len(token_ids)} tokens. Give a smaller "
            "--block, or more text."
        )
    return [{"input_ids": ids, "labels": ids} for ids in token_ids.unfold(0, block, block)]


def work_folder(out: Path) -> Path:
    """Where a run that makes ``out`` keeps its checkpoints."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def claimed(out: Path, options: dict[str, Any]) -> Iterator[Path]:
    """The `work_folder` of ``out``, made or taken over from an interrupted run with the same options; locked meanwhile.

    Raises:
        CommandError: for a folder of another kind, of a run with other options, or of one that is still active.
    """
    work = work_folder(out)
    with _opened(work) as folder, _locked(folder):
        record = _read(work)
        if record is None:
            _write(work, {"format": FORMAT, "options": options})
        else:
            earlier = record["options"]
            changed = [name for name in options if json.loads(json.dumps(options[name])) != earlier.get(name)]
            if changed:
                raise CommandError(
                    f"{work} is of an interrupted run with another {', '.join(changed)}. Give the same to resume it, "
                    "or remove that folder, or give another OUT."
                )
        yield work
    if not any(work.iterdir()):
        work.rmdir()


@contextmanager
def _opened(work: Path) -> Iterator[OpenFolder]:
    """The folder of checkpoints, which must be new or a run's."""
    try:
        work.mkdir(exist_ok=True)
        parent = open_folder(work.parent)
    except OSError as error:
        raise CommandError(f"cannot keep checkpoints in {work}: {error.strerror}.") from error
    with parent:
        try:
            folder = parent.open(work.name)
        except OSError as error:
            raise CommandError(f"cannot keep checkpoints in {work}: {error.strerror}.") from error
        with folder:
            if _read(work) is None and set(folder.names()) - {LOCK}:
                raise CommandError(f"{work} must be new, or of an interrupted run; it contains other files. Remove it.")
            yield folder


@contextmanager
def _locked(folder: OpenFolder) -> Iterator[None]:
    """Locks the folder of checkpoints; raises a CommandError if another run has."""
    try:
        opened = folder.open_file(LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise CommandError(f"cannot keep checkpoints in {folder.path}: {error.strerror}.") from error
    # A run that has just ended may have removed what was opened here.
    if not lock(opened) or folder.inode_of(LOCK) != os.fstat(opened).st_ino:
        os.close(opened)
        raise CommandError(f"another run is training in {folder.path}; wait for it, or give another OUT.")
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows, where another run tries to lock it
            remove_locked(opened, lambda: folder.remove_file(LOCK))


def release(work: Path) -> None:
    """Removes what a run that has ended put into its folder, which `claimed` removes if nothing else is in it."""
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (work / RECORD).unlink()


class Uptraining:
    """A run: evaluates, trains, evaluates again and writes.

    Args:
        opened: the converted model.
        original: the model before conversion, whose loss is measured as well; None without.
        blocks: the text, from `blocks_of`.
        work: from `claimed`.
    """

    def __init__(
        self,
        opened: Opened,
        original: Opened | None,
        blocks: list[dict[str, Tensor]],
        settings: Settings,
        work: Path,
        progress: Progress,
    ) -> None:
        self._opened, self._original, self._blocks = opened, original, blocks
        self._settings, self._work, self._progress = settings, work, progress
        self._held_out = max(1, len(blocks) // HELD_OUT)

    def run(self, out: Path, overwrite: bool) -> Uptrained:
        """Trains, from the last checkpoint if there is one, and writes the result to ``out``."""
        record = _read(self._work) or {}
        losses: dict[str, float] = record.get("losses", {})
        for name, opened in (("original", self._original), ("converted", self._opened)):
            if opened is not None and name not in losses:
                losses[name] = self._evaluate(self._trainer(self._load(opened), 1), f"measuring the {name} model")
                record = self._note(record, losses=losses)
        model = self._load(self._opened)
        if "steps" not in record:
            record = self._note(record, steps=self._settings.max_steps or self._steps_in_time(model))
            model = self._load(self._opened) if self._settings.max_steps is None else model
        steps, checkpoint = record["steps"], self.last_checkpoint()
        done, seconds = 0 if checkpoint is None else step_of(checkpoint), None
        if checkpoint is not None:
            self._progress.notify(f"resuming after step {done} of {steps}")
        if checkpoint is not None and done == steps:  # Resuming, Trainer would train another step.
            at_end = self._opened.source._replace(location=str(checkpoint), gguf_file=None)
            trainer = self._trainer(self._load(self._opened._replace(source=at_end)), steps)
        else:
            with self._progress.step("training", steps, "steps") as on_progress, quiet():
                trainer = self._trainer(model, steps, on_progress)
                trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                seconds = trained.metrics["train_runtime"]
        losses = losses | {"uptrained": self._evaluate(trainer, "measuring the uptrained model")}
        per_step = self._settings.batch * self._settings.block
        result = Uptrained(
            steps,
            steps * per_step,
            None if seconds is None else round((steps - done) * per_step / seconds),
            self._held_out * self._settings.block,
            losses,
        )
        with self._progress.step("writing"), quiet():
            self._save(trainer.model, out, overwrite, result)
        return result

    def last_checkpoint(self) -> Path | None:
        """The last complete checkpoint: the trainer's state is written last."""
        complete = (path.parent for path in self._work.glob("checkpoint-*/trainer_state.json"))
        return max(complete, key=step_of, default=None)

    def _load(self, opened: Opened) -> LanguageModel:
        loaded = opened.load(torch.float32, self._progress)
        loaded.model.set_attn_implementation("qkv")
        return loaded

    def _trainer(self, loaded: LanguageModel, steps: int, on_progress: OnProgress | None = None) -> Any:
        """A Trainer of transformers, which prints nothing itself. Without ``on_progress`` it saves no checkpoints."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        settings, progress = self._settings, self._progress

        class Lines(TrainerCallback):  # type: ignore[misc]  # transformers has no types
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if on_progress is not None:
                    on_progress(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                if on_progress is not None and "loss" in logs:
                    loss = float(logs["loss"])
                    progress.notify(f"step {state.global_step} of {state.max_steps}: loss {loss:.4f}")

        arguments = TrainingArguments(
            str(self._work),
            max_steps=steps,
            per_device_train_batch_size=settings.batch,
            per_device_eval_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=WARM_UP,
            bf16=settings.bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=settings.seed,
            save_strategy="no" if on_progress is None else "steps",
            save_steps=settings.save_steps,
            save_total_limit=2,
            logging_steps=max(1, steps // LINES),
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        )
        return Trainer(
            loaded.model,
            arguments,
            train_dataset=self._blocks[: -self._held_out],
            eval_dataset=self._blocks[-self._held_out :],
            processing_class=loaded.tokenizer,
            callbacks=[Lines()],
        )

    def _evaluate(self, trainer: Any, title: str) -> float:
        with self._progress.step(title), quiet():
            return float(trainer.evaluate()["eval_loss"])

    def _steps_in_time(self, model: LanguageModel) -> int:
        """The steps that fit into the minutes, by a trial."""
        assert self._settings.minutes is not None
        with self._progress.step("measuring the time of a step"), quiet():
            trial = self._trainer(model, TRIAL_STEPS).train()
        seconds: float = trial.metrics["train_runtime"]
        return max(1, round(60 * self._settings.minutes * TRIAL_STEPS / seconds))

    def _note(self, record: dict[str, Any], **found: Any) -> dict[str, Any]:
        """Adds to the record of the run what need not be found again."""
        record = record | found
        _write(self._work, record)
        return record

    def _save(self, model: Any, out: Path, overwrite: bool, result: Uptrained) -> None:
        model.config.use_cache = True  # Trainer disables it.
        with staged(out, overwrite=overwrite, notify=self._progress.notify) as own:
            folder = own.share()
            model.save_pretrained(folder)
            self._opened.tokenizer.save_pretrained(folder)
            (folder / REPORT).write_text(json.dumps(result._asdict(), indent=1) + "\n", encoding="utf-8")


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def fingerprint(token_ids: Tensor) -> str:
    """What tells whether a text, or how it is read, was changed meanwhile."""
    return hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()


def _read(work: Path) -> dict[str, Any] | None:
    """The record of a run; None without one."""
    try:
        record = json.loads((work / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CommandError(f"{work / RECORD} is not the record of a run of qkv uptrain; remove {work}.")
    return record


def _write(work: Path, record: dict[str, Any]) -> None:
    """Replaces the record of a run, whole or not at all."""
    new = work / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(work / RECORD)
