"""The study of the review, with tiny sizes: it runs, its page follows from the numbers, and each verdict can fail."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repository.studies import modules_of

from qkv.bench.timing import interleaved

M = modules_of("the_review")
findings, heads, report, run, windows = (M[name] for name in ("findings", "heads", "report", "run", "windows"))
TINY = M["settings"].Settings(
    widths=(4, 64, 1024), scored=32, depth=3, window=4, lengths=(64, 128, 256), long_window=16, num_heads=2, head_dim=8,
    cached=(64, 256, 1024), cache_window=32, decode_heads=8, decode_kv_heads=(8, 2, 1), decode_dim=16, decode_keys=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What the study finds, as JSON has it."""
    patch = pytest.MonkeyPatch()
    for module in (heads, windows):
        patch.setattr(module, "interleaved", quick)
    patch.setattr(windows, "peak_memory", lambda mechanism, library: mechanism.sizes.length * 1000)
    patch.setattr(run, "limits", lambda: {"fp32_gflops": 100.0, "bf16_gflops": None, "read_gb_per_s": 20.0})
    try:
        found: dict[str, Any] = json.loads(json.dumps(run.study(TINY)))
    finally:
        patch.undo()
    return found


def quick(candidates: Any, **options: Any) -> Any:
    return interleaved(candidates, rounds=2, seconds_per_round=0.0)


@pytest.fixture
def planted(measured: dict[str, Any]) -> dict[str, Any]:
    """The same, with times as the review has them."""
    results = copy.deepcopy(measured)

    def spread(time: float) -> dict[str, float]:
        return {"median_us": time, "low_us": time, "high_us": time}

    cost = results["sliding-window"]["cost"]
    for kind, exponent in (("window", 1), ("causal", 2)):
        for passes in ("forward", "both"):
            cost["time_us"][f"{kind} {passes}"] = [spread(length**exponent) for length in cost["lengths"]]
    for times in results["multi-query"]["step_us"].values():
        times.update({n: spread(int(n) * 100.0) for n in times})
    return results


