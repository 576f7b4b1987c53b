"""`compare`: the same generation with transformers' stock attention and with qkv's, taking turns."""

from typing import NamedTuple

from torch import Tensor

from qkv.models.generation import Run, generate, use_attention
from qkv.models.language_model import LanguageModel
from qkv.models.progress import Progress, after

STOCK, OURS = "sdpa", "qkv"
TURNS = (STOCK, OURS, OURS, STOCK)
"""Who generates when: each goes first once, so that a machine that warms up or slows down favours neither."""

ROUNDS = len(TURNS) // 2
WARM_UP_TOKENS = 2


class Comparison(NamedTuple):
    """All runs, by the name of the implementation."""

    runs: dict[str, list[Run]]

    @property
    def identical(self) -> bool:
        """Whether all runs gave the same tokens."""
        return self.first_difference is None

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token in which two runs differ."""
        texts = [run.tokens for runs in self.runs.values() for run in runs]
        if len(set(texts)) == 1:
            return None
        columns = zip(*texts, strict=False)
        return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))


def compare(
    language_model: LanguageModel, inputs: dict[str, Tensor], max_new_tokens: int, progress: Progress
) -> Comparison:
    """Generates `ROUNDS` times with each implementation, after a short warm-up of both.

    Raises:
        CommandError: where the model does not run on one of them.
    """
    from qkv.integrations.transformers import register

    register()
    with progress.step("warming up"):
        for implementation in (STOCK, OURS):
            use_attention(language_model, implementation)
            generate(language_model, inputs, min(WARM_UP_TOKENS, max_new_tokens), lambda done: None)
    runs: dict[str, list[Run]] = {STOCK: [], OURS: []}
    with progress.step("generating", len(TURNS) * max_new_tokens, "tokens") as on_progress:
        for turn, implementation in enumerate(TURNS):
            use_attention(language_model, implementation)
            run = generate(language_model, inputs, max_new_tokens, after(turn * max_new_tokens, on_progress))
            runs[implementation].append(run)
    return Comparison(runs)
