"""`generate`: greedy generation with timings of prefill and decoding."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, quiet
from qkv.models.progress import OnProgress


class Run(NamedTuple):
    """Tokens and timings of one generation."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    """The new tokens."""
    prefill_seconds: float
    """Time to the first new token."""
    decode_seconds: float
    """Time of all later tokens."""
    cache: Any
    """transformers' cache after the generation."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None if there is only one."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 else None


class _Clock:
    """A transformers streamer that records when the prompt and each new token arrive."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.times: list[float] = []
        self._on_progress = on_progress

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self._on_progress(len(self.times) - 1)

    def end(self) -> None:
        """Required of streamers; nothing to do."""


def use_attention(language_model: LanguageModel, implementation: str) -> None:
    """Switches the model to ``implementation``, such as "sdpa" or "qkv".

    Raises:
        CommandError: where the model does not support it.
    """
    model = language_model.model
    cause = "it keeps its own attention"
    with quiet():
        try:
            model.set_attn_implementation(implementation)
        except ValueError as error:
            cause = str(error).split(". ")[0]
    if model.config._attn_implementation != implementation:
        raise CommandError(
            f"--model: {language_model.name!r} does not support attn_implementation={implementation!r}: {cause}. "
            "Give a model such as Llama, Mistral, Qwen or Gemma."
        )


def generate(
    language_model: LanguageModel, inputs: dict[str, Tensor], max_new_tokens: int, on_progress: OnProgress
) -> Run:
    """Generates greedily with the current attention. ``on_progress`` is called with the number of new tokens."""
    clock = _Clock(on_progress)
    with quiet():
        output = language_model.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            streamer=clock,
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    start, first, *_ = clock.times
    tokens = tuple(output.sequences[0, prompt_tokens:].tolist())
    return Run(prompt_tokens, tokens, first - start, clock.times[-1] - first, output.past_key_values)


def fastest(runs: Iterable[Run]) -> tuple[float, float | None]:
    """The highest prefill and decoding rates (tokens per second): other load on the machine can only lower them."""
    runs = list(runs)
    decode = [run.decode_rate for run in runs if run.decode_rate is not None]
    return max(run.prefill_rate for run in runs), max(decode, default=None)
