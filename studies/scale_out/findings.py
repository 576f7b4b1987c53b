"""Evaluates the results by fixed rules, so that the page is correct for any outcome."""

from typing import Any

from calls import Call, long_window, received, sent
from simulating import calls_of, line, points, settings_of

NEAR = 0.01
"""The relative difference from a formula that counts as none."""
ALIKE = 1.25
"""How many times as long as another call one may take, and count as as long."""


def ratios(results: dict[str, Any]) -> list[tuple[Call, float]]:
    """For each call, what all ranks sent on the wire, relative to the formula."""
    made = [*calls_of(results), long_window(settings_of(results))]
    forward = [numbers[0] for numbers in results["measured"]["wire"]]
    return [(call, bytes_ / sum(sent(call))) for call, bytes_ in zip(made, forward, strict=True)]


def busiest(call: Call) -> float:
    """The bytes that the busiest rank sends or receives."""
    return max(*sent(call), *received(call))


def times(results: dict[str, Any], rate: str) -> dict[Call, float]:
    """Seconds by call."""
    return dict(zip(calls_of(results), results["measured"]["links"][rate], strict=True))


def half(results: dict[str, Any], rate: str) -> list[float]:
    """How long a causal gather takes over even runs, relative to that of a full mask, which sends twice as much."""
    found = times(results, rate)
    return [
        seconds / found[call._replace(mask="full")]
        for call, seconds in found.items()
        if (call.scheme, call.mask, call.layout) == ("gather", "causal", "even")
    ]


def chosen(results: dict[str, Any], rate: str) -> list[tuple[Call, Call, float]]:
    """For each mask and number of KV heads: the scheme whose busiest rank moves least, the fastest, and how many times
    as long the first takes.
    """
    found, groups = times(results, rate), {}
    for call in found:
        groups.setdefault(call._replace(scheme=""), []).append(call)
    picks = []
    for group in groups.values():
        least, fastest = min(group, key=busiest), min(group, key=found.__getitem__)
        picks.append((least, fastest, found[least] / found[fastest]))
    return picks


def off_line(results: dict[str, Any], rate: str) -> float:
    """The largest relative distance of a time from the line."""
    start, bandwidth = line(results, rate)
    moved, seconds = points(results, rate)
    return max(abs(s / (start + m / bandwidth) - 1) for m, s in zip(moved, seconds, strict=True))
