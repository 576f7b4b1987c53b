"""`Findings`: evaluates the results by fixed rules, so that the page is correct for any outcome."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

PAPER_ORDER = ("mean", "first", "random")
"""Pooling methods from best to worst, according to the paper."""


class Findings:
    """Losses by number of key/value heads, method and percent of uptraining. All methods return a value per seed."""

    def __init__(self, results: dict[str, Any]) -> None:
        settings = results["settings"]
        self.multi_head: int = settings["num_heads"]
        self.num_kv_heads: list[int] = settings["num_kv_heads"]
        self.methods: list[str] = settings["methods"]
        self.percents: list[int] = settings["percents"]
        self.bigram_loss: float = results["text"]["bigram_loss"]
        self._runs = results["runs"]

    def loss(self, heads: int, how: str, percent: int) -> list[float]:
        """The held-out losses."""
        return [run["losses"][str(percent)] for run in self._runs if (run["num_kv_heads"], run["how"]) == (heads, how)]

    def multi_head_loss(self, percent: int) -> list[float]:
        """The losses of the multi-head model, trained for as many additional steps."""
        return self.loss(self.multi_head, "mean", percent)

    def gap(self, heads: int, how: str, percent: int) -> list[float]:
        """Loss of the converted model minus that of the equally trained multi-head model of its seed."""
        pairs = zip(self.loss(heads, how, percent), self.multi_head_loss(percent), strict=True)
        return [loss - multi_head for loss, multi_head in pairs]

    def kept(self, heads: int, how: str, percent: int) -> list[float]:
        """The share of the multi-head model's advantage over a bigram model that the converted model keeps."""
        pairs = zip(self.gap(heads, how, percent), self.multi_head_loss(percent), strict=True)
        return [1 - gap / (self.bigram_loss - multi_head) for gap, multi_head in pairs]

    def closed(self, heads: int, how: str, percent: int) -> list[float]:
        """The share of the gap after conversion that uptraining closes."""
        pairs = zip(self.gap(heads, how, 0), self.gap(heads, how, percent), strict=True)
        return [1 - now / at_first for at_first, now in pairs]

    def better(self, order: Sequence[str], percent: int, num_kv_heads: Iterable[int] | None = None) -> list[bool]:
        """For each number of heads and seed: whether the losses of the methods in ``order`` increase."""
        return [
            all(one < other for one, other in pairwise(losses))
            for heads in num_kv_heads or self.num_kv_heads
            for losses in zip(*(self.loss(heads, how, percent) for how in order), strict=True)
        ]


def of(hits: Sequence[bool]) -> str:
    """The number of hits, such as "2 of 3"."""
    return f"{sum(hits)} of {len(hits)}"


def verdict(hits: Sequence[bool]) -> str:
    """Hits in words: all, some or none."""
    if all(hits):
        return f"Yes, in {of(hits)}"
    return f"In {of(hits)}" if any(hits) else f"No, in none of {len(hits)}"
