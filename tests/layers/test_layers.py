"""`Attention`: the effect of each option."""

import html
import inspect
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.layers.cached_call import CallOptions
from qkv.layers.options import Arguments, LayerOptions

NOTHING = CallOptions(qkv.Mask.full(), None, None, None)
X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))

EFFECTS: dict[str, Any] = {
    "mask": qkv.Mask.causal(),
    "rotary": qkv.RotaryEmbedding(4),
    "scale": 0.9,
    "softcap": 0.5,
    "alibi": torch.ones(6),
    "sink_logits": True,
    "gate": True,
}

WEIGHTS: dict[tuple[str, Any], dict[str, tuple[int, ...] | None]] = {
    ("num_kv_heads", 2): {"q_proj.weight": (24, 24), "k_proj.weight": (8, 24), "v_proj.weight": (8, 24)},
    ("head_dim", 8): {"q_proj.weight": (48, 24), "k_proj.weight": (48, 24), "out_proj.weight": (24, 48)},
    ("value_dim", 3): {"k_proj.weight": (24, 24), "v_proj.weight": (18, 24), "out_proj.weight": (24, 18)},
    ("qk_norm", True): {"q_norm.weight": (4,), "k_norm.weight": (4,)},
    ("gate", True): {"gate_proj.weight": (24, 24), "gate_proj.bias": (24,)},
    ("bias", True): {"q_proj.bias": (24,), "k_proj.bias": (24,), "v_proj.bias": (24,), "out_proj.bias": (24,)},
    ("bias", False): {"q_proj.bias": None, "k_proj.bias": None, "v_proj.bias": None, "out_proj.bias": None},
    ("out_bias", False): {"q_proj.bias": (24,), "out_proj.bias": None},
    ("dtype", torch.float64): {"q_proj.weight": (24, 24)},
}
"""Options that change the parameters and their shapes."""


@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_has_an_effect(name: str) -> None:
    torch.manual_seed(0)
    plain = qkv.Attention(24, 6)
    torch.manual_seed(0)
    layer = qkv.Attention(24, 6, **{name: EFFECTS[name]})
    assert not torch.allclose(layer(X), plain(X))
    with torch.no_grad():  # few tokens, which may take one call of the kernel
        assert not torch.allclose(layer(X[:1]), plain(X[:1]))


def test_no_option_is_without_such_a_test() -> None:
    elsewhere = {"context_dim", "position_bias", "qk_norm_eps", "dropout", "backend", "device"}
    assert {*EFFECTS, *(name for name, _ in WEIGHTS), *elsewhere} == set(get_type_hints(LayerOptions))


def by_hand(layer: qkv.Attention, x: Tensor) -> Tensor:
    """The formula, for a layer without a mask and with scores that are products alone."""
    weights = layer.state_dict()

    def project(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))

    heads = {"q": 6, "k": layer.num_kv_heads, "v": layer.num_kv_heads}
    q, k, v = (project(x, name).unflatten(2, (number, -1)) for name, number in heads.items())
    if "q_norm.weight" in weights:
        q, k = (
            weights[f"{name}_norm.weight"] * part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            for name, part in (("q", q), ("k", k))
        )
    k, v = (part.repeat_interleave(6 // layer.num_kv_heads, dim=2) for part in (k, v))
    shares = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[3] ** 0.5).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)
    if "gate_proj.weight" in weights:
        out = out / (1 + (-project(x, "gate")).exp())
    return project(out, "out")


@pytest.mark.parametrize("name, value", WEIGHTS, ids=str)
def test_options_of_parameters_give_their_shapes_and_the_formula(name: str, value: Any) -> None:
    torch.manual_seed(0)
    layer = qkv.Attention(24, 6, **{name: value})
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found = {key: tuple(weight.shape) for key, weight in layer.state_dict().items()}
    assert {key: found.get(key) for key in WEIGHTS[name, value]} == WEIGHTS[name, value]
    dtype = value if name == "dtype" else torch.float32
    assert all(weight.dtype == dtype for weight in layer.state_dict().values())
    torch.testing.assert_close(layer(X.to(dtype)), by_hand(layer, X.to(dtype)))


