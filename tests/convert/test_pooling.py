"""`pool_heads` against scalar sums in numpy; `group_heads` and `convert_layer` against what attention computes."""

import inspect
from unittest import mock

import numpy as np
import pytest
import torch

import qkv
from qkv.convert import convert_layer, group_heads, pool_heads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mean_by_hand(weight, heads, groups):
    """Neighbours, then neighbours of those, in scalar operations of numpy."""
    precise = np.float64 if weight.dtype == torch.float64 else np.float32
    rows = weight.to(torch.float64).numpy().astype(precise).reshape(groups, heads // groups, -1)

    def total(parts):
        if len(parts) == 1:
            return parts[0]
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        return total(pairs + parts[len(pairs) * 2 :])

    means = np.stack([total(list(group)) / precise(heads // groups) for group in rows])
    return torch.from_numpy(means).to(weight.dtype).reshape(-1, *weight.shape[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (8, 2), (8, 1), (12, 4), (7, 1), (15, 3)])
@pytest.mark.parametrize("columns", [(), (11,)])
def test_mean_is_the_rounded_mean_of_fp32(dtype, heads, groups, columns):
    weight = torch.randn(heads * 5, *columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    pooled = pool_heads(weight, heads, groups)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, mean_by_hand(weight, heads, groups))


def test_mean_of_half_precision_does_not_overflow():
    weight = torch.full((4, 2), 60000.0, dtype=torch.float16)
    assert torch.equal(pool_heads(weight, 4, 1), weight[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mean", "first", "random"])
def test_pooling_to_all_heads_returns_the_tensor(dtype, how):
    weight = torch.randn(8, 3).to(dtype)
    weight[0, 0] = float("nan")
    assert pool_heads(weight, 4, 4, how=how) is weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("heads", "between", "groups"), [(8, 4, 2), (16, 4, 1), (12, 6, 2), (24, 6, 2), (12, 3, 1)])
def test_two_steps_equal_one_bit_for_bit_if_the_first_is_a_power_of_two(dtype, heads, between, groups):
    weight = torch.randn(heads * 7, 13, dtype=dtype, generator=torch.Generator().manual_seed(2))
    twice = pool_heads(pool_heads(weight, heads, between), between, groups)
    assert torch.equal(twice, pool_heads(weight, heads, groups))


def test_two_steps_differ_from_one_if_the_first_is_not_a_power_of_two():
    """Thirds round: the promise above is as wide as it can be."""
    weight = torch.randn(12 * 64, 64, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(pool_heads(pool_heads(weight, 12, 4), 4, 2), pool_heads(weight, 12, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_steps_equal_one_up_to_the_rounding_of_the_first(dtype):
    """Half a unit of each mean between, whose mean is taken, and half a unit of either result."""
    weight = torch.randn(8 * 64, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    between = pool_heads(weight, 8, 4)
    twice, once = pool_heads(between, 4, 2).double(), pool_heads(weight, 8, 2).double()
    unit = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    allowed = unit * (pool_heads(between.abs().double(), 4, 2) + twice.abs() + once.abs()) * (1 + unit) + 2 * smallest
    assert ((twice - once).abs() <= allowed).all()
    assert not torch.equal(twice, once)


def test_first_takes_the_first_of_each_group():
    weight = torch.arange(24.0).view(12, 2)
    assert torch.equal(pool_heads(weight, 6, 2, how="first"), weight[[0, 1, 6, 7]])


def test_random_has_the_scale_of_the_weight_and_repeats_by_seed():
    weight = 3 * torch.randn(64 * 16, 64, generator=torch.Generator().manual_seed(5))
    drawn = pool_heads(weight, 64, 32, how="random", seed=9)
    assert torch.equal(drawn, pool_heads(weight, 64, 32, how="random", seed=9))
    assert not torch.equal(drawn, pool_heads(weight, 64, 32, how="random", seed=10))
    # 32768 draws: the root mean square is known to within 5 deviations of 1 / sqrt(2 * 32768).
    assert abs(drawn.std() / weight.square().mean().sqrt() - 1) < 5 / (2 * drawn.numel()) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(8, 2), 8, 3), ValueError, r"new_kv_heads must divide num_kv_heads=8 \(8, 4, 2, 1\); got 3\."),
        ((torch.zeros(8, 2), 8, 0), ValueError, r"num_kv_heads=8 .*; got 0\."),
        ((torch.zeros(9, 2), 4, 2), ValueError, r"must be a multiple of the 4 heads; got shape \(9, 2\)"),
        ((torch.zeros(8, 2), 8, "2"), TypeError, "pool_heads: new_kv_heads must be an int; got '2'"),
        ((torch.zeros(8, 2), True, 1), TypeError, "pool_heads: num_kv_heads must be an int; got True"),
        ((torch.zeros(8, 2, dtype=torch.int8), 4, 2), TypeError, "must be floating-point; got torch.int8"),
    ],
)
def test_invalid_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        pool_heads(*arguments)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="how must be one of mean, first, random; got 'median'"):
        pool_heads(torch.zeros(8, 2), 8, 2, how="median")
    with pytest.raises(
        ValueError,
        match=r"got 'aligned'\. For aligned, which needs all projections, use convert_layer or convert_state",
    ):
        pool_heads(torch.zeros(8, 2), 8, 2, how="aligned")


def test_interleaved_groups_become_contiguous():
    """Head h reads key h % 2 before, h // 3 after, and all heads compute the same."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 5, 12, generator=generator)
    q, out = torch.randn(24, 12, generator=generator), torch.randn(12, 24, generator=generator)
    k, v = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)

    def attend(q, out, group):
        heads = (x @ q.T).view(5, 6, 4).transpose(0, 1)
        mixed = torch.stack([torch.softmax(heads[h] @ k[group(h)].T, -1) @ v[group(h)] for h in range(6)])
        return mixed.transpose(0, 1).flatten(1) @ out.T

    moved = attend(group_heads(q, 6, 2), group_heads(out, 6, 2, dim=1), lambda h: h // 3)
    torch.testing.assert_close(moved, attend(q, out, lambda h: h % 2))
    with pytest.raises(
        ValueError, match=r"dimension 1 of weight must be a multiple of the 5 heads.* got shape \(12, 24\)"
    ):
        group_heads(out, 5, 5, dim=1)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_converted_layer_computes_with_shared_heads(how):
    """Compared with the layer whose heads of each group all have the pooled keys and values."""
    torch.manual_seed(8)
    options = {"mask": qkv.Mask.causal(3), "rotary": qkv.RotaryEmbedding(8), "qk_norm": True, "sink_logits": True}
    layer = qkv.MultiHeadAttention(48, 6, value_dim=10, head_dim=8, scale=0.3, softcap=5.0, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    grouped = convert_layer(layer, 2, how=how)
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        got = grouped(x)
        for projection in (layer.k_proj, layer.v_proj):
            for parameter in (projection.weight, projection.bias):
                heads = parameter.unflatten(0, (2, 3, -1))
                shared = heads.mean(1, keepdim=True) if how == "mean" else heads[:, :1]
                parameter.copy_(shared.expand_as(heads).flatten(0, 2))
        torch.testing.assert_close(got, layer(x))
    assert (type(grouped), grouped.num_kv_heads, grouped.training) == (qkv.Attention, 2, False)
    assert grouped.q_proj.weight.data_ptr() != layer.q_proj.weight.data_ptr()
    assert torch.equal(grouped.q_proj.weight, kept["q_proj.weight"])


def test_converted_layer_draws_keys_and_values_independently():
    layer = qkv.MultiHeadAttention(32, 4)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    drawn = convert_layer(layer, 2, how="random", seed=1)
    assert not torch.equal(drawn.k_proj.weight, drawn.v_proj.weight)
    assert not torch.equal(drawn.k_proj.bias, drawn.v_proj.bias)


def test_converting_to_all_heads_keeps_the_layer():
    layer = qkv.GroupedQueryAttention(32, 4, 2, alibi=torch.rand(4), bias=False, dtype=torch.bfloat16)
    same, x = convert_layer(layer, 2), torch.randn(1, 4, 32, dtype=torch.bfloat16)
    assert torch.equal(same(x), layer(x))


def test_a_converted_layer_keeps_every_option():
    layer = qkv.MultiHeadAttention(32, 4)
    known = set(inspect.signature(qkv.Attention).parameters) - {"unknown"}
    seen = mock.patch.object(qkv.Attention, "__init__", side_effect=RuntimeError("seen"))
    with seen as init, pytest.raises(RuntimeError, match="seen"):
        convert_layer(layer, 2)
    assert {"embed_dim", "num_heads", *init.call_args.kwargs} == known


def test_gates_stay_with_their_query_heads_and_are_not_aligned():
    layer, x = qkv.MultiHeadAttention(32, 4, gate=True), torch.randn(1, 5, 32)
    grouped = convert_layer(layer, 2, how="first")
    assert torch.equal(grouped.gate_proj.weight, layer.gate_proj.weight)
    with pytest.raises(
        ValueError, match=r"^convert_layer: how must not be 'aligned' for a layer with gate=True, .*'mean'"
    ):
        convert_layer(layer, 2, how="aligned")
    assert not torch.allclose(grouped(x), layer(x))


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"must be a qkv\.Attention; got MultiheadAttention\. Convert an nn\.Multihead"):
        convert_layer(torch.nn.MultiheadAttention(32, 4), 2)
    for number in ("2", True, None, 2.0):
        with pytest.raises(TypeError, match="convert_layer: num_kv_heads must be an int; got"):
            convert_layer(qkv.MultiHeadAttention(32, 4), number, how="aligned")
