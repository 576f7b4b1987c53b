"""`DifferentialAttention` against its formula and against transformers' DiffLlama."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.convert import convert_layer, prune_heads
from qkv.layers.cached_call import CallOptions

NOTHING = CallOptions(qkv.Mask.full(), None, None, None)
X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def build(**options: Any) -> qkv.DifferentialAttention:
    torch.manual_seed(0)
    layer = qkv.DifferentialAttention(32, 4, **{"num_kv_heads": 2, "mask": Mask.causal(), **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.eval()


def by_hand(layer: qkv.DifferentialAttention, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the weights of a causal layer without rotation, head by head in fp64."""
    state, x = {name: value.double() for name, value in layer.state_dict().items()}, x.double()
    q, k, v = (F.linear(x, state[f"{n}_proj.weight"], state[f"{n}_proj.bias"]).unflatten(2, (-1, 8)) for n in "qkv")
    factor = (
        (state["lambda_q1"] @ state["lambda_k1"]).exp()
        - (state["lambda_q2"] @ state["lambda_k2"]).exp()
        + layer.lambda_init
    )
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    outs, weights = [], []
    for head in range(4):
        maps = [
            (scale * q[:, :, head, half] @ k[:, :, head // 2, half].mT).masked_fill(hidden, -torch.inf).softmax(-1)
            for half in (slice(0, 4), slice(4, 8))
        ]
        weights.append(maps[0] - factor * maps[1])
        out = weights[-1] @ v[:, :, head // 2]
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["sub_norm.weight"]
        outs.append((1 - layer.lambda_init) * out)
    return F.linear(torch.cat(outs, -1), state["out_proj.weight"], state["out_proj.bias"]), torch.stack(weights, 1)


@pytest.mark.parametrize("options", [{}, {"scale": 0.9, "lambda_init": 0.3}], ids=str)
def test_equals_the_formula(options: dict[str, Any]) -> None:
    layer = build(**options)
    out, weights = by_hand(layer, X, options.get("scale", 0.5))
    torch.testing.assert_close(layer(X), out.float())
    torch.testing.assert_close(layer.attention_weights(X), weights.float())
    layer.double()
    torch.testing.assert_close(layer(X.double()), by_hand(layer, X, options.get("scale", 0.5))[0])


@pytest.mark.parametrize(
    "make", [qkv.KVCache, lambda: qkv.SlidingKVCache(window=4), qkv.Int8KVCache], ids=["kv", "sliding", "int8"]
)
def test_decoding_equals_the_whole_sequence(make: Any) -> None:
    window = isinstance(make(), qkv.SlidingKVCache)
    layer = build(mask=Mask.causal(4) if window else Mask.causal(), rotary=qkv.RotaryEmbedding(4))
    cache = make()
    with torch.no_grad():
        steps = torch.cat([layer(part, cache=cache) for part in X.split([3, 1, 1, 4], dim=1)], dim=1)
        want = layer(X)
    if isinstance(cache, qkv.Int8KVCache):  # codes are rounded, to half of 1/127 of the largest number of a row
        assert 0 < (steps - want).abs().max() < 0.1 * want.abs().max()
    else:
        torch.testing.assert_close(steps, want)


def test_the_halves_of_a_head_are_rotated_as_heads_of_their_own() -> None:
    layer = build(rotary=qkv.RotaryEmbedding(4))
    q = layer._inputs(X, None, NOTHING).q
    plain = build()._inputs(X, None, NOTHING).q
    rotated = torch.cat([qkv.RotaryEmbedding(4)(part) for part in plain.chunk(2, -1)], -1)
    torch.testing.assert_close(q, rotated)


def test_nested_tensors_are_their_sequences() -> None:
    layer = build(rotary=qkv.RotaryEmbedding(4))
    texts = [X[0, :4], X[1]]
    out = layer(torch.nested.as_nested_tensor(texts, layout=torch.jagged))
    for got, text in zip(out.unbind(), texts, strict=True):
        torch.testing.assert_close(got, layer(text[None])[0])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making, without the kernel
def test_every_parameter_has_a_gradient_and_compiled_code_is_the_same() -> None:
    layer = build(gate=True)
    x = X.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), layer(X))


def test_options_build_an_equal_layer_and_parameters_are_reset() -> None:
    layer = build(rotary=qkv.RotaryEmbedding(4), lambda_init=0.3, sub_norm_eps=1e-3, value_dim=6, out_bias=False)
    again = qkv.DifferentialAttention(**layer.options())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(X), layer(X))
    assert again.options()["rotary"] is layer.options()["rotary"] and repr(again) == repr(layer)
    with torch.device("meta"):
        empty = qkv.DifferentialAttention(32, 4)
    empty.to_empty(device="cpu").reset_parameters()
    assert all(parameter.isfinite().all() for parameter in empty.parameters())
    assert torch.equal(empty.sub_norm.weight, torch.ones(8)) and 0 < empty.lambda_q1.std() < 1


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
@pytest.mark.parametrize("heads", [(8, 4), (8, 8), (4, 2)], ids=str)
def test_equals_the_module_of_diffllama(heads: tuple[int, int]) -> None:
    from transformers import DiffLlamaConfig, DiffLlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": 40}
    config = DiffLlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=8, rms_norm_eps=0.1, attention_bias=True)
    model = DiffLlamaModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for decoder in model.layers:
        decoder.self_attn.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((module, kwargs["hidden_states"], out[0])), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.arange(11)[None], use_cache=False)
    for module, x, want in seen:
        layer = qkv.DifferentialAttention.from_transformers(module)
        assert (layer.num_heads, layer.lambda_init) == (heads[0] // 2, module.lambda_init)
        torch.testing.assert_close(layer(x), want)
    with pytest.raises(TypeError, match=r"got DiffLlamaAttention\. Use DifferentialAttention\.from_transformers\."):
        qkv.Attention.from_transformers(seen[0][0])
    with pytest.raises(TypeError, match=r"must be a DiffLlamaAttention of transformers; got Linear\."):
        qkv.DifferentialAttention.from_transformers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"qk_norm": True}, ValueError, "qk_norm must be off, since two maps do not define it; got True"),
        ({"sink_logits": True}, ValueError, "sink_logits must be off"),
        ({"dropout": 0.1}, ValueError, r"dropout must be off, .*; got 0\.1"),
        ({"head_dim": 7}, ValueError, "head_dim must be even, the width of two queries; got 7"),
        ({"rotary": qkv.RotaryEmbedding(8)}, ValueError, "rotary must be for head_dim=4; got 8"),
        ({"rotary": True}, TypeError, r"rotary must be a qkv\.RotaryEmbedding"),
        ({"rotary": qkv.RotaryEmbedding(4), "context_dim": 3}, ValueError, "rotary has no meaning between two"),
        ({"lambda_init": "0.8"}, TypeError, "lambda_init must be a finite number; got '0.8'"),
        ({"sub_norm_eps": 0.0}, ValueError, "sub_norm_eps must be a positive number; got 0.0"),
        ({"flavour": 1}, TypeError, "got an unexpected argument 'flavour'"),
    ],
)
def test_what_is_not_defined_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^DifferentialAttention: {message}"):
        qkv.DifferentialAttention(32, 4, **options)


def test_conversions_are_refused_by_name() -> None:
    layer = build()
    with pytest.raises(ValueError, match=r"^to_torch: .* one map per head; got a DifferentialAttention\."):
        layer.to_torch()
    with pytest.raises(ValueError, match=r"^from_torch: .* one map per head; got a DifferentialAttention\."):
        qkv.DifferentialAttention.from_torch(nn.MultiheadAttention(32, 4))
    with pytest.raises(TypeError, match=r"^convert_layer: layer must have one map .*; got a DifferentialAttention\."):
        convert_layer(layer, 1)
    with pytest.raises(TypeError, match=r"^prune_heads: layer must have one map .*; got a DifferentialAttention\."):
        prune_heads(layer, [0])
