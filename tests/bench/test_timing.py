"""Interleaved runs: which candidate runs when, and the statistics of the times."""

from qkv.bench.timing import interleaved, spread


def test_candidates_are_interleaved_and_progress_is_reported():
    calls, done = [], []

    def candidate(name):
        return lambda: calls.append(name)

    times = interleaved(
        {"a": candidate("a"), "b": candidate("b")}, rounds=3, seconds_per_round=0.0, on_progress=done.append
    )
    assert calls == ["a", "a", "b", "b", *"ababab"]  # Two calls to warm up, then one in each turn.
    assert done == [1, 2, 3]
    assert times.keys() == {"a", "b"}


def test_first_call_after_a_pause_does_not_count():
    calls = []
    interleaved({"a": lambda: calls.append("a")}, rounds=2, seconds_per_round=0.0, rest_seconds=1e-3)
    assert len(calls) == 2 + 2 * 2


def test_spread_lies_within_the_measurements():
    assert spread([1.0, 9.0]) == {"median_us": 5.0, "low_us": 3.0, "high_us": 7.0}
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_us": 3.0, "low_us": 2.0, "high_us": 4.0}
