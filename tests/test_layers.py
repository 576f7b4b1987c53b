"""`Attention`: what its options do to what it computes."""

from typing import Any

import pytest
import torch

import qkv

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))

OPTIONS: dict[str, Any] = {
    "num_kv_heads": 2,
    "head_dim": 8,
    "value_dim": 3,
    "mask": qkv.Mask.causal(),
    "rotary": qkv.RotaryEmbedding(4),
    "qk_norm": True,
    "bias": False,
    "out_bias": False,
    "scale": 0.9,
    "softcap": 0.5,
    "alibi": torch.ones(6),
    "sink_logits": True,
    "backend": "reference",
    "dtype": torch.float64,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_an_effect(name: str) -> None:
    torch.manual_seed(0)
    plain = qkv.Attention(24, 6)
    torch.manual_seed(0)
    layer = qkv.Attention(24, 6, **{name: OPTIONS[name]})
    if name in ("bias", "out_bias", "num_kv_heads", "head_dim", "value_dim", "dtype", "qk_norm"):
        shapes = {key: (value.shape, value.dtype) for key, value in layer.state_dict().items()}
        assert shapes != {key: (value.shape, value.dtype) for key, value in plain.state_dict().items()}
        assert layer(X.to(layer.q_proj.weight.dtype)).shape == X.shape
    elif name == "backend":
        torch.testing.assert_close(layer(X), plain(X))
        with pytest.raises(qkv.BackendError):
            qkv.Attention(24, 6, backend="sdpa", softcap=1.0)(X)
    else:
        assert not torch.allclose(layer(X), plain(X))


def test_dropout_acts_while_training_alone() -> None:
    layer = qkv.MultiHeadAttention(24, 6, dropout=0.5)
    assert not torch.equal(layer(X), layer(X))
    layer.eval()
    assert torch.equal(layer(X), layer(X))
    without = qkv.MultiHeadAttention(24, 6)
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), without(X))


def test_a_mask_of_the_call_adds_to_that_of_the_layer() -> None:
    layer, lengths = qkv.CausalAttention(24, 6), torch.tensor([9, 5])
    got = layer(X, mask=qkv.Mask.padding(lengths))
    whole = qkv.Attention(24, 6)
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(got, whole(X, mask=qkv.Mask.causal() & qkv.Mask.padding(lengths)))


def test_normalised_queries_and_keys_have_unit_root_mean_square() -> None:
    layer = qkv.Attention(24, 6, qk_norm=True)
    torch.nn.init.constant_(layer.q_norm.weight, 2.0)
    q = layer._inputs(X, None, None, None).q
    torch.testing.assert_close(q.square().mean(-1).sqrt(), torch.full((2, 6, 9), 2.0), rtol=1e-3, atol=1e-3)


def test_the_repr_says_what_the_layer_is() -> None:
    text = repr(qkv.SlidingWindowAttention(24, 6, 4, num_kv_heads=2))
    assert "num_heads=6, num_kv_heads=2, head_dim=4" in text
    assert "mask=Mask.band(left=2, right=2)" in text
