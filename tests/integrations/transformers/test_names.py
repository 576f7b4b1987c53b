"""If undocumented names of transformers change in its next release, results stay the same, only slower."""

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers import masks

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

NAMES = [
    *("and_masks", "sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay"),
    *("packed_sequence_mask_function", "remap_positions_for_packed_sequence"),  # the latter from 5.22 on
    *("causal_mask_function", "bidirectional_mask_function", "prepare_padding_mask"),
]


@pytest.fixture(params=NAMES)
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Hides a name of transformers' masks from qkv only."""
    shown = {name: value for name, value in vars(masking_utils).items() if name != request.param}
    monkeypatch.setattr(transformers, "masking_utils", types.SimpleNamespace(**shown))
    masks._closure_kinds.cache_clear()
    yield request.param
    masks._closure_kinds.cache_clear()


@pytest.mark.parametrize("positions", [None, [*range(8), *range(11)]], ids=["one text", "packed texts"])
@pytest.mark.parametrize("kind", ["mistral", "modernbert"])
def test_a_hidden_name_changes_no_number(kind: str, positions: Any, hidden: str) -> None:
    integration.register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    windows = {"sliding_window": 7, "local_attention": 6, "pad_token_id": 0, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **windows, num_attention_heads=6)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    ids, keep = torch.randint(3, 96, (3, 19)), torch.arange(19) >= torch.tensor([[0], [6], [11]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": keep.long()}
    if positions is not None:
        inputs |= {"position_ids": torch.tensor(positions).expand(3, -1), "attention_mask": None}
        keep = torch.ones_like(keep)
    if kind == "mistral":
        inputs["use_cache"] = False
    want = model(**inputs).last_hidden_state
    model.set_attn_implementation("qkv")
    got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-5)


def test_a_parameter_of_another_name_is_not_guessed() -> None:
    def other(width: int) -> Any:
        return lambda batch, head, query, key: query - key < width

    window = other(3)
    masks._closure_kinds.cache_clear()
    try:
        masks._closure_kinds()[window.__code__] = "window"
        assert masks.recognise_mask(window, range(7)) is None
    finally:
        masks._closure_kinds.cache_clear()