def test_options_build_an_equal_layer() -> None:
    parameters = inspect.signature(qkv.Attention).parameters
    assert set(qkv.Attention(24, 6).options()) == parameters.keys() - {"unknown"}
    types = get_type_hints(qkv.Attention.__init__)
    for name, annotation in get_type_hints(Arguments).items():
        assert annotation == types[name], name
    assert set(get_type_hints(Arguments)) == parameters.keys() - {"unknown"}
    weights = {name: value for name, value in WEIGHTS if name not in ("bias", "dtype")}
    options = {
        **EFFECTS,
        **weights,
        "bias": True,
        "dropout": 0.25,
        "qk_norm_eps": 0.5,
        "rotary": qkv.RotaryEmbedding(8),
    }
    layer = qkv.Attention(24, 6, **options).eval()
    again = qkv.Attention(**layer.options()).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), layer(X))
    assert repr(again) == repr(layer)
    assert again.options().keys() == layer.options().keys()
    assert {name: value for name, value in again.options().items() if name != "alibi"} == {
        name: value for name, value in layer.options().items() if name != "alibi"
    }


def test_a_layer_uses_its_backend() -> None:
    torch.manual_seed(0)
    plain = qkv.Attention(24, 6)
    torch.manual_seed(0)
    torch.testing.assert_close(qkv.Attention(24, 6, backend="reference")(X), plain(X))
    with pytest.raises(qkv.BackendError):
        qkv.Attention(24, 6, backend="sdpa", softcap=1.0)(X)


def test_dropout_has_an_effect_in_training_only() -> None:
    layer = qkv.MultiHeadAttention(24, 6, dropout=0.5)
    assert not torch.equal(layer(X), layer(X))
    layer.eval()
    assert torch.equal(layer(X), layer(X))
    without = qkv.MultiHeadAttention(24, 6)
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), without(X))


def test_a_mask_of_the_call_is_combined_with_that_of_the_layer() -> None:
    layer, lengths = qkv.CausalAttention(24, 6), torch.tensor([9, 5])
    got = layer(X, mask=qkv.Mask.padding(lengths))
    whole = qkv.Attention(24, 6)
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(got, whole(X, mask=qkv.Mask.causal() & qkv.Mask.padding(lengths)))


def test_normalised_queries_and_keys_have_unit_root_mean_square() -> None:
    layer = qkv.Attention(24, 6, qk_norm=True)
    torch.nn.init.constant_(layer.q_norm.weight, 2.0)
    q = layer._inputs(X, None, NOTHING).q
    torch.testing.assert_close(q.square().mean(-1).sqrt(), torch.full((2, 6, 9), 2.0), rtol=1e-3, atol=1e-3)
    small = qkv.Attention(24, 6, qk_norm=True, qk_norm_eps=1e6)._inputs(X, None, NOTHING).q
    assert small.abs().max() < 1e-2


def test_repr() -> None:
    text = repr(qkv.SlidingWindowAttention(24, 6, 4, num_kv_heads=2))
    assert "num_heads=6, num_kv_heads=2, head_dim=4" in text
    assert "mask=Mask.sliding(window=4)" in text


def test_a_notebook_shows_the_mask_of_a_layer() -> None:
    layers = [
        qkv.SlidingWindowAttention(24, 6, 4),
        qkv.CrossLayerAttention(24, 6),
        qkv.DifferentialAttention(24, 3),
        qkv.LatentAttention(24, 6, kv_rank=8, nope_dim=4, rope_dim=2),
    ]
    for layer in layers:
        layer.register_module("<b>", torch.nn.Identity())
        text = layer._repr_html_()
        written, _, picture = text.removeprefix("<figure><pre>").partition("</pre>")
        assert html.unescape(written) == repr(layer) and "<b>" not in text
        assert picture == qkv.masks.html_of(layer.mask, "").removeprefix("<figure><pre></pre>")  # type: ignore[arg-type]
