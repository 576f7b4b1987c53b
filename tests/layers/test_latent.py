"""`LatentAttention`: its formula and transformers' modules, in either form, in one call or from a cache."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from oracle import Rule, Scores, attend
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import qkv
from qkv import Mask
from qkv.layers.latent_heads import LatentHeads

SIZES: dict[str, Any] = {"kv_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10}
X = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))


def build(**options: Any) -> qkv.LatentAttention:
    torch.manual_seed(0)
    rotary = qkv.RotaryEmbedding(8, interleaved=True)
    layer = qkv.LatentAttention(48, 4, **{**SIZES, "mask": Mask.causal(), "rotary": rotary, **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.eval()


@pytest.fixture(params=["expanded", "absorbed"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either form, whatever it costs."""
    with mock.patch.object(LatentHeads, "is_cheaper_absorbed", return_value=request.param == "absorbed"):
        yield request.param


def by_hand(layer: qkv.LatentAttention, x: Tensor, rule: Rule, scores: Scores | None = None) -> Tensor:
    """The formula of DeepSeek-V2, section 2.1, in fp64."""
    weights = {name: weight.double() for name, weight in layer.state_dict().items()}
    x = x.double()

    def project(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        gain = weights.get(f"{name}.weight")
        return x if gain is None else gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    q = project(x, "q_proj") if layer.q_rank is None else project(norm(project(x, "q_a_proj"), "q_a_norm"), "q_b_proj")
    q = q.unflatten(2, (4, 20)).transpose(1, 2)
    latent, rotary_key = project(x, "kv_a_proj").split([16, 8], dim=-1)
    k, v = project(norm(latent, "kv_a_norm"), "kv_b_proj").unflatten(2, (4, 22)).transpose(1, 2).split([12, 10], -1)
    k = torch.cat([k, rotated(rotary_key)[:, None].expand(-1, 4, -1, -1)], dim=-1)
    q = torch.cat([q[..., :12], rotated(q[..., 12:])], dim=-1)
    return project(attend(q, k, v, rule, scores=scores).out.transpose(1, 2).flatten(2), "out_proj")


OPTIONS: dict[str, tuple[dict[str, Any], Rule, Scores]] = {
    "causal": ({}, Rule(right=0), Scores()),
    "full": ({"mask": Mask.full()}, Rule(), Scores()),
    "window, sinks": ({"mask": Mask.causal(3, sink_tokens=1)}, Rule(left=2, right=0, sink_tokens=1), Scores()),
    "low-rank queries": ({"q_rank": 20}, Rule(right=0), Scores()),
    "no norms": ({"q_rank": 20, "norm_eps": None}, Rule(right=0), Scores()),
    "biases": ({"bias": True, "q_rank": 20}, Rule(right=0), Scores()),
    "scale, softcap": ({"scale": 0.7, "softcap": 2.0}, Rule(right=0), Scores(scale=0.7, softcap=2.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_both_forms_are_the_formula(name: str, dtype: torch.dtype, form: str) -> None:
    options, rule, scores = OPTIONS[name]
    layer, x = build(**options).to(dtype), X.to(dtype)
    with mock.patch.object(LatentHeads, "is_cheaper_absorbed", return_value=False):
        peer = build(**options, backend="reference").to(dtype)(x)  # torch's operations, in the order of transformers
    assert_within_budget(layer(x), by_hand(layer, x, rule, scores), peer, f"{name}, {form}")


def test_the_cheaper_form_is_that_with_fewer_multiplications() -> None:
    for rank, nope, rope, value in ((512, 128, 64, 128), (16, 12, 8, 10), (4, 64, 0, 64), (8, 0, 4, 8)):
        heads = LatentHeads(nn.Identity(), rank, nope, value)
        for lq, lk in ((1, 1), (1, 2), (1, 4096), (7, 9), (160, 4096), (200, 4096), (4096, 4096), (3, 0)):
            pairs, widths = lq * lk, rank * (nope + value)
            expanded = lk * widths + pairs * (nope + rope + value)
            absorbed = lq * widths + pairs * (rank + rope + rank)
            assert heads.is_cheaper_absorbed(lq, lk) == (absorbed < expanded), (rank, lq, lk)


MODULES = {
    "V2": (DeepseekV2Config, modeling_deepseek_v2, "DeepseekV2"),
    "V3": (DeepseekV3Config, modeling_deepseek_v3, "DeepseekV3"),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 512,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "low-rank queries": {},
    "projected queries": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases, projected queries": {"attention_bias": True, "q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "halves": {"rope_interleave": False},
}


def of_transformers(version: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """An attention module of a small random model, and the module of its rotary embedding."""
    kind, modeling, prefix = MODULES[version]
    config = kind(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        max_position_embeddings=4096,
        **{"q_lora_rank": 20, **options},
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = getattr(modeling, f"{prefix}Attention")(config, 0).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module, getattr(modeling, f"{prefix}RotaryEmbedding")(config)


def run_theirs(module: nn.Module, rotary: nn.Module, x: Tensor) -> Tensor:
    positions = rotary(x, torch.arange(x.shape[1])[None])
    mask = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    out: Tensor = module(hidden_states=x, position_embeddings=positions, attention_mask=mask)[0]
    return out


@pytest.mark.parametrize(
    ("version", "name"),
    [(version, name) for version in MODULES for name in CONFIGURATIONS if (version, name) != ("V2", "halves")],
)
@torch.no_grad()
def test_a_module_of_transformers_converts(version: str, name: str, form: str) -> None:
    module, rotary = of_transformers(version, **CONFIGURATIONS[name])
    layer = qkv.LatentAttention.from_transformers(module)
    assert layer.training == module.training
    assert layer.kv_b_proj.weight.data_ptr() != module.kv_b_proj.weight.data_ptr()
    want = run_theirs(copy.deepcopy(module).double(), rotary, X.double())
    peer = run_theirs(module, rotary, X)
    assert_within_budget(layer(X), want, peer, f"{version}, {name}, {form}", angles(want))
    cache = qkv.LatentKVCache()
    steps = torch.cat([layer(part, cache=cache) for part in X.split([4, 1, 3, 1], dim=1)], dim=1)
    assert_within_budget(steps, want, peer, f"{version}, {name}, {form}, in steps", angles(want))
    assert cache.nbytes == 2 * 16 * (16 + 8) * 4


def angles(want: Tensor) -> float:
    """What rounding of cosines in fp32 may add: theirs of the fp64 module are rounded too, in the same way or not."""
    return torch.finfo(torch.float32).eps * want.abs().max().item()


def test_other_modules_of_transformers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be the attention of a DeepSeek-V2 or V3 model .*; got Linear"):
        qkv.LatentAttention.from_transformers(nn.Linear(3, 3))
    module, _ = of_transformers("V3")
    module.kv_b_proj = nn.Sequential(module.kv_b_proj)
    with pytest.raises(TypeError, match=r"kv_b_proj must be an nn\.Linear .* got Sequential\. Merge adapters"):
        qkv.LatentAttention.from_transformers(module)


@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(4), Mask.causal(3, sink_tokens=2)], ids=repr)
@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 5], [6, 1, 1, 1]], ids=str)
@torch.no_grad()
def test_chunks_with_a_cache_equal_one_call(parts: list[int], mask: Mask, form: str) -> None:
    layer, cache = build(mask=mask), qkv.LatentKVCache()
    got = torch.cat([layer(part, cache=cache) for part in X.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(got, layer(X), rtol=1e-4, atol=1e-4)
    assert cache.length == 9
    cache.crop(5)
    cache.select(torch.tensor([1, 1, 0]))
    rows = X[[1, 1, 0]]
    torch.testing.assert_close(layer(rows[:, 5:], cache=cache), layer(rows)[:, 5:], rtol=1e-4, atol=1e-4)
    weights = layer.attention_weights(rows[:, :1], cache=cache)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 1))


@torch.no_grad()
def test_each_row_of_a_padded_batch_is_the_same_text_alone(form: str) -> None:
    layer, cache, lengths = build(), qkv.LatentKVCache(), (6, 2)
    keep = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    x = torch.full((2, 6, 48), torch.nan)
    for row, length in enumerate(lengths):
        x[row, 6 - length :] = X[row, :length]
    out = layer(x, mask=Mask.padding(keep), cache=cache)
    steps = torch.stack([X[row, length : length + 3] for row, length in enumerate(lengths)])
    found = [out, layer(steps[:, :1], cache=cache), layer(steps[:, 1:], cache=cache)]
    for row, length in enumerate(lengths):
        want = layer(X[row : row + 1, : length + 3])[0]
        got = torch.cat([found[0][row, 6 - length :], found[1][row], found[2][row]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [9, 5]
    joined, other = copy.copy(cache), qkv.LatentKVCache()
    layer(X[:1, :4], cache=other)
    joined.join(other)
    joined.replace(torch.tensor([0]), other)
    assert joined.lengths.tolist() == [4, 5, 4] and cache.lengths.tolist() == [9, 5]
    step = torch.stack([X[0, 4], X[1, 5], X[0, 4]])[:, None]
    want = torch.stack([layer(X[:1, :5])[0, 4:], layer(X[1:, :6])[0, 5:], layer(X[:1, :5])[0, 4:]])
    torch.testing.assert_close(layer(step, cache=joined), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_bias_and_positions_of_a_call(form: str) -> None:
    layer, positions = build(), torch.tensor([[3, 4, 5, 9, 10, 11, 12, 20, 21]])
    bias = torch.randn(1, 4, 9, 9)
    whole = layer(X, bias=bias, positions=positions)
    cache = qkv.LatentKVCache()
    parts = ((0, 5), (5, 6), (6, 9))
    steps = [layer(X[:, i:j], bias=bias[:, :, i:j, :j], positions=positions[:, i:j], cache=cache) for i, j in parts]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(X, positions=torch.arange(9)), layer(X))
    assert not torch.allclose(whole, layer(X, bias=bias), atol=1e-3)
    assert not torch.allclose(whole, layer(X, positions=positions), atol=1e-3)
    with pytest.raises(ValueError, match="positions rotate queries and keys, so the layer needs a rotary"):
        build(rotary=None)(X, positions=positions)


@torch.no_grad()
def test_a_step_reads_latents_once_as_keys_and_as_values() -> None:
    """Multi-query attention over the memory of the cache, with values that are a view of keys."""
    layer, cache = build(), qkv.LatentKVCache()
    layer(X[:, :8], cache=cache)
    with mock.patch("qkv.functional.attention", wraps=qkv.attention) as called:
        layer(X[:, 8:], cache=cache)
    (q, k, v), _ = called.call_args
    assert (q.shape, k.shape, v.shape) == ((2, 4, 1, 24), (2, 1, 9, 24), (2, 1, 9, 16))
    memory = cache._parts[0].memory
    assert memory is not None and k.data_ptr() == v.data_ptr() == memory.data_ptr()


def test_gradients_of_both_forms(form: str) -> None:
    layer = build(q_rank=20)
    exact = copy.deepcopy(layer).double()
    peer = copy.deepcopy(layer)
    peer.backend = "reference"
    found = []
    for one, x in ((layer, X), (exact, X.double()), (peer, X)):
        x = x.clone().requires_grad_()
        cache = qkv.LatentKVCache()
        out = torch.cat([one(part, cache=cache) for part in x.split([6, 1, 2], dim=1)], dim=1)
        out.square().sum().backward()
        found.append({"x": x.grad, **{name: parameter.grad for name, parameter in one.named_parameters()}})
    got, want, torchs = found
    for name in want:
        assert_within_budget(got[name], want[name], torchs[name], f"{name}, {form}")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_masked_token_has_no_influence_even_if_it_is_nan(form: str) -> None:
    layer, keep = build(), torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    mask, broken = Mask.padding(keep), X.masked_fill(~keep[..., None], torch.nan)
    got = layer(broken, mask=mask)[keep]
    torch.testing.assert_close(got, layer(X, mask=mask)[keep])
    assert got.isfinite().all()
    documents = Mask.documents(torch.arange(9)[None] // 4)
    torch.testing.assert_close(layer(X, mask=documents)[:, 4:8], layer(X[:, 4:8]), rtol=1e-4, atol=1e-4)


def test_no_tokens_and_no_rows(form: str) -> None:
    layer, cache = build(), qkv.LatentKVCache()
    assert layer(X[:, :0]).shape == (2, 0, 48) and layer(X[:0]).shape == (0, 9, 48)
    with torch.no_grad():
        layer(X[:, :3], cache=cache)
        assert layer(X[:, :0], cache=cache).shape == (2, 0, 48) and cache.length == 3


@pytest.mark.parametrize(
    "options",
    [{"rope_dim": 0, "rotary": None}, {"nope_dim": 0}, {"rotary": None}, {"value_dim": None}, {"kv_rank": 1}],
    ids=str,
)
@torch.no_grad()
def test_keys_of_one_part_alone(options: dict[str, Any]) -> None:
    """Without a rotary key, of a rotary key alone, without positions, and with the least rank."""
    layer, forms = build(**options), []
    for absorbed in (True, False):
        with mock.patch.object(LatentHeads, "is_cheaper_absorbed", return_value=absorbed):
            cache = qkv.LatentKVCache()
            forms += [layer(X), torch.cat([layer(part, cache=cache) for part in X.split([5, 1, 3], dim=1)], dim=1)]
    for other in forms[1:]:
        torch.testing.assert_close(other, forms[0], rtol=1e-4, atol=1e-4)


def test_dropout_has_an_effect_in_training_only(form: str) -> None:
    layer = build(dropout=0.5)
    assert torch.equal(layer(X), layer(X))
    layer.train()
    assert not torch.equal(layer(X), layer(X))


HOOKS: dict[str, Callable[[nn.Linear], object]] = {
    "hook": lambda linear: linear.register_forward_hook(lambda module, given, out: 2 * out),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "parametrisation": lambda linear: nn.utils.parametrize.register_parametrization(linear, "weight", Doubled()),
    "forward": lambda linear: setattr(linear, "forward", lambda x: 2 * F.linear(x, linear.weight)),
}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("attach", HOOKS)
@torch.no_grad()
def test_what_is_attached_to_the_projection_of_latents_takes_effect(attach: str, form: str) -> None:
    layer, doubled = build(), build()
    doubled.kv_b_proj.weight.mul_(2)
    want = doubled(X)
    HOOKS[attach](layer.kv_b_proj)
    torch.testing.assert_close(layer(X), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "attach", ["hook", *(pytest.param(name, marks=pytest.mark.long) for name in HOOKS if name != "hook")]
)
@torch.no_grad()
def test_what_is_attached_takes_effect_when_compiled(attach: str) -> None:
    torch.compiler.reset()
    layer, doubled = build(kv_rank=4), build(kv_rank=4)  # absorbed
    doubled.kv_b_proj.weight.mul_(2)
    HOOKS[attach](layer.kv_b_proj)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(X), doubled(X), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_layer_decodes() -> None:
    torch.compiler.reset()
    layer = build()
    compiled, cache = torch.compile(layer, backend="aot_eager", fullgraph=True), qkv.LatentKVCache()
    got = torch.cat([compiled(part, cache=cache) for part in X.split([8, 1], dim=1)], dim=1)
    torch.testing.assert_close(got, layer(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"kv_rank": 4}], ids=["expanded", "absorbed"])
@torch.no_grad()
def test_an_exported_layer_takes_other_lengths(options: dict[str, int]) -> None:
    layer, length = build(**options), torch.export.Dim("length", min=2)
    program = torch.export.export(layer, (X,), dynamic_shapes=({1: length},)).module()
    longer = torch.randn(2, 23, 48)
    torch.testing.assert_close(program(longer), layer(longer), rtol=1e-4, atol=1e-4)


def test_transforms_autocast_and_meta() -> None:
    layer = build()
    x = X[None].repeat(3, 1, 1, 1)
    torch.testing.assert_close(torch.vmap(layer)(x)[2], layer(X), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = qkv.LatentKVCache()
        low = torch.cat([layer(part, cache=cache) for part in X.split([6, 3], dim=1)], dim=1)
    assert low.dtype is torch.bfloat16
    assert (low - layer(X)).norm() < 0.03 * low.norm()
    with torch.device("meta"):
        empty = build()
    assert empty(X.to("meta")).shape == X.shape
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(X), layer(X))
    empty.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in empty.parameters())


def test_state_dict_and_copies() -> None:
    layer = build(q_rank=20, bias=True)
    assert not list(layer.buffers())
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "q_a_proj.weight": (20, 48),
        "q_a_proj.bias": (20,),
        "q_a_norm.weight": (20,),
        "q_b_proj.weight": (80, 20),
        "kv_a_proj.weight": (24, 48),
        "kv_a_proj.bias": (24,),
        "kv_a_norm.weight": (16,),
        "kv_b_proj.weight": (88, 16),
        "out_proj.weight": (48, 40),
        "out_proj.bias": (48,),
    }
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    want = layer(X)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(X), want)
        nn.init.zeros_(twin.out_proj.weight)
        assert torch.equal(layer(X), want)
    assert "kv_rank=16, nope_dim=12, rope_dim=8, value_dim=10, q_rank=20, mask=Mask.causal()" in repr(layer)


CONSTRUCTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_rank": 0}, ValueError, "kv_rank must be at least 1; got 0"),
    ({"kv_rank": 4.0}, TypeError, "kv_rank must be an int; got 4.0"),
    ({"nope_dim": -1}, ValueError, "nope_dim must be at least 0; got -1"),
    ({"nope_dim": 0, "value_dim": None}, ValueError, "value_dim must be at least 1; got 0"),
    (
        {"nope_dim": 0, "rope_dim": 0, "rotary": None},
        ValueError,
        "a key must have channels, of nope_dim or of rope_dim",
    ),
    ({"q_rank": 0}, ValueError, "q_rank must be at least 1, or None for a projection at once; got 0"),
    ({"rotary": qkv.RotaryEmbedding(4)}, ValueError, "rotary must be for head_dim=8; got 4"),
    ({"rotary": 1e4}, TypeError, "rotary must be a qkv.RotaryEmbedding"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be a positive number, or None for no norms; got 0.0"),
    ({"bias": 1}, TypeError, "bias must be True or False; got 1"),
    ({"scale": "1"}, TypeError, r"scale must be a finite number, or None for 1 / sqrt\(nope_dim \+ rope_dim\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None; got 0.0"),
    ({"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\); got 1.0"),
    ({"mask": "causal"}, TypeError, "mask must be a qkv.Mask; got str"),
    ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTIONS)
def test_invalid_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"LatentAttention: {message}"):
        build(**options)


CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (X[..., :-1], {}, ValueError, r"x must be \(B, L, 48\); got shape \(2, 9, 47\)"),
    (X.tolist(), {}, TypeError, r"x must be a tensor \(B, L, 48\); got list"),
    (X.double(), {}, ValueError, r"x must be torch.float32, as the layer's weights are .*; got torch.float64"),
    (X, {"mask": True}, TypeError, "mask must be a qkv.Mask; got bool"),
    (X, {"cache": qkv.KVCache()}, TypeError, "cache must be a LatentKVCache; got KVCache"),
]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("call", ["forward", "attention_weights"])
def test_nested_tensors_are_refused_with_what_to_do(call: str, cached: bool) -> None:
    x = torch.nested.nested_tensor([X[0], X[1, :4]], layout=torch.jagged)
    layer, cache = build(), qkv.LatentKVCache()
    with pytest.raises(ValueError, match=r"LatentAttention: x must be .* \(B, L, 48\); got a nested tensor\.") as error:
        getattr(layer, call)(x, cache=cache if cached else None)
    assert "on x.to_padded_tensor(0.0) with mask=Mask.padding(lengths)" in str(error.value) and cache.length == 0
    padded = layer(x.to_padded_tensor(0.0), mask=Mask.padding(torch.tensor([9, 4])))
    torch.testing.assert_close(padded[1, :4], layer(X[1:, :4])[0])


@pytest.mark.parametrize(("x", "options", "error", "message"), CALLS)
def test_invalid_calls_are_refused(x: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"LatentAttention: {message}"):
        build()(x, **options)
