"""The study of attention over ranks: its formulas are what plans count, and its words follow the numbers."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from repository.studies import modules_of

from qkv.parallel import plan
from qkv.parallel.runs import even, rows_of, zigzag

M = modules_of("scale_out")
calls, findings, simulating = M["calls"], M["findings"], M["simulating"]
LAYOUTS = {"even": even, "zigzag": zigzag}


def made() -> Iterator[Any]:
    """Calls of all schemes, masks and layouts."""
    for scheme in calls.SCHEMES:
        for mask, layout in (("full", "even"), ("causal", "even"), ("causal", "zigzag"), ("window", "even")):
            for ranks, heads, kv_heads in ((2, 8, 8), (4, 8, 2), (8, 8, 1), (16, 4, 2)):
                for window in (1, 5, 30):
                    yield calls.Call(scheme, mask, layout, 96, ranks, heads, kv_heads, 16, window)


def planned(call: Any) -> list[float]:
    """What each rank sends, of the plans."""
    layout = LAYOUTS[call.layout](call.tokens, call.ranks)
    seen = plan.keys_seen(call.visible, layout, call.tokens, 0)
    key, query = 2 * call.kv_heads * call.width * 4, call.heads * call.width * 4
    if call.scheme == "gather":
        return [rows * key for rows in plan.gather_rows(seen, layout)]
    if call.scheme == "merge":
        sent, answered = plan.visit_rows(seen, layout, layout)
        answer = call.heads * (call.width + 1) * 4
        return [rows * query + others * answer for rows, others in zip(sent, answered, strict=True)]
    shares, found = plan.shares(call.heads, call.kv_heads, call.ranks), []
    of_head = call.width * 4
    for rank, own in enumerate(shares):
        total = 0
        for peer, share in enumerate(shares):
            if peer != rank:
                vectors = 2 * (share.keys[1] - share.keys[0]) + share.queries[1] - share.queries[0]
                total += rows_of(layout[rank]) * vectors * of_head
                total += rows_of(layout[peer]) * (own.queries[1] - own.queries[0]) * of_head
        found.append(total)
    return found


@pytest.mark.parametrize("call", list(made()), ids=str)
def test_formulas_are_what_plans_count(call: Any) -> None:
    assert calls.sent(call) == pytest.approx(planned(call))
    assert sum(calls.received(call)) == pytest.approx(sum(calls.sent(call)))


@pytest.mark.parametrize("call", [call for call in made() if call.scheme == "gather"], ids=str)
def test_scores_are_those_that_masks_show(call: Any) -> None:
    layout, mask = LAYOUTS[call.layout](call.tokens, call.ranks), call.visible
    of_rank = [sum(plan.pairs(mask, run, (0, call.tokens), 0) for run in runs) for runs in layout]
    assert calls.scores(call) == pytest.approx([call.heads * one for one in of_rank])


def planted(slope: float) -> dict[str, Any]:
    """Results in which time follows bytes, or their square root."""
    settings = M["settings"].Settings()
    made = list(calls.calls(settings))
    moved = [findings.busiest(call) for call in made]
    wire = [[sum(calls.sent(call)) * 1.002, None] for call in (*made, calls.long_window(settings))]
    return {
        "settings": settings._asdict(),
        "operations": 1e10,
        "measured": {"wire": wire, "links": {"1": [1e-3 + (one / 1.25e8) ** slope for one in moved]}},
    }


def test_findings_follow_the_numbers() -> None:
    right, wrong = planted(1.0), planted(0.5)
    start, bandwidth = simulating.line(right, "1")
    assert (start, bandwidth) == pytest.approx((1e-3, 1.25e8))
    assert findings.off_line(right, "1") < 1e-6 < 0.1 < findings.off_line(wrong, "1")
    assert all(ratio == pytest.approx(1.002) for _, ratio in findings.ratios(right))
    assert all(ratio == pytest.approx(1.0) for ratio in findings.half(right, "1"))
    assert all(least is fastest for least, fastest, _ in findings.chosen(right, "1"))


def test_more_ranks_than_heads_idle() -> None:
    kind = simulating.Machine("x", 1e12, 1e9, 0.0, 1e18)
    settings = M["settings"].Settings()
    few, many = (simulating.costs("causal", 10**6, ranks, kind, settings)[1] for ranks in (32, 1024))
    assert many.computing == pytest.approx(few.computing)
    gathered = simulating.costs("causal", 10**6, 1024, kind, settings)[0]
    assert gathered.computing == pytest.approx(few.computing / 32)


@pytest.mark.long
def test_small_calls_are_measured() -> None:
    separate = M["measuring"].SEPARATE
    done = shutil.which("unshare") and subprocess.run([*separate, "true"], capture_output=True, text=True)
    if not done or done.returncode:
        pytest.skip(f"this system does not allow mounting: {done and done.stderr}")
    settings = M["settings"].Settings(tokens=2048, width=16, window=64, long_tokens=4096, rates=(1,), repeats=1)
    found = M["measuring"].measured(settings)
    made = [*calls.calls(settings), calls.long_window(settings)]
    for call, (forward, backward) in zip(made, found["wire"], strict=True):
        assert 1 <= forward / sum(calls.sent(call)) < 1.3
        assert backward is None or 1 <= backward / sum(calls.sent(call)) < 1.3
    assert len(found["links"]["1"]) == len(made) - 1 and min(found["links"]["1"]) > 0