def test_the_study_measures_what_it_says_and_makes_its_page(measured: dict[str, Any], tmp_path: Path) -> None:
    assert measured["scaled dot-product"]["one_step"] == {"length": 12, "pairs": 144}
    assert measured["sliding-window"]["reach"]["causal"]["gradients"] == [4, 7, 10]
    assert measured["sliding-window"]["reach"]["both sides"]["gradients"] == [5, 9, 13]
    assert measured["multi-query"]["cache_bytes"] == {str(n): n * 64 * 16 * 2 * 2 for n in (8, 2, 1)}
    assert measured["sliding-window"]["cache"]["all"] == [2 * 2 * 16 * 4 * n for n in (64, 256, 1024)]
    (tmp_path / "README.md").write_text(f"By hand.\n\n{report.START}\nstale")
    report.write(measured, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("By hand.") and "stale" not in page
    assert page.count(" | yes |") + page.count(" | **no** |") == 21
    figures = {f"{name}.svg": (tmp_path / f"{name}.svg").read_text() for name in report.FIGURES}
    assert all(f"]({name})" in page and text.endswith("</svg>\n") for name, text in figures.items())
    report.write(measured, tmp_path)
    assert (tmp_path / "README.md").read_text() == page
    assert all((tmp_path / name).read_text() == text for name, text in figures.items())


def test_all_sentences_hold_where_the_review_is_right(planted: dict[str, Any]) -> None:
    found = findings.sentences(planted)
    assert [each.says for each in found if not each.holds] == []
    assert list(dict.fromkeys(each.mechanism for each in found)) == [
        *("scaled dot-product", "multi-head", "cross", "causal", "sliding-window", "multi-query", "grouped-query")
    ]


def put(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(results: dict[str, Any]) -> None:
        for key in keys[:-1]:
            results = results[key]
        results[keys[-1]] = to

    return change


SCORES, WINDOW = ("scaled dot-product",), ("sliding-window",)
LINES = (*WINDOW, "cost", "time_us")
SLOW = [{"median_us": float(n**2)} for n in (64, 128, 256)]
WRONG = [
    ("sum to 1", put(*SCORES, "sum_error", to=0.1)),
    ("sum to 1", put(*SCORES, "smallest_weight", to=-0.1)),
    ("weighted sum of the values", put(*SCORES, "sum_of_values_error", to=0.1)),
    ("root of d_k", put(*SCORES, "saturation", 2, "scaled_gradient", to=0.1)),
    ("root of d_k", put(*SCORES, "saturation", 2, "unscaled_gradient", to=9.0)),
    ("in one step", put(*SCORES, "one_step", "pairs", to=143)),
    ("projected once more", put("multi-head", "one_by_one_error", to=1e-6)),
    ("layer of frameworks", put("multi-head", "from_torch_error", to=1e-6)),
    ("layer of frameworks", put("multi-head", "to_torch_error", to=1e-6)),
    ("of another length", put("cross", "keys", to=7)),
    ("second sequence's values", put("cross", "sum_of_values_error", to=1e-6)),
    ("projected once, and reused", put("cross", "projections", to=7)),
    ("projected once, and reused", put("cross", "steps_error", to=1e-6)),
    ("later ones", put("causal", "later_gradients", to=1)),
    ("later ones", put("causal", "earlier_gradients", to=0)),
    ("one by one", put("causal", "chunk_errors", "uneven", to=1e-3)),
    ("half a window", put(*WINDOW, "visible", "both sides", to=[3, 2, 1, 0, -1])),
    ("half a window", put(*WINDOW, "visible", "causal", to=[4, 3, 2, 1, 0])),
    ("Time is linear", put(*LINES, "window forward", to=SLOW)),
    ("Time is linear", put(*LINES, "window both", to=SLOW)),
    ("Time is linear", put(*LINES, "causal both", to=[{"median_us": 1.0}] * 3)),
    ("Memory is linear", put(*WINDOW, "cost", "peak_bytes", "window", to=[64**2, 128**2, 256**2])),
    ("Memory is linear", put(*WINDOW, "cost", "peak_bytes", "window", to=[None, None, None])),
    ("see further", put(*WINDOW, "reach", "causal", "gradients", to=[4, 7, 9])),
    ("see further", put(*WINDOW, "reach", "both sides", "bits_outside", to=[0, 0, 1])),
    ("stops growing", put(*WINDOW, "cache", "window", to=[1, 2, 3])),
    ("number of heads", put("multi-query", "cache_bytes", "1", to=4097)),
    ("Decoding is faster", put("multi-query", "step_us", "qkv", "1", "median_us", to=300.0)),
    ("as many groups as heads", put("grouped-query", "equal_bits", "multi-query", to=False)),
    ("between them", put("multi-query", "step_us", "qkv", "2", "median_us", to=900.0)),
    ("mean of the keys", put("grouped-query", "pooling_error", to=0.1)),
]


@pytest.mark.parametrize("says, change", WRONG, ids=range(len(WRONG)))
def test_a_sentence_is_not_shown_by_numbers_against_it(
    says: str, change: Callable[[dict[str, Any]], None], planted: dict[str, Any], tmp_path: Path
) -> None:
    change(planted)
    failed = [each.says for each in findings.sentences(planted) if not each.holds]
    assert any(says in each for each in failed) and len(failed) <= 2, failed
    if says != "Memory is linear":  # the figure of which needs the numbers of all
        page = report.summary(planted)
        assert f"show {21 - len(failed)}." in page and all(f": {each}" in page for each in failed)


def test_each_sentence_is_tried(planted: dict[str, Any]) -> None:
    tried = [says for says, _ in WRONG]
    assert all(any(says in each.says for says in tried) for each in findings.sentences(planted))


@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
def test_the_power_of_a_cost_is_its_slope(exponent: float) -> None:
    lengths = [64, 128, 300, 1000]
    assert findings.power(lengths, [7 * n**exponent for n in lengths]) == pytest.approx(exponent, abs=1e-9)
    assert findings.power([1, 10], [1, 10 * math.e]) == pytest.approx(1 + 1 / math.log(10))
