"""The decoder of ``examples/``: caches give what the whole sequence gives, and sampling keeps to its arguments."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.manual_seed(0)
    yield
    for name in ("block", "generate", "torch_attention", "train"):
        sys.modules.pop(name, None)


def decoder() -> Any:
    from block import Decoder

    model = Decoder(vocabulary=11, width=32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def test_decoding_with_caches_equals_the_whole_sequence() -> None:
    model, tokens = decoder(), torch.randint(11, (2, 9))
    caches = model.make_caches()
    with torch.no_grad():
        steps = torch.cat([model(part, caches) for part in tokens.split([4, 1, 1, 3], dim=1)], dim=1)
        torch.testing.assert_close(steps, model(tokens))


def test_greedy_generation_takes_the_most_likely_token_of_the_whole_sequence() -> None:
    from generate import generate

    model, prompt = decoder(), torch.randint(11, (3, 4))
    tokens = generate(model, prompt, 6, temperature=0.0)
    assert torch.equal(tokens[:, :4], prompt) and tokens.shape == (3, 10)
    assert torch.equal(model(tokens)[:, 3:-1].argmax(-1), tokens[:, 4:])
    stop = int(tokens[0, 5])
    stopped = generate(model, prompt, 6, temperature=0.0, stop=stop)
    assert stopped[0, 5:].eq(stop).all()
    first = [(row[4:] == stop).nonzero().flatten().tolist()[:1] for row in tokens]
    for row, (whole, where) in enumerate(zip(tokens, first, strict=True)):
        end = stopped.shape[1] if not where else 5 + where[0]
        assert torch.equal(stopped[row, :end], whole[:end])
    assert torch.equal(generate(model, prompt, 0), prompt)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 1}, [3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.65}, [1, 3]),
        ({"top_p": 1e-9}, [3]),
        ({"top_k": 3, "top_p": 0.95}, [1, 2, 3]),
        ({"top_k": 3, "top_p": 0.85}, [1, 3]),
        ({"temperature": 0.0}, [3]),
        ({"temperature": 0.01}, [3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_sampling_keeps_the_most_likely_tokens(options: dict[str, Any], kept: list[int]) -> None:
    from generate import choose

    logits = torch.tensor([0.05, 0.3, 0.1, 0.55]).log().expand(2000, 4)
    before = logits.clone()
    assert choose(logits, **options).unique().tolist() == kept
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be finite and at least 0; got -1\.0"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0; got inf"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all tokens; got 0"),
        ({"top_k": -2}, "top_k must be at least 1, or None for all tokens; got -2"),
        ({"top_p": 0.0}, r"top_p must be above 0, and 1 for all tokens; got 0\.0"),
        ({"top_p": float("nan")}, "top_p must be above 0, and 1 for all tokens; got nan"),
        ({"temperature": 0.0, "top_k": 0}, "top_k must be at least 1"),
    ],
    ids=str,
)
def test_sampling_refuses_what_keeps_no_token(options: dict[str, Any], message: str) -> None:
    from generate import choose

    with pytest.raises(ValueError, match=f"^choose: {message}"):
        choose(torch.zeros(2, 4), **options)


def test_the_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import generate

    generate.main(steps=3)
    printed = capsys.readouterr().out
    assert printed.startswith("loss 5.") and "class Block(nn.Module):\n" in printed


TINY = ("--layers", "2", "--width", "16", "--heads", "4", "--kv-heads", "2", "--length", "24", "--batch", "4")


def train(out: Path, *options: str) -> dict[str, Any]:
    """Trains on the source of an example; returns the checkpoint."""
    import train

    text = ("--text", str(EXAMPLES / "block.py"))
    train.main([str(out), *text, *TINY, "--learning-rate", "0.02", "--save-steps", "5", *options])
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def bits(state: Any) -> Any:
    """A checkpoint whose parts compare bit for bit, without times."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {name: bits(part) for name, part in state.items() if name != "seconds"}
    return [bits(part) for part in state] if isinstance(state, (list, tuple)) else state


