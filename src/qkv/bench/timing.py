"""Medians of interleaved runs: all candidates of a round see the same state of the machine."""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import TypedDict


class Spread(TypedDict):
    """Microseconds a call: the median over rounds, and the quartiles."""

    median_us: float
    low_us: float
    high_us: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    seconds_per_round: float = 0.02,
    rest_seconds: float = 0.0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Spread]:
    """How long a call of each candidate takes.

    Args:
        candidates: what to call, by name.
        rounds: how often each takes its turn, at least 2.
        seconds_per_round: how long a turn lasts about; one call at least.
        rest_seconds: a pause before each turn, for candidates whose threads are not the same: after a call, threads
            spin for a while in wait of the next, and take the cores from others. The first call after it does not
            count.
        on_progress: told how many rounds are done.
    """
    repeats = {name: _repeats(run, seconds_per_round) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(1, rounds + 1):
        for name, run in candidates.items():
            if rest_seconds:
                time.sleep(rest_seconds)
                run()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
        on_progress(done)
    return {name: spread(values) for name, values in times.items()}


def spread(microseconds: list[float]) -> Spread:
    """The median and the quartiles of single measurements."""
    low, _, high = quantiles(microseconds, n=4, method="inclusive")
    return {"median_us": round(median(microseconds), 2), "low_us": round(low, 2), "high_us": round(high, 2)}


def _repeats(run: Callable[[], object], seconds: float) -> int:
    """Calls that take about so long, after a warm-up."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5 * seconds or calls < 2:
        run()
        calls += 1
    return max(1, int(calls / 5))
