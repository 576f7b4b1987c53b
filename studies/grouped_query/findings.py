"""What the numbers say, counted by rule, so that the page is right whichever way they come out."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

SUPPOSED = ("mean", "first", "random")
"""From the best to the worst, says the paper."""


class Findings:
    """The losses by number of key/value heads, method and percent of uptraining, a number for each seed."""

    def __init__(self, results: dict[str, Any]) -> None:
        settings = results["settings"]
        self.multi_head: int = settings["num_heads"]
        self.num_kv_heads: list[int] = settings["num_kv_heads"]
        self.methods: list[str] = settings["methods"]
        self.percents: list[int] = settings["percents"]
        self.pairs_loss: float = results["text"]["pairs_loss"]
        self._runs = results["runs"]

    def loss(self, heads: int, how: str, percent: int) -> list[float]:
        """The held-out losses."""
        return [run["losses"][str(percent)] for run in self._runs if (run["num_kv_heads"], run["how"]) == (heads, how)]

    def multi_head_loss(self, percent: int) -> list[float]:
        """Of the multi-head model itself, after as much more training."""
        return self.loss(self.multi_head, "mean", percent)

    def gap(self, heads: int, how: str, percent: int) -> list[float]:
        """How much more a converted model loses than the multi-head model of its seed after as much more training."""
        pairs = zip(self.loss(heads, how, percent), self.multi_head_loss(percent), strict=True)
        return [loss - ceiling for loss, ceiling in pairs]

    def kept(self, heads: int, how: str, percent: int) -> list[float]:
        """The share that is left of what the multi-head model gains over a model of pairs of tokens."""
        pairs = zip(self.gap(heads, how, percent), self.multi_head_loss(percent), strict=True)
        return [1 - gap / (self.pairs_loss - ceiling) for gap, ceiling in pairs]

    def closed(self, heads: int, how: str, percent: int) -> list[float]:
        """The share of the gap right after conversion that uptraining has closed."""
        pairs = zip(self.gap(heads, how, 0), self.gap(heads, how, percent), strict=True)
        return [1 - now / at_first for at_first, now in pairs]

    def better(self, order: Sequence[str], percent: int, num_kv_heads: Iterable[int] | None = None) -> list[bool]:
        """For each number of heads and seed: whether each method of ``order`` loses less than the next."""
        return [
            all(one < other for one, other in pairwise(losses))
            for heads in num_kv_heads or self.num_kv_heads
            for losses in zip(*(self.loss(heads, how, percent) for how in order), strict=True)
        ]


def of(hits: Sequence[bool]) -> str:
    """As in "2 of 3"."""
    return f"{sum(hits)} of {len(hits)}"


def verdict(hits: Sequence[bool]) -> str:
    """Yes, no, or how often."""
    if all(hits):
        return f"Yes, in {of(hits)}"
    return f"In {of(hits)}" if any(hits) else f"No, in none of {len(hits)}"