@pytest.mark.parametrize(
    "options", [("--dtype", "float32"), ("--dtype", "bfloat16"), ("--window", "6"), ("--peer", "torch")], ids=" ".join
)
def test_training_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    history = train(tmp_path, "--steps", "40", *options)["history"]
    (losses,) = history["train"].values()
    assert len(losses) == 40 and sum(losses[-5:]) < sum(losses[:5]) - 5 * 1.0
    (held_out,) = history["held_out"].values()
    assert [step for step, _ in held_out] == list(range(5, 45, 5)) and held_out[-1][1] < held_out[0][1]
    assert json.loads((tmp_path / "loss.json").read_text())["train"] == history["train"]
    assert (tmp_path / "loss.svg").read_text().lstrip().startswith("<?xml")
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_torch_trains_the_same_model(tmp_path: Path, window: int | None, kv_heads: int) -> None:
    options = ("--kv-heads", str(kv_heads), *(() if window is None else ("--window", str(window))))
    history = train(tmp_path, "--steps", "3", "--compare", *options)["history"]
    assert history["train"]["qkv"] == pytest.approx(history["train"]["torch"], rel=1e-4)
    assert history["held_out"]["qkv"][0] == pytest.approx(history["held_out"]["torch"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ("in a step", "float32"),
        ("in a step", "bfloat16"),
        ("in the first step", "float32"),
        ("while saving", "float32"),
    ],
)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, dtype: str
) -> None:
    import train as script

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patched:
        if where == "while saving":
            whole = script.torch.save
            counter = iter([False, True])

            def half(state: object, file: Any) -> None:
                if next(counter):
                    file.write(b"half of it")
                    raise Killed
                whole(state, file)

            patched.setattr(script.torch, "save", half)
        else:
            step, last = script.Training.step, 0 if "first" in where else 7

            def killed(self: Any, number: int) -> Any:
                if number == last:
                    raise Killed
                return step(self, number)

            patched.setattr(script.Training, "step", killed)
        with pytest.raises(Killed):
            train(tmp_path / "interrupted", "--steps", "8", "--save-steps", "3", "--dtype", dtype)
    resumed = train(tmp_path / "interrupted", "--steps", "8", "--save-steps", "3", "--dtype", dtype)
    whole_run = train(tmp_path / "whole", "--steps", "8", "--save-steps", "3", "--dtype", dtype)
    again = train(tmp_path / "whole", "--steps", "8", "--save-steps", "3", "--dtype", dtype)
    assert bits(resumed) == bits(whole_run) == bits(again)
    assert not list((tmp_path / "interrupted").glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps must be finite and above 0; got 0"),
        (("--learning-rate", "nan"), "--learning-rate must be finite and above 0; got nan"),
        (("--learning-rate", "inf"), "--learning-rate must be finite and above 0; got inf"),
        (("--window", "-1"), "--window must be finite and above 0; got -1"),
        (
            ("--width", "20"),
            "--width must be a multiple of twice --heads, 8, since rotary embedding turns pairs; got 20",
        ),
        (("--kv-heads", "3"), "--kv-heads must divide --heads, 4; got 3"),
        (("--dtype", "float16"), "invalid choice: 'float16'"),
        (("--length", "100000"), "--text must have more than --length, 100000, bytes to train on; got "),
        (("--length", "1000"), "--text must have more than --length, 1000, bytes to hold out; got "),
        (("--text", "none.txt"), "--text: cannot read none.txt: No such file or directory."),
    ],
)
def test_training_refuses_wrong_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "out", *options)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_training_into_a_file_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("of somebody")
    for out in (taken, taken / "below"):
        with pytest.raises(SystemExit, match=r"^train: out: cannot make the folder .*(File exists|Not a directory)"):
            train(out)
    assert taken.read_text() == "of somebody"


def test_training_without_the_default_text_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train as script

    from qkv.models.errors import CommandError

    def fail() -> None:
        raise CommandError("no network.")

    monkeypatch.setattr(script, "works", fail)
    with pytest.raises(SystemExit, match=r"^train: no network\. Or give a file with --text\.$"):
        script.main([str(tmp_path / "out")])


def test_training_resumes_with_the_same_options_only(tmp_path: Path) -> None:
    before = bits(train(tmp_path, "--steps", "2"))
    with pytest.raises(SystemExit, match="has a run with another --steps, --seed"):
        train(tmp_path, "--steps", "3", "--seed", "1")
    with pytest.raises(SystemExit, match="has a run with another --compare"):
        train(tmp_path, "--steps", "2", "--compare")
    assert bits(torch.load(tmp_path / "checkpoint.pt", weights_only=True)) == before


def test_training_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    train(tmp_path, "--steps", "1")
    assert "loss.svg is not drawn: matplotlib is not installed. Run pip install matplotlib." in capsys.readouterr().out
    assert (tmp_path / "loss.json").exists() and not (tmp_path / "loss.svg").exists()
