"""`reach`: which hidden states a token changes, compared with masks multiplied out, and equal in bits beyond."""

from typing import Any

import pytest
import torch
from families.small import build, decoder
from torch import Tensor, nn

from qkv.analysis import reach

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
NAMES = [f"model.layers.{n}.self_attn" for n in range(4)]


def reached(windows: list[int | None], position: int, length: int) -> Tensor:
    """(layers + 1, length): who has heard of a token, one step of messages a layer."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    rows = [torch.arange(length) == position]
    for window in windows:
        sees = (j <= i) & (i - j < (length if window is None else window))
        rows.append((sees & rows[-1]).any(1))
    return torch.stack(rows)


MODELS: dict[str, Any] = {
    "full": decoder("llama", num_hidden_layers=4),
    "windows": decoder("mistral", num_hidden_layers=4, sliding_window=5),
    "some windows": decoder("gemma2", num_hidden_layers=4, sliding_window=5, query_pre_attn_scalar=8),
    "sinks": decoder("gpt_oss", num_hidden_layers=4, sliding_window=5, num_local_experts=2, num_experts_per_tok=2),
}
OWN: dict[str, list[int | None]] = {
    "full": [None] * 4, "windows": [5] * 4, "some windows": [5, None, 5, None], "sinks": [5, None, 5, None],
}  # fmt: skip
ADDED: list[dict[int, int]] = [{}, {0: 3, 1: 4, 2: 2, 3: 6}, {1: 1, 3: 9}]


@pytest.mark.parametrize("added", ADDED, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_change_where_windows_allow_and_nowhere_else(name: str, added: dict[int, int]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    windows = [min((w for w in (own, added.get(n)) if w is not None), default=None) for n, own in enumerate(OWN[name])]
    for position in (0, 7, -1):
        found = reach(model, IDS, position, windows={NAMES[n]: window for n, window in added.items()})
        want = reached(windows, position % 40, 40)
        assert found.windows == tuple(windows) and found.position == position % 40
        assert [stop - found.position for stop in found.stops] == want.sum(1).tolist()
        assert torch.equal(found.change != 0, want)
        assert found.beyond() == 0
        if all(window is not None for window in windows):
            sums = [1 + sum(window - 1 for window in windows[:n] if window) for n in range(5)]
            assert want.sum(1).tolist() == [min(total, 40 - position % 40) for total in sums]


def test_changes_are_those_of_the_hidden_states() -> None:
    model = build("mistral")
    found = reach(model, IDS, 9)
    other = IDS.clone()
    other[0, 9] = (other[0, 9] + 1) % 97
    model.set_attn_implementation("eager")
    with torch.no_grad():
        old, new = (model(ids, output_hidden_states=True).hidden_states for ids in (IDS, other))
    for row, a, b in zip(found.change, old, new, strict=True):
        want = (b - a)[0].norm(dim=1) / a[0].norm(dim=1)
        inside = row != 0
        torch.testing.assert_close(row[inside], want[inside], rtol=1e-3, atol=1e-5)
    changed = found.change.clone()
    changed[0, 3] = 1
    assert found._replace(change=changed).beyond() == 1


def test_calls_that_are_refused() -> None:
    model = build("llama")
    for call, error, message in (
        (lambda: reach(model, IDS, 40), ValueError, "position must be from -40 to 39, for 40 tokens; got 40"),
        (lambda: reach(model, IDS, 1.0), TypeError, "position must be an int"),
        (lambda: reach(model, IDS[0], 1), ValueError, r"input_ids must be a tensor \(1, L\)"),
        (lambda: reach(model, IDS, 1, inputs_embeds=IDS), ValueError, "reach: inputs_embeds must not be given"),
        (lambda: reach(nn.Sequential(model).eval(), IDS, 1), TypeError, "reach: model must be a model of transf"),
        (lambda: reach(model, IDS, 1, windows={NAMES[0]: 0}), ValueError, "each of windows must be at least 1; got 0"),
        (
            lambda: reach(model, IDS, 1, windows={"x": 4}),
            ValueError,
            r"windows must be of model\.layers\.0\.self_attn, ",
        ),
        (lambda: reach(build("bert"), IDS, 1), ValueError, "model must be causal; encoder.layer.0.attention.self"),
    ):
        with pytest.raises(error, match=message):
            call()
