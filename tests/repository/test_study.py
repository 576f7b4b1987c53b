"""The study of grouped-query attention, with tiny sizes: it runs, it goes on, and its words follow the numbers."""

import json
import math
import sys
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "studies" / "grouped_query"))

import decoding  # noqa: E402
import findings  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from model import LanguageModel, converted  # noqa: E402
from settings import Settings  # noqa: E402
from text import PRIOR, Text, bigram_loss, encode  # noqa: E402
from training import Training, held_out_loss  # noqa: E402

from qkv.bench.timing import interleaved  # noqa: E402

TINY = Settings(
    seeds=(0,), vocabulary=300, num_layers=1, num_heads=4, head_dim=4, batch=2, length=16, steps=20, warmup=5,
    num_kv_heads=(2, 1), context=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def text() -> Text:
    held_out = (ROOT / "CONTRIBUTING.md").read_text()[:1500]  # evaluated 27 times
    return encode((ROOT / "DESIGN.md").read_text(), held_out, TINY.vocabulary)


@pytest.fixture(scope="module")
def model(text: Text) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    Training(model, text.train, TINY, seed=0).run(range(TINY.steps))
    return model


def test_study_writes_results_resumes_and_makes_its_page(text, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setattr(decoding, "interleaved", partial(interleaved, rounds=2, seconds_per_round=0.0))
    run.study(TINY, text, path)
    results = json.loads(path.read_text())
    kinds = Counter((each["num_kv_heads"], each["how"]) for each in results["runs"])
    assert kinds == Counter([(4, "mean"), *((heads, how) for heads in (2, 1) for how in TINY.methods)])
    for losses in (each["losses"] for each in results["runs"]):
        assert losses.keys() == {"0", "5", "10"} and all(0 < loss < 2 * math.log(300) for loss in losses.values())
    weights = {heads: step["kv_bytes_per_token"] for heads, step in results["decoding"].items()}
    assert weights == {"4": 128, "2": 64, "1": 32}  # Two tensors of 4 channels a head, in fp32.

    monkeypatch.setattr(run, "runs_of_seed", lambda *args: pytest.fail("trained again what was there"))
    run.study(TINY, text, path)
    assert json.loads(path.read_text())["runs"] == results["runs"]
    with pytest.raises(pytest.fail.Exception):
        run.study(TINY._replace(warmup=6), text, path)

    (tmp_path / "README.md").write_text(f"By hand.\n\n{report.START}\nstale")
    report.write(results, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("By hand.") and "stale" not in page and "| 1 | aligned | " in page
    assert "</svg>" in (tmp_path / report.FIGURE).read_text()
    report.write(results, tmp_path)
    assert (tmp_path / "README.md").read_text() == page


def test_conversion_to_all_heads_changes_nothing_and_leaves_the_model_alone(model, text):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = converted(model, TINY.num_heads, "mean", seed=0)
    assert held_out_loss(copy, text.held_out, TINY) == held_out_loss(model, text.held_out, TINY)
    run.uptrain(copy, text, TINY, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_and_seeds_draw_different_heads():
    model = LanguageModel(TINY._replace(num_layers=2))
    drawn = [
        projection.weight
        for seed in (0, 1)
        for layer in converted(model, 1, "random", seed).attentions
        for projection in (layer.k_proj, layer.v_proj)
    ]
    normed = torch.stack([weight.flatten() / weight.norm() for weight in drawn])
    off_diagonal = normed @ normed.mT - torch.eye(len(drawn))
    assert off_diagonal.abs().max() < 0.9  # 1 where the same numbers are drawn; 64 of them differ by about 1 / 8.


def test_training_in_parts_is_training_at_once(model, text):
    parts, whole = converted(model, 2, "mean", seed=0), converted(model, 2, "mean", seed=0)
    training = Training(parts, text.train, TINY, seed=0)
    training.run(range(40, 42))
    training.run(range(42, 44))
    Training(whole, text.train, TINY, seed=0).run(range(40, 44))
    assert all(torch.equal(one, other) for one, other in zip(parts.parameters(), whole.parameters(), strict=True))


@torch.no_grad()
def test_held_out_loss_weighs_every_token_alike(model, text):
    tokens = text.held_out[: 5 * TINY.length + 1]  # Five sequences, in batches of 2, 2 and 1.
    with torch.autocast("cpu", torch.bfloat16):
        chances = [
            model(tokens[None, start : start + TINY.length]).float().log_softmax(-1)[0, row, tokens[start + row + 1]]
            for start in range(0, 5 * TINY.length, TINY.length)
            for row in range(TINY.length)
        ]
    assert held_out_loss(model, tokens, TINY) == pytest.approx(-float(torch.stack(chances).mean()), rel=1e-5)


def test_pairs_loss_counts_pairs():
    train, held_out = [0, 1, 0, 1, 0, 2], [0, 1, 2]
    singles = {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}  # One more than counted.
    after = {0: {1: 2, 2: 1}, 1: {0: 2}}
    chances = [
        (after[one].get(other, 0) + PRIOR * singles[other]) / (sum(after[one].values()) + PRIOR)
        for one, other in pairwise(held_out)
    ]
    loss = bigram_loss(Text(torch.tensor(train), torch.tensor(held_out), 3))
    assert loss == pytest.approx(-sum(map(math.log, chances)) / 2)


def planted(losses: dict[str, list[float]]) -> findings.Findings:
    """Two seeds, of which the second is worse by 0.1; all numbers of heads alike; the multi-head model at 3.0."""
    kinds = [(4, "mean", [3.0, 3.0, 3.0]), *((heads, how, losses[how]) for heads in (2, 1) for how in losses)]
    runs = [
        {"seed": seed, "num_kv_heads": heads, "how": how,
         "losses": {str(percent): loss + seed / 10 for percent, loss in zip((0, 5, 10), values, strict=True)}}
        for seed in (0, 1) for heads, how, values in kinds
    ]  # fmt: skip
    return findings.Findings({"settings": TINY._asdict(), "text": {"bigram_loss": 4.1}, "runs": runs})


def test_findings_are_those_of_the_numbers():
    found = planted(
        {"mean": [4.0, 3.2, 3.1], "first": [4.5, 3.3, 3.2], "random": [6.0, 3.4, 3.0], "aligned": [3.5, 3.1, 3.0]}
    )
    assert found.gap(2, "mean", 5) == pytest.approx([0.2, 0.2])
    assert found.closed(2, "mean", 5) == pytest.approx([0.8, 0.8])
    assert found.kept(1, "mean", 0) == pytest.approx([0.1 / 1.1, 0.0])
    assert found.better(findings.PAPER_ORDER, 5) == [True] * 4
    assert found.better(findings.PAPER_ORDER, 10, [1]) == [False, False]


def test_answers_are_those_of_the_numbers():
    as_the_paper = report.answers(planted({
        "mean": [4.0, 3.2, 3.1], "first": [4.5, 3.3, 3.2], "random": [6.0, 3.4, 3.3], "aligned": [3.5, 3.1, 3.0],
    }))  # fmt: skip
    assert "**mean < first < random?** Yes, in 4 of 4 comparisons" in as_the_paper
    assert "**Does grouped-query attention work at once?** No, in none of 2 comparisons" in as_the_paper
    assert "**And multi-query attention after 5% only?** Yes, in 2 of 2 seeds" in as_the_paper
    assert "**Does 5% close most of the gap?** Yes, in 4 of 4 comparisons" in as_the_paper
    reversed_and_useless = report.answers(planted({
        "mean": [3.3, 3.25, 3.2], "first": [3.2, 3.1, 3.1], "random": [3.1, 3.0, 3.0], "aligned": [3.5, 3.4, 3.3],
    }))  # fmt: skip
    assert "**mean < first < random?** No, in none of 4 comparisons" in reversed_and_useless
    assert "**Does grouped-query attention work at once?** Yes, in 2 of 2 comparisons" in reversed_and_useless
    assert "**And multi-query attention after 5% only?** No, in none of 2 seeds" in reversed_and_useless
    assert "**Does 5% close most of the gap?** No, in none of 4 comparisons" in reversed_and_useless
