"""Evaluates the results by fixed rules, so that the page is correct for any outcome."""

import math
from collections.abc import Sequence
from typing import Any

RANKS = 0.7
"""The rank correlation from which on a screen counts as ranking layers as the price does."""
WORSE = 1.5
"""How many times the increase by price the increase by a screen may be, and count as no worse a choice."""


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The rank correlation; equal numbers share the mean of their ranks, and NaN stands where all are equal."""
    a, b = ranks(one), ranks(other)
    middle = (len(a) - 1) / 2
    products = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return products / size if size else math.nan


def ranks(numbers: Sequence[float]) -> list[float]:
    """The place of each among all, from 0."""
    below = [sum(other < number for other in numbers) for number in numbers]
    equal = [sum(other == number for other in numbers) for number in numbers]
    return [first + (count - 1) / 2 for first, count in zip(below, equal, strict=True)]


def correlations(results: dict[str, Any]) -> dict[str, list[float]]:
    """The rank correlation of each screen with the price, stage by stage."""
    stages = results["measured"].values()
    names = next(iter(stages))["screens"]
    return {name: [spearman(stage["screens"][name], stage["price"]) for stage in stages] for name in names}


def between_stages(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """The rank correlation of the prices of each two stages."""
    stages = list(results["measured"].items())
    return [
        (name, other, spearman(stage["price"], another["price"]))
        for n, (name, stage) in enumerate(stages)
        for other, another in stages[n + 1 :]
    ]


def half_of(results: dict[str, Any]) -> list[int]:
    """The half of the layers that cost least on the first text, without sinks, which configurations do not have."""
    price = next(stage for name, stage in results["measured"].items() if name.endswith(", 0"))["price"]
    return sorted(sorted(range(len(price)), key=price.__getitem__)[: len(price) // 2])


def closed(results: dict[str, Any], name: str, original: str) -> tuple[float, float]:
    """The gap of a model to the original, before training and after training both."""
    one, other = results["trained"][name]["losses"], results["trained"][original]["losses"]
    return one["converted"] - other["converted"], one["uptrained"] - other["uptrained"]
