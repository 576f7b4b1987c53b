"""Jagged nested tensors: layers compute for all sequences what they compute for each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv import Mask

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LAYERS: dict[str, Callable[[], qkv.Attention]] = {
    "scaled dot-product": lambda: qkv.ScaledDotProductAttention(24),
    "multi-head": lambda: qkv.MultiHeadAttention(24, 6),
    "causal": lambda: qkv.CausalAttention(24, 6),
    "causal, rotary": lambda: qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4)),
    "rotary of pairs, norms": lambda: qkv.Attention(
        24, 6, rotary=qkv.RotaryEmbedding(4, interleaved=True), qk_norm=True
    ),
    "window": lambda: qkv.SlidingWindowAttention(24, 6, 4, rotary=qkv.RotaryEmbedding(4)),
    "causal window": lambda: qkv.SlidingWindowAttention(24, 6, 3, causal=True),
    "window with first tokens": lambda: qkv.SlidingWindowAttention(
        24, 6, 3, causal=True, sink_tokens=2, rotary=qkv.RotaryEmbedding(4)
    ),
    "first tokens and alibi": lambda: qkv.SlidingWindowAttention(24, 6, 2, sink_tokens=1, alibi=[0.1] * 6),
    "dilated window": lambda: qkv.Attention(24, 6, mask=Mask.causal(3, dilation=2)),
    "chunks": lambda: qkv.CausalAttention(24, 6, mask=Mask.chunked(3), rotary=qkv.RotaryEmbedding(4)),
    "prefix": lambda: qkv.Attention(24, 6, mask=Mask.prefix(4)),
    "multi-query": lambda: qkv.MultiQueryAttention(24, 6, value_dim=3),
    "grouped-query": lambda: qkv.GroupedQueryAttention(24, 6, 2, head_dim=8, bias=False),
    "alibi": lambda: qkv.CausalAttention(24, 6, alibi=torch.arange(1, 7) / 8),
    "gate": lambda: qkv.CausalAttention(24, 6, value_dim=3, gate=True),
    "sinks, softcap, scale": lambda: qkv.CausalAttention(24, 6, sink_logits=True, softcap=3.0, scale=0.7),
}
LENGTHS = [[5, 2, 9], [1, 1], [4], [3, 0, 7], [0, 2], [0, 0]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def random_parts(lengths: list[int], width: int = 24) -> list[Tensor]:
    return [torch.randn(length, width, dtype=torch.float64) for length in lengths]


def assert_as_each(layer: qkv.Attention, x: Tensor, *context: Tensor) -> None:
    """Compares with a loop over the sequences, forward and backward."""
    layer = layer.double()
    if layer.sink_logits is not None:
        nn.init.normal_(layer.sink_logits)
    got = layer(x, *context)
    towards = [torch.randn_like(part) for part in got.unbind()]
    parts = [[part.detach().requires_grad_() for part in nested.unbind()] for nested in (x, *context)]
    want = [layer(*(part[None] for part in one))[0] for one in zip(*parts, strict=True)]
    assert [part.shape for part in got.unbind()] == [part.shape for part in want]
    for ours, theirs in zip(got.unbind(), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    inputs, weights = [x, *context], list(layer.parameters())
    loss = sum((part * slope).sum() for part, slope in zip(got.unbind(), towards, strict=True))
    slopes = torch.autograd.grad(loss, [*inputs, *weights], allow_unused=True)  # type: ignore[arg-type]
    loss = sum((part * slope).sum() for part, slope in zip(want, towards, strict=True))
    flat = [part for one in parts for part in one]
    wanted = torch.autograd.grad(loss, [*flat, *weights], allow_unused=True)  # type: ignore[arg-type]
    found = [part for slope in slopes[: len(inputs)] for part in slope.unbind()] + list(slopes[len(inputs) :])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sequences_are_independent(name: str, lengths: list[int]) -> None:
    assert_as_each(LAYERS[name](), jagged(random_parts(lengths)))


@pytest.mark.parametrize("lengths", [([5, 2, 9], [3, 8, 1]), ([1], [6]), ([2, 0], [3, 4]), ([2, 3], [1, 0])], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "value_dim": 3, "context_dim": 10}, {"sink_logits": True}])
def test_each_sequence_has_a_context_of_its_own(lengths: tuple[list[int], list[int]], options: dict[str, Any]) -> None:
    layer = qkv.CrossAttention(24, 6, **options)
    x, context = jagged(random_parts(lengths[0])), jagged(random_parts(lengths[1], layer.context_dim or 24))
    assert_as_each(layer, x, context)


@pytest.mark.parametrize("name", ["causal, rotary", "window with first tokens"])
def test_gaps_between_sequences_have_no_influence(name: str) -> None:
    whole = torch.randn(3, 8, 24)
    starts, lengths = torch.tensor([2, 0, 1]), torch.tensor([3, 8, 4])
    x = torch.nested.narrow(whole, 1, starts, lengths, layout=torch.jagged)
    layer = LAYERS[name]()
    want = [layer(part[None])[0] for part in x.unbind()]
    for n in range(3):
        whole[n, : starts[n]] = whole[n, starts[n] + lengths[n] :] = torch.nan
    got = layer(torch.nested.narrow(whole, 1, starts, lengths, layout=torch.jagged))
    for ours, theirs in zip(got.unbind(), want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_result_can_be_added_to_x() -> None:
    layer, x = qkv.CausalAttention(24, 6), jagged([part.float() for part in random_parts([5, 2])])
    out = layer(x)
    assert out.offsets() is x.offsets() and out.layout is torch.jagged
    assert [part.shape for part in (x + layer(F.relu(x + out))).unbind()] == [(5, 24), (2, 24)]


def test_padding_is_not_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, linear = [], F.linear

    def counted(x: Tensor, *weights: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return linear(x, *weights)

    monkeypatch.setattr(F, "linear", counted)
    x = jagged([part.float() for part in random_parts([500, 2, 3])])
    LAYERS["window with first tokens"]()(x)
    LAYERS["causal"]()(x)
    qkv.CrossAttention(24, 6)(x, x)
    assert rows == [505] * 12


def test_a_band_mask_of_the_call_applies_within_each_sequence() -> None:
    layer, parts = qkv.MultiHeadAttention(24, 6), [part.float() for part in random_parts([5, 2, 9])]
    got = layer(jagged(parts), mask=Mask.causal(window=3))
    for ours, part in zip(got.unbind(), parts, strict=True):
        torch.testing.assert_close(ours, layer(part[None], mask=Mask.causal(window=3))[0])


def test_dropout_and_autocast_have_an_effect() -> None:
    layer, x = qkv.MultiHeadAttention(24, 6, dropout=0.5), jagged([part.float() for part in random_parts([5, 2])])
    assert not torch.equal(layer(x).values(), layer(x).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


def test_a_rotary_scaling_goes_by_the_length_of_each_sequence() -> None:
    scaling = qkv.RotaryScaling.dynamic(4.0, max_position_embeddings=4)
    layer = qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4, scaling=scaling))
    parts = [part.float() for part in random_parts([9, 2, 6])]
    for ours, part in zip(layer(jagged(parts)).unbind(), parts, strict=True):
        torch.testing.assert_close(ours, layer(part[None])[0])


def test_a_custom_rotary_module_restarts_in_each_sequence() -> None:
    class Own(nn.Module):
        head_dim = 4

        def forward(
            self, x: Tensor, offset: int = 0, *, positions: Tensor | None = None, length: Tensor | None = None
        ) -> Tensor:
            where = torch.arange(x.shape[2]) + offset if positions is None else positions
            lengths = torch.tensor([x.shape[2]]) if length is None else length
            return x * where[:, None] / lengths[:, None]

    layer, parts = qkv.CausalAttention(24, 6, rotary=Own()), [part.float() for part in random_parts([5, 2])]
    got = layer(jagged(parts))
    for ours, part in zip(got.unbind(), parts, strict=True):
        torch.testing.assert_close(ours, layer(part[None])[0])


def refused() -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    def nested() -> Tensor:
        return jagged([part.float() for part in random_parts([5, 2])])

    layer, cross, plain = qkv.CausalAttention(24, 6), qkv.CrossAttention(24, 6), torch.randn(2, 5, 24)
    padding = Mask.padding(torch.tensor([5, 2]))
    return {
        "a cache of a context": (
            lambda: cross(nested(), nested(), cache=qkv.CrossKVCache()),
            ValueError,
            r"CrossAttention: with nested tensors, .* takes no cache; got a cache of a context\. Call it for",
        ),
        "padding": (lambda: layer(nested(), mask=padding), ValueError, r"got Mask\.causal\(\) & Mask\.padding"),
        "no mask": (lambda: layer(nested(), mask="causal"), TypeError, r"mask must be a qkv\.Mask; got str"),
        "a layer's own mask": (
            lambda: qkv.Attention(24, 6, mask=padding)(nested()),
            ValueError,
            r"with nested tensors, .* got Mask\.padding",
        ),
        "strided": (
            lambda: layer(torch.nested.nested_tensor(random_parts([5, 2]))),
            ValueError,
            r"x must be a jagged nested tensor \(B, j, 24\); got one of layout torch\.strided\. Convert it",
        ),
        "another width": (
            lambda: layer(jagged(random_parts([5, 2], 10))),
            ValueError,
            r"\(B, j, 24\); got shape \(2, ",
        ),
        "transposed": (lambda: layer(nested().transpose(1, 2)), ValueError, r"\(B, j, 24\); got shape \(2, 24, "),
        "another dtype": (lambda: layer(jagged(random_parts([5, 2]))), ValueError, r"x must be torch\.float32, as the"),
        "a context": (
            lambda: layer(nested(), nested()),
            ValueError,
            "context must be None in self-attention; got a nested tensor",
        ),
        "a plain context": (
            lambda: cross(nested(), plain),
            ValueError,
            "context must be a jagged .* got a plain tensor",
        ),
        "no context": (lambda: cross(nested()), TypeError, "context must be a jagged .* got NoneType"),
        "plain queries": (lambda: cross(plain, nested()), ValueError, "x must be a jagged .* got a plain tensor"),
        "fewer contexts": (
            lambda: cross(nested(), jagged([torch.randn(3, 24)])),
            ValueError,
            "context must have a sequence for each of the 2 of x; got 1",
        ),
        "positions in a context": (
            lambda: cross(nested(), nested(), mask=Mask.causal()),
            ValueError,
            r"Mask\.causal\(\) depends on the positions of .* Call qkv\.attention for each sequence",
        ),
        "alibi over a context": (
            lambda: qkv.CrossAttention(24, 6, alibi=[1.0] * 6)(nested(), nested()),
            ValueError,
            "alibi depends on the positions of queries",
        ),
        "weights": (
            lambda: layer.attention_weights(nested()),
            ValueError,
            "attention_weights takes no nested tensors; call it for each sequence",
        ),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_unsupported_calls_with_nested_tensors_are_refused(name: str) -> None:
    call, error, message = refused()[name]
    with pytest.raises(error, match=message):
        call()
