"""A sample of transformers' families on qkv; `make families` runs all of them."""

from typing import Any

import pytest
import torch
from families import sweep
from families.compare import judge
from families.one_line import judge_one_line

from qkv import Mask
from qkv.integrations.transformers import attention as integration

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

# Every seventh family; every second of these only in `make test-all`, since each takes seconds.
SAMPLE = [
    pytest.param(family, marks=pytest.mark.long if i % 2 else ()) for i, family in enumerate([*sweep.listed()][::7])
]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()


def test_the_page_lists_enough_families() -> None:
    assert len(sweep.listed()) >= 100


@pytest.mark.parametrize("family", SAMPLE, ids=sweep.short)
def test_a_family_that_is_listed_works(family: str) -> None:
    outcome = judge(family, only=sweep.listed()[family])
    assert outcome.works, outcome.reason


# One of each kind of cache (windows, latents, none, two, own ones); all families only in `make test-all`.
ONE_LINE = ("gemma2", "deepseek_v2", "bert", "t5gemma", "jamba", "glm4v")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if sweep.short(family) in ONE_LINE else pytest.mark.long)
        for family in sweep.listed()
    ],
    ids=sweep.short,
)
def test_a_family_is_accelerated_by_one_line_and_given_back(family: str) -> None:
    outcome = judge_one_line(family, only=sweep.listed()[family])
    assert outcome.works, outcome.reason


def without(name: str) -> Any:
    """`attention` that drops one of its arguments."""

    def attention_without(*args: Any, **options: Any) -> torch.Tensor:
        if name == "padding":
            mask = options["mask"]
            options["mask"] = Mask(left=mask.left, right=mask.right, sink_tokens=mask.sink_tokens, allow=mask.allow)
        else:
            options.pop(name)
        return attention_without.attention(*args, **{"offset": 0, **options})  # type: ignore[attr-defined]

    attention_without.attention = integration.attention  # type: ignore[attr-defined]
    return attention_without


@pytest.mark.parametrize(
    "family, dropped",
    [
        ("llama", "padding"),
        ("mistral", "mask"),
        ("gemma2", "softcap"),
        ("gpt_oss", "sink_logits"),
        ("t5", "bias"),
        ("granite", "scale"),
        ("deepseek_v32", "mask"),
        ("whisper", "mask"),
        ("bert", "padding"),
    ],
)
def test_a_dropped_argument_is_detected(family: str, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{family}.modeling_{family}"
    monkeypatch.setattr(integration, "attention", without(dropped))
    assert "exceeds the allowed" in judge(name, only=sweep.listed()[name]).reason
