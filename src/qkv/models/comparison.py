"""`compare`: the same generation with transformers' sdpa and with qkv, in interleaved runs."""

from typing import NamedTuple

from torch import Tensor

from qkv.models.generation import Run, generate, use_attention
from qkv.models.language_model import LanguageModel
from qkv.models.progress import Progress, offset_progress

REFERENCE, OURS = "sdpa", "qkv"
ORDER = (REFERENCE, OURS, OURS, REFERENCE)
"""The order of runs: each goes first once, so that a machine that warms up or throttles favours neither."""

ROUNDS = len(ORDER) // 2
WARM_UP_TOKENS = 2


class Comparison(NamedTuple):
    """The runs of `compare`."""

    runs: dict[str, list[Run]]
    """By attention implementation."""

    @property
    def identical(self) -> bool:
        """Whether all runs generated the same tokens."""
        return self.first_difference is None

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token that differs between runs; None if all are identical."""
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
        CommandError: where the model does not support one of them.
    """
    from qkv.integrations.transformers import register

    register()
    with progress.step("warming up"):
        for implementation in (REFERENCE, OURS):
            use_attention(language_model, implementation)
            generate(language_model, inputs, min(WARM_UP_TOKENS, max_new_tokens), lambda done: None)
    runs: dict[str, list[Run]] = {REFERENCE: [], OURS: []}
    with progress.step("generating", len(ORDER) * max_new_tokens, "tokens") as on_progress:
        for index, implementation in enumerate(ORDER):
            use_attention(language_model, implementation)
            run = generate(language_model, inputs, max_new_tokens, offset_progress(on_progress, index * max_new_tokens))
            runs[implementation].append(run)
    return Comparison(runs)
