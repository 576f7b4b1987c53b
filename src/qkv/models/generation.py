"""`prefill` and `decode`: greedy generation in two parts, each with its timings."""

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.integrations.transformers.cache_argument import cache_name, cache_of
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, quiet
from qkv.models.progress import OnProgress


class Prefill(NamedTuple):
    """A prompt that a model has read."""

    seconds: float
    cache: Any
    """transformers' cache, or qkv's, with the prompt's tokens"""
    token: Tensor
    """(1, 1), the first new token"""


class Decoding(NamedTuple):
    """What a model has generated after a prompt."""

    tokens: tuple[int, ...]
    """The new tokens, that of the prefill first."""
    steps: tuple[float, ...]
    """Seconds of each token after the first."""


class _Clock:
    """A transformers streamer that records when the prompt and each new token arrive."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.times: list[float] = []
        self._on_progress = on_progress

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self._on_progress(len(self.times))

    def end(self) -> None:
        """Required of streamers; nothing to do."""


@torch.no_grad()
def prefill(language_model: LanguageModel, inputs: dict[str, Tensor]) -> Prefill:
    """Reads a prompt in one call, into the cache that the model makes.

    Raises:
        CommandError: for a model without a cache of keys and values.
    """
    with quiet():
        start = time.perf_counter()
        output = language_model.model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        seconds = time.perf_counter() - start
    cache = cache_of(output)
    if all(getattr(layer, "keys", None) is None for layer in getattr(cache, "layers", ())):
        raise CommandError(
            f"--model: {language_model.name!r} makes no cache of keys and values, so it has no attention to compare. "
            "Give a model such as Llama, Mistral, Qwen or Gemma."
        )
    return Prefill(seconds, cache, token)


def decode(
    language_model: LanguageModel,
    inputs: dict[str, Tensor],
    read: Prefill,
    max_new_tokens: int,
    on_progress: OnProgress,
) -> Decoding:
    """Generates greedily from a copy of the cache. ``on_progress`` is called with the number of new tokens."""
    first = int(read.token)
    if max_new_tokens == 1 or first in _stops(language_model.model):
        on_progress(1)
        return Decoding((first,), ())
    ids, clock = torch.cat([inputs["input_ids"], read.token], dim=1), _Clock(on_progress)
    with quiet():
        output = language_model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{cache_name(): copy.deepcopy(read.cache)},
            max_new_tokens=max_new_tokens - 1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            streamer=clock,
        )
    tokens = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
    return Decoding(tokens, tuple(after - before for before, after in zip(clock.times, clock.times[1:], strict=False)))


def _stops(model: Any) -> list[int]:
    """The tokens that end a text."""
    stops: int | list[int] | None = model.generation_config.eos_token_id
    return stops if isinstance(stops, list) else [] if stops is None else [stops]
