"""Medians of interleaved runs: all candidates of a round see the same state of the machine."""

import time
from collections.abc import Callable
from statistics import median, quantiles


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int = 25, seconds_per_round: float = 0.02
) -> dict[str, dict[str, float]]:
    """Microseconds a call of each candidate: the median over rounds and its quartiles."""
    repeats = {name: _repeats(run, seconds_per_round) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: _summary(values) for name, values in times.items()}


def _repeats(run: Callable[[], object], seconds: float) -> int:
    """Calls that take about so long, after a warm-up."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5 * seconds or calls < 3:
        run()
        calls += 1
    return max(1, int(calls / 5))


def _summary(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median_us": round(median(values), 2), "low_us": round(low, 2), "high_us": round(high, 2)}
