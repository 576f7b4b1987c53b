"""`generate`: greedy generation, with the time of prefill and decoding."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, quiet
from qkv.models.progress import OnProgress


class Run(NamedTuple):
    """One generation."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    """The new ones."""
    prefill_seconds: float
    """Until the first new token."""
    decode_seconds: float
    """For all later ones."""
    cache: Any
    """transformers' cache afterwards."""

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second; None where the first was the last."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 else None


class _Clock:
    """A streamer, which transformers calls with the prompt and then with each new token."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.times: list[float] = []
        self._on_progress = on_progress

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self._on_progress(len(self.times) - 1)

    def end(self) -> None:
        pass


def use_attention(language_model: LanguageModel, implementation: str) -> None:
    """Switches the model to ``implementation``, such as "sdpa" or "qkv".

    Raises:
        CommandError: where the model does not take it.
    """
    model = language_model.model
    cause = "it keeps its own"
    with quiet():
        try:
            model.set_attn_implementation(implementation)
        except ValueError as error:
            cause = str(error).split(". ")[0]
    if model.config._attn_implementation != implementation:
        raise CommandError(
            f"--model: {language_model.name!r} does not run with attn_implementation={implementation!r}: {cause}. "
            "Give a model whose attention can be switched, such as Llama, Mistral, Qwen or Gemma."
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
    """The best rates of prefill and decoding among runs: what else the machine does only ever slows them down."""
    runs = list(runs)
    decode = [run.decode_rate for run in runs if run.decode_rate is not None]
    return max(run.prefill_rate for run in runs), max(decode, default=None)
