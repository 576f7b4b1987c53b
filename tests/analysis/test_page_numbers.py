"""Every number of a page, compared with those of weights that eager attention of transformers writes out in fp64."""

import base64
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from analysis.test_page import data_of, rows_of
from families.compare import draw_weights
from families.small import MODELS, SIZES, build, decoder
from torch import Tensor

from qkv.analysis import Recording, Seen, price, record
from qkv.analysis.labels import labels_of
from qkv.analysis.page import page_of
from qkv.analysis.seen import Context

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

LENGTH, TARGET, BLOCKS = 256, 70, 64
IDS = torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(0))
WINDOWS, SINKS = (48, 9, 5), 2
IDS_OF_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": 97, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6}
EAGER = {"attn_implementation": "eager"}
MORE: dict[str, Callable[[], Any]] = {
    "starcoder2": decoder("starcoder2", num_key_value_heads=1, sliding_window=100),
    "phi3": decoder("phi3", num_key_value_heads=3),
    "gemma3_text": decoder("gemma3_text", sliding_window=40, layer_types=["sliding_attention", "full_attention"]),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SIZES, **IDS_OF_ENDS, **EAGER, num_attention_heads=6, local_attention=32, global_attn_every_n_layers=2
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, **EAGER, decoder_start_token_id=0)
    ),
}  # fmt: skip
FAMILIES = [*MODELS, *MORE]
PRICED = [name for name in FAMILIES if name not in ("bert", "bart", "modernbert", "t5")]


class Call(NamedTuple):
    """A call of eager attention."""

    weights: Tensor
    values: Tensor


def made(name: str) -> Any:
    if name in MODELS:
        return build(name)
    torch.manual_seed(0)
    model = MORE[name]().eval()
    draw_weights(model)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    return (
        {"input_ids": IDS, "decoder_input_ids": IDS[:, 30 : 30 + TARGET]}
        if name in ("bart", "t5")
        else {"input_ids": IDS}
    )


@contextmanager
def in_fp64(module: Any) -> Iterator[list[Call]]:
    """Has a family's eager attention write down its weights, computed in fp64, and its values by query head."""
    found: list[Call] = []
    eager, softmax = module.eager_attention_forward, F.softmax

    def attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = eager(layer, query, key, value, *args, **kwargs)
        found.append(Call(weights, value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)))
        return out, weights

    module.eager_attention_forward = attention
    F.softmax = lambda x, dim=-1, dtype=None, **_: softmax(x.double(), dim)  # type: ignore[assignment]
    try:
        yield found
    finally:
        module.eager_attention_forward, F.softmax = eager, softmax


