"""`compare`: the same generation with a model of transformers and with the accelerated one, in turns."""

from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

import qkv
from qkv.models.errors import CommandError
from qkv.models.generation import Decoding, Prefill, decode, prefill
from qkv.models.language_model import LanguageModel
from qkv.models.progress import Progress, offset_progress

REFERENCE, OURS = "transformers", "qkv"
NAMES = (REFERENCE, OURS)

DECODINGS = 3
READ_SECONDS = 3.0
"""Prompts are read again until this much time has passed, `DECODINGS` times at most: short ones need a median."""
WARM_UP_TOKENS = 16


class Runs(NamedTuple):
    """The runs of a model on one implementation."""

    prompt_tokens: int
    prefills: list[Prefill]
    decodings: list[Decoding]

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, in the median."""
        return self.prompt_tokens / median(read.seconds for read in self.prefills)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first, in the median of all steps; None if there is only one token."""
        steps = [seconds for decoding in self.decodings for seconds in decoding.steps]
        return 1 / median(steps) if steps else None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new tokens."""
        return self.decodings[0].tokens


class Comparison(NamedTuple):
    """The runs of `compare`."""

    runs: dict[str, Runs]
    """By implementation."""
    taken: tuple[str, ...]
    """The parts of the model that qkv runs: attention, cache, ..."""

    @property
    def identical(self) -> bool:
        """Whether all runs generated the same tokens."""
        return self.first_difference is None

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token that differs between runs; None if all are identical."""
        texts = [decoding.tokens for runs in self.runs.values() for decoding in runs.decodings]
        if len(set(texts)) == 1:
            return None
        columns = zip(*texts, strict=False)
        return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))

    @property
    def prefill_ratio(self) -> float:
        """How many times as fast qkv reads the prompt."""
        return self.runs[OURS].prefill_rate / self.runs[REFERENCE].prefill_rate

    @property
    def decode_ratio(self) -> float | None:
        """How many times as fast qkv decodes; None without decoding."""
        ours, theirs = (self.runs[name].decode_rate for name in (OURS, REFERENCE))
        return None if ours is None or theirs is None else ours / theirs


def compare(
    language_model: LanguageModel, inputs: dict[str, Tensor], max_new_tokens: int, progress: Progress
) -> Comparison:
    """Reads a prompt and generates `DECODINGS` times with each, after a short warm-up of both.

    The model is left as it was given.

    Raises:
        CommandError: where qkv runs none of the model's attention.
    """
    model, prompt_tokens = language_model.model, inputs["input_ids"].shape[1]
    runs = {name: Runs(prompt_tokens, [], []) for name in NAMES}
    try:
        with progress.step("warming up"):
            taken = _taken(language_model)
            few = {name: tensor[:, :WARM_UP_TOKENS] for name, tensor in inputs.items()}
            for name in NAMES:
                _switch(model, name)
                decode(language_model, few, prefill(language_model, few), 2, lambda done: None)
        with progress.step("reading the prompt"):
            while not _has_read_enough(runs):
                for name in NAMES:
                    _switch(model, name)
                    runs[name].prefills.append(prefill(language_model, inputs))
        with progress.step("generating", DECODINGS * len(NAMES) * max_new_tokens, "tokens") as on_progress:
            done = 0
            for _ in range(DECODINGS):
                for name in NAMES:
                    _switch(model, name)
                    read, shown = runs[name].prefills[-1], offset_progress(on_progress, done)
                    runs[name].decodings.append(decode(language_model, inputs, read, max_new_tokens, shown))
                    done += max_new_tokens
    finally:
        _switch(model, REFERENCE)
    return Comparison(runs, taken)


def _has_read_enough(runs: dict[str, Runs]) -> bool:
    seconds = [read.seconds for each in runs.values() for read in each.prefills]
    return sum(seconds) >= READ_SECONDS or len(seconds) >= len(NAMES) * DECODINGS


def _switch(model: Any, name: str) -> None:
    qkv.accelerate(model, enabled=name == OURS)


def _taken(language_model: LanguageModel) -> tuple[str, ...]:
    """The parts that qkv runs once it is switched on, attention among them."""
    _switch(language_model.model, OURS)
    report = qkv.report(language_model.model)
    taken = tuple(dict.fromkeys(part.subject for part in report.taken))
    if "attention" not in taken:
        reasons = "; ".join(f"{part.name}: {part.detail}" for part in report.left if part.subject == "attention")
        raise CommandError(
            f"--model: qkv does not run the attention of {language_model.name!r}: {reasons}. "
            "Give a model such as Llama, Mistral, Qwen or Gemma."
        )
    return taken
