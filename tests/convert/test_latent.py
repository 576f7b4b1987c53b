"""`convert_to_latent`: exact with all rotary components and full rank, the best joint approximation with less."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.convert import convert_layer, convert_to_latent

X = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
"""fp64, whose rounding over sums of 48 numbers is 1e-14, through singular vectors of well separated numbers."""


def build(**options: Any) -> qkv.Attention:
    torch.manual_seed(0)
    given = {"head_dim": 8, "num_kv_heads": 2, "mask": Mask.causal(), "dtype": torch.float64}
    layer = qkv.Attention(48, 4, **{**given, **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


ROTARY = qkv.RotaryEmbedding(8)
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    # options; full rank; widths of keys without and with a position
    "no positions": ({}, 32, (8, 0)),
    "rotary": ({"rotary": ROTARY}, 16, (0, 16)),
    "rotary in part": ({"rotary": qkv.RotaryEmbedding(8, rotary_dim=4)}, 24, (4, 8)),
    "interleaved, scaled": (
        {"rotary": qkv.RotaryEmbedding(8, interleaved=True, position_scale=0.5, base=100.0)},
        16,
        (0, 16),
    ),
    "given frequencies": ({"rotary": qkv.RotaryEmbedding(8, frequencies=[1.0, 0.3, 0.3, 0.01])}, 16, (0, 16)),
    "no biases, narrow values": ({"rotary": ROTARY, "bias": False, "value_dim": 5}, 10, (0, 16)),
    "a bias of the output": ({"rotary": ROTARY, "bias": False, "out_bias": True}, 16, (0, 16)),
    "multi-head, more rows than inputs": ({"num_kv_heads": 4}, 49, (8, 0)),
    "multi-query": ({"num_kv_heads": 1, "rotary": ROTARY}, 8, (0, 8)),
    "scale, softcap, window": ({"scale": 0.5, "softcap": 3.0, "mask": Mask.causal(4), "rotary": ROTARY}, 16, (0, 16)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_all_components_and_full_rank_are_exact(name: str) -> None:
    options, rank, widths = CASES[name]
    layer = build(**options)
    state = copy.deepcopy(layer.state_dict())
    latent = convert_to_latent(layer, rank)
    assert (latent.nope_dim, latent.rope_dim) == widths and latent.kv_rank == rank
    want = layer(X)
    torch.testing.assert_close(latent(X), want, **EXACT)
    cache = qkv.LatentKVCache()
    steps = torch.cat([latent(part, cache=cache) for part in X.split([7, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(steps, want, **EXACT)
    for parameter in latent.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match=rf"rank must be at most {rank}, the full one; got {rank + 1}"):
        convert_to_latent(layer, rank + 1)


@torch.no_grad()
def test_the_factor_of_rotated_queries_and_keys_is_kept() -> None:
    """Theirs multiplies cosines, which are in fp32."""
    yarn = qkv.RotaryScaling.yarn(8.0, original_max_position_embeddings=64)
    layer = build(rotary=qkv.RotaryEmbedding(8, scaling=yarn))
    want = layer(X)
    error = (convert_to_latent(layer, 16)(X) - want).abs().max()
    assert yarn.attention_factor > 1.1 and error <= 16 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_layer_stays_as_it_was_and_shares_nothing(dtype: torch.dtype, bias: bool) -> None:
    """In fp64 without biases, the rows that are factorised could be the weights themselves."""
    yarn = qkv.RotaryScaling.yarn(8.0, original_max_position_embeddings=64)
    layer = build(rotary=qkv.RotaryEmbedding(8, scaling=yarn), bias=bias, dtype=dtype)
    x, state = X.to(dtype), copy.deepcopy(layer.state_dict())
    before = layer(x)
    latent = convert_to_latent(layer, 10, gain=torch.ones(48, dtype=dtype))
    assert torch.equal(layer(x), before)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    theirs = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert not theirs & {parameter.untyped_storage().data_ptr() for parameter in latent.parameters()}


@pytest.mark.parametrize("rope_heads", [0, 1, 2])
@torch.no_grad()
def test_components_without_a_position_are_exact_where_nothing_rotates(rope_heads: int) -> None:
    """With all queries and keys at one position, rotation changes no score: what is split must add up."""
    layer = build(rotary=qkv.RotaryEmbedding(8, position_scale=0.0))
    latent = convert_to_latent(layer, 32 - 8 * rope_heads, rope_heads=rope_heads)
    assert latent.rope_dim == 8 * rope_heads and (latent.rotary is None) == (rope_heads == 0)
    torch.testing.assert_close(latent(X), layer(X), **EXACT)


@torch.no_grad()
def test_the_largest_components_keep_their_position() -> None:
    """Keys of two heads that are equal up to a rotation that commutes with theirs are one component, not two."""
    layer = build(rotary=ROTARY, bias=False)
    weight = layer.k_proj.weight
    angles = torch.rand(4, dtype=torch.float64)
    first, second = weight[:4].clone(), weight[4:8].clone()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    weight[8:12], weight[12:16] = first * cos - second * sin, second * cos + first * sin
    half = convert_to_latent(layer, 16, rope_heads=1)
    assert half.nope_dim == 8  # of which nothing is left but rounding
    torch.testing.assert_close(half(X), layer(X), **EXACT)
    assert half.rotary.frequencies.tolist() == ROTARY.frequencies.tolist()


@torch.no_grad()
def test_a_lower_rank_is_the_best_joint_approximation() -> None:
    layer = build(bias=False)
    k, v = layer.k_proj.weight.unflatten(0, (2, 8)), layer.v_proj.weight.unflatten(0, (2, 8))
    balance = v.norm() / k.norm()
    sizes = torch.linalg.svdvals(torch.cat([k * balance, v], dim=1).flatten(0, 1))
    for rank in (1, 8, 31):
        latent = convert_to_latent(layer, rank)
        rows = (latent.kv_b_proj.weight @ latent.kv_a_proj.weight).unflatten(0, (4, 16))[::2]
        error = torch.cat([(rows[:, :8] - k) * balance, rows[:, 8:] - v], dim=1)
        torch.testing.assert_close(error.norm(), sizes[rank:].norm(), **EXACT)
    distances = [float((convert_to_latent(layer, rank)(X) - layer(X)).norm()) for rank in (4, 16, 28, 32)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-9


@torch.no_grad()
def test_errors_are_weighed_by_the_gain_before_the_layer() -> None:
    layer, gain = build(), torch.linspace(0.01, 3, 48, dtype=torch.float64)
    x = X * gain

    def distance(latent: qkv.LatentAttention) -> float:
        return float((latent(x) - layer(x)).norm())

    assert distance(convert_to_latent(layer, 16, gain=gain)) < distance(convert_to_latent(layer, 16))
    torch.testing.assert_close(convert_to_latent(layer, 32, gain=gain)(x), layer(x), **EXACT)
    with pytest.raises(ValueError, match=r"convert_to_latent: gain must be \(48,\), one value per column; got shape"):
        convert_to_latent(layer, 16, gain=gain[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_options_are_kept(dtype: torch.dtype) -> None:
    layer = build(dtype=dtype, dropout=0.25, rotary=ROTARY, mask=Mask.causal(5)).train()
    latent = convert_to_latent(layer, 16)
    assert latent.training and latent.dropout == 0.25 and latent.mask == layer.mask and latent.scale == 8**-0.5
    assert {parameter.dtype for parameter in latent.parameters()} == {dtype}
    assert torch.equal(latent.out_proj.weight, layer.out_proj.weight)
    got, want, x = latent.eval(), layer.eval(), X.to(dtype)
    error = (got(x).double() - want(x).double()).norm() / want(x).double().norm()
    assert error < 16 * torch.finfo(dtype).eps  # four products in a row, of weights that are rounded once


DYNAMIC = qkv.RotaryEmbedding(8, scaling=qkv.RotaryScaling.dynamic(2.0, max_position_embeddings=64))

INVALID: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ({"qk_norm": True}, {}, ValueError, "latent attention has no qk_norm; got Attention"),
    ({"sink_logits": True, "alibi": [1.0] * 4}, {}, ValueError, "latent attention has no sink_logits, alibi; got"),
    ({"rotary": DYNAMIC}, {}, ValueError, "latent attention has no rotary that depends on the length"),
    ({"gate": True}, {}, ValueError, "latent attention has no gate; got"),
    ({"position_bias": qkv.RelativePositionBias(4)}, {}, ValueError, "latent attention has no position_bias; got"),
    ({"context_dim": 48}, {}, ValueError, "latent attention has no context_dim"),
    ({}, {"rank": 0}, ValueError, "rank must be at least 1; got 0"),
    ({}, {"rank": 4.0}, TypeError, r"rank must be an int; got 4\.0"),
    ({"rotary": ROTARY}, {"rope_heads": 3}, ValueError, "rope_heads must be at most 2, the KV heads; got 3"),
    ({"rotary": ROTARY}, {"rope_heads": -1}, ValueError, "rope_heads must be at least 0; got -1"),
    ({}, {"rope_heads": "8"}, TypeError, "rope_heads must be an int; got '8'"),
]


@pytest.mark.parametrize(("options", "arguments", "error", "message"), INVALID)
def test_what_cannot_be_converted_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"convert_to_latent: {message}"):
        convert_to_latent(build(**options), **{"rank": 4, **arguments})


def test_other_layers_are_refused() -> None:
    latent = convert_to_latent(build(), 4)
    with pytest.raises(TypeError, match=r"convert_to_latent: layer must be a qkv\.Attention; got LatentAttention"):
        convert_to_latent(latent, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"convert_layer: layer must be a qkv\.Attention; got LatentAttention"):
        convert_layer(latent, 2)  # type: ignore[arg-type]


class Turned(qkv.RotaryEmbedding):
    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        return super().forward(x, offset + 1)


def test_a_rotary_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="latent attention has no rotary of another class"):
        convert_to_latent(build(rotary=Turned(8)), 4)