def twin_of(model: Any) -> Any:
    """The model in fp64, on eager attention, and experts one by one: their product for groups has no fp64."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    twin.config._experts_implementation = "eager"
    return twin


def written_out(model: Any, inputs: dict[str, Tensor]) -> list[Call]:
    twin = twin_of(model)
    with in_fp64(sys.modules[type(model).__module__]) as found, torch.no_grad():
        twin(**inputs, use_cache=False)
    assert all(call.weights.dtype is torch.float64 for call in found)
    return found


def numbers_of(call: Call, is_cross: bool, shift: int = 0) -> dict[str, Any]:
    """What the page says of a layer, from its weights. ``shift`` makes its windows wider."""
    p, v = call.weights[0], call.values[0]
    lq, lk = p.shape[1:]
    i, j = torch.arange(lq)[:, None], torch.arange(lk)
    to_keys = p / p.sum(-1, keepdim=True)
    distance = (to_keys * (i - j)).sum(-1)
    sees_later = not is_cross and bool((p[:, 0, 1:] > 0).any())
    found: dict[str, Any] = {
        "keys_in_effect": torch.special.entr(to_keys).sum(-1).exp().mean(-1),
        "distance": distance.mean(-1),
        "spread": (to_keys * (i - j - distance[..., None]).square()).sum(-1).clamp(min=0).sqrt().mean(-1),
        "sinks": (p[..., :SINKS].sum(-1) + 1 - p.sum(-1)).mean(-1),
        "cut": [],
        "change": [],
    }
    for window in () if is_cross else WINDOWS:
        width = window + shift
        loses = (i[:, 0] >= window) | (sees_later & (lk - 1 - i[:, 0] >= window))
        hidden = ((i - j >= width) | (j - i >= width)) & (j >= SINKS)
        kept = p.masked_fill(hidden, 0)
        mass = (p - kept).sum(-1)
        scaled = kept / (1 - mass)[..., None]
        moved = (scaled @ v - p @ v).norm(dim=-1) / (p @ v).norm(dim=-1)
        found["cut"].append(mass[:, loses].mean(-1) if loses.any() else torch.zeros(len(p)))
        found["change"].append(moved[:, loses].mean(-1) if loses.any() else torch.full((len(p),), torch.nan))
    of_queries, of_keys = (torch.arange(n) * min(BLOCKS, n) // n for n in (lq, lk))
    by_keys = p.new_zeros(*p.shape[:2], min(BLOCKS, lk)).index_add_(2, of_keys, p)
    means = p.new_zeros(len(p), min(BLOCKS, lq), min(BLOCKS, lk)).index_add_(1, of_queries, by_keys)
    found["map"] = means / of_queries.bincount()[:, None]
    return found


def near(got: Any, want: Tensor, atol: float = 1e-5) -> bool:
    """Within the rounding of fp32 through two layers, and of six digits."""
    numbers = torch.tensor([float("nan") if number is None else number for number in got], dtype=torch.float64)
    return torch.allclose(numbers, want.double(), rtol=1e-4, atol=atol, equal_nan=True)


def is_right(layer: dict[str, Any], want: dict[str, Any]) -> bool:
    single = all(near(layer[name], want[name]) for name in ("keys_in_effect", "distance", "sinks"))
    single = single and near(layer["spread"], want["spread"], LENGTH / 2000)  # as `look.Distance` says
    cuts = all(near(a, b) for name in ("cut", "change") for a, b in zip(layer[name], want[name], strict=True))
    codes = torch.tensor(list(base64.b64decode(layer["map"])), dtype=torch.float64)
    maps = ((codes / 255).square() - want["map"].flatten()).abs().max() <= 0.0041
    return single and cuts and bool(maps) and not layer["map_gaps"]


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], tuple[Recording, list[Call], Any]]:
    found: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in found:
            model, inputs = made(name), inputs_of(name)
            recording = record(model, windows=WINDOWS, sink_tokens=SINKS, **inputs)
            found[name] = recording, written_out(model, inputs)
        return found[name]

    return of


def seen_of(name: str, recording: Recording, prices: Any = ()) -> Seen:
    ids = inputs_of(name).get("decoder_input_ids", IDS)
    context = Context("text", LENGTH, 0) if "decoder_input_ids" in inputs_of(name) else None
    return Seen(name, "text", tuple(f" t{index}" for index in ids[0].tolist()), 0, 4, recording, prices, None, context)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_layers_and_heads(name: str, recorded: Any) -> None:
    recording, calls = recorded(name)
    data = data_of(page_of(seen_of(name, recording), 0.01))
    assert len(data["layers"]) == len(calls) == len(recording.layers)
    for layer, record_, call in zip(data["layers"], recording.layers, calls, strict=True):
        assert is_right(layer, numbers_of(call, record_.is_cross))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_that_is_off_by_one_is_found(name: str, recorded: Any) -> None:
    recording, calls = recorded(name)
    data = data_of(page_of(seen_of(name, recording), 0.01))
    for layer, record_, call in zip(data["layers"], recording.layers, calls, strict=True):
        for shift in (-1, 1) if not record_.is_cross else ():
            assert not is_right(layer, numbers_of(call, False, shift))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_layers(name: str, recorded: Any) -> None:
    recording, calls = recorded(name)
    caption = "What layers attend to, in the mean over heads and queries; cut: of the KV head that loses most"
    _, *rows = rows_of(page_of(seen_of(name, recording), 0.01), caption)
    for row, label, layer, call in zip(rows, labels_of(recording.layers), recording.layers, calls, strict=True):
        want = numbers_of(call, layer.is_cross)
        assert row[:4] == [label, layer.name, str(len(call.weights[0])), str(layer.kv_heads)]
        means = [want[key].mean().item() for key in ("keys_in_effect", "distance", "sinks")]
        cuts = [cut.max().item() for cut in want["cut"]] or [float("nan")] * len(WINDOWS)
        written = [*(float(cell) for cell in row[5:7]), *(float(cell.rstrip("%") or "nan") / 100 for cell in row[7:])]
        for text, number, step in zip(written, [*means, *cuts], (0.05, 0.05, *[0.0005] * 4), strict=True):
            assert text == pytest.approx(number, abs=1.01 * step + 1e-4, nan_ok=True)


def windowed_loss(model: Any, name: str | None, window: int) -> Tensor:
    twin = twin_of(model)

    def narrow(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        query, key = (torch.arange(n) for n in mask.shape[2:])
        hidden = (key <= query[:, None] - window) & (key >= SINKS)
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    if name is not None:
        twin.get_submodule(name).register_forward_pre_hook(narrow, with_kwargs=True)
    with in_fp64(sys.modules[type(model).__module__]), torch.no_grad():
        logits = twin(IDS, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.mT, IDS[:, 1:], reduction="none")


@pytest.mark.parametrize("name", PRICED)
def test_prices_of_layers(name: str, recorded: Any) -> None:
    model, (recording, _) = made(name), recorded(name)
    window = 6 if any(layer.window == 7 for layer in recording.layers) else 9
    found = price(model, IDS, window=window, sink_tokens=SINKS)
    (data,) = data_of(page_of(seen_of(name, recording, (found,)), 0.01))["prices"]
    before = windowed_loss(model, None, window)
    assert len(found.layers) == 2
    for layer, mean in zip(found.layers, data["by_layer"], strict=True):
        want, other = ((windowed_loss(model, layer, w) - before).mean().item() for w in (window, window + 1))
        assert mean == pytest.approx(want, abs=5e-6) and mean != pytest.approx(other, abs=5e-6)
