"""`interleaved`: times candidates in turns, so that all of a round see the same state of the machine."""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import TypedDict


class Spread(TypedDict):
    """Microseconds per call: median and quartiles over rounds."""

    median_us: float
    low_us: float
    high_us: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    seconds_per_round: float = 0.02,
    rest_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Spread]:
    """The time of a call of each candidate.

    Args:
        candidates: functions to time, by name.
        rounds: measurements of each, at least 2.
        seconds_per_round: approximate duration of a measurement, of at least one call.
        rest_seconds: pause before each measurement, for candidates with different thread pools, whose threads spin
            after a call and block the cores. An untimed call follows the pause.
        clock: seconds; ``time.process_time`` with one thread, on a machine that others use as well.
        on_progress: called with the number of rounds done.
    """
    repeats = {name: _repeats(run, seconds_per_round, clock) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(1, rounds + 1):
        for name, run in candidates.items():
            if rest_seconds:
                time.sleep(rest_seconds)
                run()
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name] * 1e6)
        on_progress(done)
    return {name: spread(values) for name, values in times.items()}


def spread(microseconds: list[float]) -> Spread:
    """Median and quartiles of measurements."""
    low, _, high = quantiles(microseconds, n=4, method="inclusive")
    return {"median_us": round(median(microseconds), 2), "low_us": round(low, 2), "high_us": round(high, 2)}


def _repeats(run: Callable[[], object], seconds: float, clock: Callable[[], float]) -> int:
    """Number of calls that take about ``seconds``, estimated during a warm-up."""
    calls, start = 0, clock()
    while clock() - start < 5 * seconds or calls < 2:
        run()
        calls += 1
    return max(1, int(calls / 5))
