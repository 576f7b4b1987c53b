"""The study of windows in SmolLM2, on a tiny model: it measures, goes on, and its words follow the numbers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.small import build
from repository.studies import modules_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making


M = modules_of("windows_smollm2")
findings, measuring, report, run, training = (M[n] for n in ("findings", "measuring", "report", "run", "training"))
TINY = M["settings"].Settings(tokens=23, window=5, sinks=(0, 2), parts=2)
IDS = torch.randint(3, 96, (1, 23), generator=torch.Generator().manual_seed(0))


def loss_with(model: Any, changed: list[int], sinks: int) -> float:
    """The loss with a window in some layers, of masks that are written out."""
    query, key = torch.arange(23)[:, None], torch.arange(23)
    hidden = (key <= query - TINY.window) & (key >= sinks)

    def narrow(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    model.set_attn_implementation("eager")
    layers = [model.model.layers[n].self_attn for n in changed]
    handles = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits[0, :-1].double()
    for handle in handles:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits, IDS[0, 1:]).item()


@pytest.mark.parametrize("sinks", [0, 2])
def test_measurements_are_those_of_masks_written_out(sinks: int) -> None:
    model = build("llama")
    found = measuring.measured(model, IDS, sinks, TINY)
    loss = loss_with(model, [], sinks)
    assert found["loss"] == pytest.approx(loss, abs=2e-4)
    assert found["price"] == pytest.approx([loss_with(model, [n], sinks) - loss for n in range(2)], abs=4e-4)
    assert [len(some["layers"]) for some in found["together"]] == [1, 2]
    for some in found["together"]:
        for which in ("", "_by_screen"):
            expected = loss_with(model, some[f"layers{which}"], sinks) - loss
            assert some[f"increase{which}"] == pytest.approx(expected, abs=4e-4)
    cut = found["screens"][measuring.SCREEN]
    assert found["together"][0]["layers"] == [min(range(2), key=found["price"].__getitem__)]
    assert found["together"][0]["layers_by_screen"] == [min(range(2), key=cut.__getitem__)]
    whole, one = found["cache_bytes"], found["together"][0]["cache_bytes"]
    assert one == whole / 2 + whole / 2 * (TINY.window + sinks) / 23
    assert all(len(numbers) == 2 and all(map(math.isfinite, numbers)) for numbers in found["screens"].values())


def planted(better: bool) -> dict[str, Any]:
    """Four layers, whose screen ranks them as the price does, or the other way round."""
    price = [0.1, 0.4, 0.2, 0.3]

    def stage(shift: float) -> dict[str, Any]:
        together = [
            {"layers": list(range(n)), "increase": 0.05 * n, "cache_bytes": 1024 * (4 - n), "layers_by_screen": [0],
             "increase_by_screen": 0.05 * n if better else 0.2 * n}
            for n in (2, 4)
        ]  # fmt: skip
        cut = price if better else [-number for number in price]
        return {
            "layers": [f"model.layers.{n}.self_attn" for n in range(4)],
            "loss": 3.0,
            "cache_bytes": 4096,
            "price": [number + shift for number in price],
            "screens": {measuring.SCREEN: cut, "distance": [1.0, 2.0, 3.0, 4.0]},
            "together": together,
        }

    def losses(before: float, after: float) -> dict[str, Any]:
        return {
            "steps": 7,
            "tokens": 7168,
            "held_out_tokens": 2048,
            "losses": {"converted": before, "uptrained": after},
        }

    return {
        "machine": dict.fromkeys(("date", "threads", "cores", "cpu", "kernel", "qkv", "torch"), "x"),
        "settings": json.loads(json.dumps(TINY._asdict())),
        "measured": {"King Lear, 0": stage(0.0), "King Lear, 2": stage(0.1)},
        "trained": {
            training.ORIGINAL: losses(4.0, 3.5),
            training.HALF: losses(4.5, 3.6),
            training.ALL: losses(6.0, 3.75),
        },
    }


def test_words_are_those_of_the_numbers(tmp_path: Path) -> None:
    pages = {}
    for better in (True, False):
        (tmp_path / "README.md").write_text(f"By hand.\n\n{report.START}\nstale")
        report.write(planted(better), tmp_path)
        pages[better] = (tmp_path / "README.md").read_text()
        report.write(planted(better), tmp_path)
        assert (tmp_path / "README.md").read_text() == pages[better]
    right, wrong = pages[True], pages[False]
    assert right.startswith("By hand.") and "stale" not in right
    assert "**Yes**" in right and "1.00 to 1.00" in right and "In 2 of 2 choices" in right
    assert "**No**" in wrong and "-1.00 to -1.00" in wrong and "In 0 of 2 choices" in wrong
    assert "| distance | +0.40 | +0.40 |" in right
    assert "| King Lear, no sinks | King Lear, 2 sinks | +1.00 |" in right
    assert "Windows in all layers: +2.0000 nats before training, +0.2500 after it." in right
    assert "Windows in the cheapest half: +0.5000 nats before training, +0.1000 after it." in right
    assert "without sinks: 0, 2." in right
    assert "| King Lear, no sinks | 2 | 2.0 KiB (50%) | +0.1000 | +0.1000 |" in right
    for name in ("price", "together"):
        assert (tmp_path / f"{name}.svg").read_text().endswith("</svg>\n") and f"({name}.svg)" in right


def test_a_page_without_training_says_nothing_of_it(tmp_path: Path) -> None:
    results = planted(True)
    results["trained"].clear()
    (tmp_path / "README.md").write_text(report.START)
    report.write(results, tmp_path)
    assert "## Training" not in (tmp_path / "README.md").read_text()


def test_rank_correlations() -> None:
    assert findings.spearman([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert findings.spearman([1, 2, 3], [5, 4, -9]) == pytest.approx(-1)
    assert findings.ranks([5, 1, 5, 0]) == [2.5, 1, 2.5, 0]
    assert findings.spearman([5, 1, 5, 0], [4, 2, 3, 1]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(findings.spearman([1, 1, 1], [1, 2, 3]))


def test_stages_that_are_done_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    calls = []
    monkeypatch.setattr(
        run, "measured", lambda model, ids, sinks, settings: calls.append((ids.shape[1], sinks)) or {"price": []}
    )
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=torch.zeros(1, 40, dtype=torch.long))
    loaded, texts = SimpleNamespace(tokenizer=tokenizer, model=None), {"one": "", "two": ""}
    results: dict[str, Any] = {"settings": TINY._asdict(), **run.earlier(path, TINY)}
    run.measure(results, loaded, texts, TINY, lambda: run.write(results, path))
    assert calls == [(23, 0), (23, 2)] * 2 and list(results["measured"]) == ["one, 0", "one, 2", "two, 0", "two, 2"]
    again = {"settings": TINY._asdict(), **run.earlier(path, TINY)}
    run.measure(again, loaded, texts, TINY, lambda: pytest.fail("measured again what was there"))
    assert run.earlier(path, TINY._replace(window=6)) == {"measured": {}, "trained": {}}
    assert run.texts_of("KING ... the tempest ... THE TEMPEST: ...") == {
        "King Lear": "KING ... the tempest ... ",
        "The Tempest": "THE TEMPEST: ...",
    }


def test_models_are_converted_and_trained_for_as_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted, commands = [], []

    def uptrain(model: Path, text: Path, out: Path, options: Any) -> dict[str, Any]:
        commands.append((model.name, out.name, options[-2:]))
        return {"steps": 11}

    monkeypatch.setattr(training, "qkv", lambda arguments: converted.append(arguments) or 0)
    monkeypatch.setattr(training, "uptrain", uptrain)
    done: dict[str, Any] = {}
    saved = []
    arguments = (
        tmp_path / "original",
        tmp_path,
        tmp_path / "text",
        [0, 3],
        TINY,
        done,
        lambda: saved.append(len(done)),
    )
    training.trained(*arguments)
    assert saved == [1, 2, 3] and set(done) == {training.ALL, training.HALF, training.ORIGINAL}
    assert [each[3:] for each in converted] == [
        ["--window", "5", "--overwrite"],
        ["--window", "5", "--layers", "0,3", "--overwrite"],
    ]
    assert commands == [
        ("windows-in-all-layers", "windows-in-all-layers-uptrained", ("--minutes", "5.0")),
        ("windows-in-the-cheapest-half", "windows-in-the-cheapest-half-uptrained", ("--max-steps", "11")),
        ("original", "original-uptrained", ("--max-steps", "11")),
    ]
    training.trained(*arguments)
    assert saved == [1, 2, 3]


def test_the_guide_has_the_numbers_of_the_study() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "studies" / "windows_smollm2" / "results.json").read_text())
    guide = (root / "docs" / "guides" / "windows.md").read_text()
    stages = results["measured"].values()
    for place, words in ((-1, "all 30"), (3, "the 15 cheapest"), (0, "the 4 cheapest")):
        some = [stage["together"][place] for stage in stages]
        assert words.split()[-1] == "30" or {len(each["layers"]) for each in some} == {int(words.split()[1])}
        assert f"| {words} | {' | '.join(format(each['increase'], '.3f') for each in some)} |" in guide
    gaps = {name: findings.closed(results, name, report.ORIGINAL) for name in (report.ALL, report.HALF)}
    for before, after in gaps.values():
        assert f"{after:.3f} of {before:.3f}" in " ".join(guide.split())
    assert results["settings"]["tokens"] == 2048 and results["settings"]["window"] == 256
    first = results["measured"]["King Lear, 0"], results["measured"]["King Lear, 4"]
    without, with_sinks = (stage["together"][-1]["increase"] for stage in first)
    sinks = " ".join((root / "docs" / "why" / "sinks.md").read_text().split())
    assert f"a loss of {with_sinks:.2f} instead of {without:.2f} nats a token" in sinks
