"""The decoder of ``examples/``: caches give what the whole sequence gives, and sampling keeps to its arguments."""

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
    for name in ("block", "generate"):
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
