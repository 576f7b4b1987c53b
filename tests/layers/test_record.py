"""`record` of layers: its numbers, compared with those of the weights that `attention_weights` writes out."""

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv import Mask

LAYERS: dict[str, Any] = {
    "causal": lambda: qkv.CausalAttention(24, 6, num_kv_heads=2),
    "rotary": lambda: qkv.CausalAttention(24, 6, num_kv_heads=1, rotary=qkv.RotaryEmbedding(4), qk_norm=True),
    "window": lambda: qkv.Attention(24, 6, mask=Mask.causal(12, sink_tokens=1)),
    "sinks, softcap and alibi": lambda: qkv.CausalAttention(24, 6, sink_logits=True, softcap=3.0, alibi=[0.1] * 6),
    "full": lambda: qkv.MultiHeadAttention(24, 6, dropout=0.5),
    "gate": lambda: qkv.CausalAttention(24, 6, gate=True),
    "position bias": lambda: qkv.MultiHeadAttention(24, 6, position_bias=qkv.RelativePositionBias(6)),
    "cross": lambda: qkv.CrossAttention(24, 6, context_dim=16),
    "latent": lambda: qkv.LatentAttention(24, 6, kv_rank=8, rope_dim=4, nope_dim=4, value_dim=4),
}
WINDOWS, SINKS = [3, 8], 2


def numbers(layer: Any, p: Tensor, length: int) -> dict[str, Tensor]:
    """The same from weights ``(B, H, L, Lk)``, in fp64."""
    p = p.double()
    query, key = torch.arange(length)[:, None], torch.arange(p.shape[3])
    shares = p / p.sum(-1, keepdim=True)
    hidden = [(key < query - window + 1) & (key >= SINKS) for window in WINDOWS]
    if layer.mask.right is None and layer.mask.left is None:  # sees later keys
        hidden = [((query - key).abs() >= window) & (key >= SINKS) for window in WINDOWS]
    return {
        "mass": torch.stack([(p * cut).sum(-1) for cut in hidden]),
        "in effect": torch.special.entr(shares).sum(-1).exp(),
        "distance": (shares * (query - key)).sum(-1),
        "sinks": p[..., :SINKS].sum(-1),
        "learned": 1 - p.sum(-1),
    }


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_are_those_of_the_weights(name: str, padded: bool) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), 2 * torch.randn(2, 19, 24)
    mask = Mask.padding(torch.tensor([19, 12])) if padded else None
    given = (x, torch.randn(2, 19, 16)) if name == "cross" else (x,)
    found = layer.record(*given, windows=WINDOWS, sink_tokens=SINKS, blocks=4, mask=mask)
    want = numbers(layer, layer.attention_weights(*given, mask=mask), 19)
    got = {
        "in effect": found.keys_in_effect,
        "distance": found.distance.mean,
        "sinks": found.sinks.first,
        "learned": found.sinks.learned,
    }
    if name == "cross":
        assert found.is_cross and found.windows == ()
    else:
        assert not found.is_cross and found.windows == tuple(WINDOWS)
        got["mass"] = found.cut.mass
    for number, tensor in got.items():
        torch.testing.assert_close(
            tensor.double(), want[number], rtol=1e-3, atol=2e-4, msg=lambda m, n=number: f"{n}: {m}"
        )
    assert found.map.mean.shape == (2, 6, 4, 4)
    assert (found.heads, found.window) == (6, 12 if name == "window" else None)
    if padded and name != "cross":
        assert found.is_token is not None and found.is_token.sum(1).tolist() == [19, 12]


def test_it_records_no_gradient_and_changes_nothing() -> None:
    layer, x = qkv.CausalAttention(16, 2), torch.randn(1, 9, 16, requires_grad=True)
    before = layer(x)
    found = layer.record(x, windows=[4])
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in (*found, *found.cut, *found.sinks))
    assert torch.equal(layer(x), before)


def test_calls_that_are_refused() -> None:
    layer, x = qkv.CausalAttention(16, 2), torch.randn(1, 9, 16)
    with pytest.raises(ValueError, match="a window of 9 cuts nothing of 9 tokens"):
        layer.record(x, windows=[9])
    with pytest.raises(TypeError, match="each of windows must be an int"):
        layer.record(x, windows=["4"])
    with pytest.raises(TypeError, match="windows must be a sequence of counts; got int"):
        layer.record(x, windows=4)
    with pytest.raises(ValueError, match="no nested tensors"):
        layer.record(torch.nested.nested_tensor([x[0]], layout=torch.jagged))
    with pytest.raises(TypeError, match="one map of weights; this layer has two"):
        qkv.DifferentialAttention(16, 2).record(x)
