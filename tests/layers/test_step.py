"""A layer's call with few tokens as one call of the kernel: the function of its parts, whatever layer and cache."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from layers.test_projection import CHANGES
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.layers import step

pytestmark = pytest.mark.usefixtures("seed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def slopes(count: int) -> list[float]:
    return [0.5 / (i + 1) for i in range(count)]


LAYERS: dict[str, Callable[[], qkv.Attention]] = {
    "multi-head": lambda: qkv.CausalAttention(40, 5),
    "multi-query, odd widths": lambda: qkv.CausalAttention(21, 3, num_kv_heads=1, bias=False, out_bias=True),
    "rotary": lambda: qkv.CausalAttention(64, 4, num_kv_heads=2, rotary=qkv.RotaryEmbedding(16)),
    "rotary, in part, interleaved, scaled": lambda: qkv.CausalAttention(
        48,
        4,
        num_kv_heads=2,
        rotary=qkv.RotaryEmbedding(
            12,
            rotary_dim=10,
            interleaved=True,
            scaling=qkv.RotaryScaling.yarn(factor=4.0, original_max_position_embeddings=64),
        ),
    ),
    "norms": lambda: qkv.CausalAttention(48, 4, num_kv_heads=2, qk_norm=True, rotary=qkv.RotaryEmbedding(12)),
    "wider values": lambda: qkv.CausalAttention(32, 4, num_kv_heads=2, value_dim=11, head_dim=7),
    "window, sink tokens": lambda: qkv.CausalAttention(32, 4, mask=Mask.causal(6, sink_tokens=2)),
    "softcap, alibi, sink logits, scale": lambda: qkv.CausalAttention(
        32, 4, softcap=3.0, alibi=slopes(4), sink_logits=True, scale=0.3
    ),
}
CACHES: dict[str, Callable[[], Any]] = {
    "growing": qkv.KVCache,
    "reserved": lambda: qkv.KVCache(capacity=64),
    "int8": qkv.Int8KVCache,
}
CHUNKS = [5, 1, 2, 1, 4, 1, 1, 3, 1]
"""With a batch of 3, each has at most 16 tokens."""


def made(name: str, dtype: torch.dtype = torch.float32) -> qkv.Attention:
    layer = LAYERS[name]().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def decode(layer: qkv.Attention, x: Tensor, cache: Any, **options: Any) -> Tensor:
    return torch.cat([layer(part, cache=cache, **options) for part in x.split(CHUNKS, dim=1)], dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_it_computes_what_its_parts_do(
    name: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = made(name, dtype), torch.randn(3, sum(CHUNKS), 64)[..., : LAYERS[name]().embed_dim].to(dtype)
    cache, others = CACHES[kind](), CACHES[kind]()
    assert layer.explain(x[:, :5], cache=cache).is_one_call
    got = decode(layer, x, cache)
    with monkeypatch.context() as patch:
        patch.setattr(step, "MAX_TOKENS", 0)
        assert layer.explain(x[:, :5], cache=others).reason == "x has not 1 to 0 tokens"
        peer = decode(layer, x, others)
        want = decode(copy.deepcopy(layer).double(), x.double(), CACHES[kind]())
    allowance = {"int8": peer.double().abs().max().item() / 127}.get(kind, 0.0)
    assert_within_budget(got, want, peer, name, allowance)
    assert torch.equal(got, peer)
    for one, other in zip(cache.state_dict().values(), others.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sink_tokens", [0, 2])
@torch.no_grad()
def test_a_sliding_cache_drops_the_same_tokens(sink_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask.causal(5, sink_tokens=sink_tokens)
    layer = qkv.CausalAttention(32, 4, mask=mask, num_kv_heads=2, rotary=qkv.RotaryEmbedding(8)).eval()
    x = torch.randn(2, 45, 32)
    caches = [qkv.SlidingKVCache(5, sink_tokens) for _ in range(2)]
    chunks = [1, 3, 1, 6, 1, 7, 1, 1, 1, 8, 1, 1, 2, 1, 1, 1, 1, 1, 6]
    for part in x.split(chunks, dim=1):
        assert layer.explain(part, cache=caches[0]).is_one_call == (part.shape[1] <= 6)
        got = layer(part, cache=caches[0])
        with monkeypatch.context() as patch:
            patch.setattr(step, "MAX_TOKENS", 0)
            assert torch.equal(got, layer(part, cache=caches[1]))
        assert caches[0].nbytes == caches[1].nbytes
        state, other = (cache.state_dict() for cache in caches)
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize(
    "make", [qkv.KVCache, qkv.Int8KVCache, lambda: qkv.SlidingKVCache(6)], ids=["kv", "int8", "sliding"]
)
@torch.no_grad()
def test_rows_of_unequal_length_have_the_bits_of_their_text_alone(make: Callable[[], Any]) -> None:
    layer = qkv.CausalAttention(
        32, 4, num_kv_heads=2, mask=Mask.causal(6), rotary=qkv.RotaryEmbedding(8), bias=False
    ).eval()
    lengths, x = torch.tensor([3, 5, 1]), torch.randn(3, 16, 32)
    together, alone = make(), [make() for _ in lengths]
    layer(x[:, :5], mask=Mask.padding(lengths), cache=together)
    for row, (length, cache) in enumerate(zip(lengths.tolist(), alone, strict=True)):
        layer(x[row : row + 1, :length], cache=cache)
    for first, count in ((5, 1), (6, 3), (9, 1), (10, 1), (11, 4), (15, 1)):
        part = x[:, first : first + count]
        assert layer.explain(part, cache=together).is_one_call
        got = layer(part, cache=together)
        want = torch.cat([layer(part[row : row + 1], cache=cache) for row, cache in enumerate(alone)])
        assert torch.equal(got, want)
    assert together.lengths.tolist() == (lengths + 11).tolist()
    for tensor in together.state_dict().values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()
    for row, length in enumerate(together._rows_or_equal().stored.tolist()):  # slots after short rows are zeros
        assert all(not part.tensor[row, :, max(length, 5) :].any() for part in together._parts)


@torch.no_grad()
def test_without_a_cache_it_is_the_layer_on_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for mask in (None, Mask.causal(), Mask.sliding(4), Mask.causal(3, sink_tokens=1)):
        layer, x = qkv.Attention(32, 4, mask=mask, rotary=qkv.RotaryEmbedding(8)).eval(), torch.randn(2, 8, 32)
        assert layer.explain(x).is_one_call
        got = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(step, "MAX_TOKENS", 0)
            assert torch.equal(got, layer(x))


@torch.no_grad()
def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    layer, x = made("rotary"), torch.randn(8, 2, 64)
    want, threads = layer(x), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(layer(x), want)
            assert torch.equal(torch.cat([layer(row) for row in x.split(3)]), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
@torch.no_grad()
def test_modified_projections_are_called(name: str) -> None:
    layer, x = qkv.MultiHeadAttention(32, 4), torch.randn(1, 3, 32)
    nn.init.normal_(layer.q_proj.bias)
    before = layer(x)
    CHANGES[name](layer)
    assert layer.explain(x).is_one_call == (name == "no bias any more")
    assert not torch.allclose(layer(x), before)


WATCHED: dict[str, Callable[[qkv.Attention], Any]] = {
    "a hook of rotary": lambda layer: layer.rotary.register_forward_hook(lambda *call: 2 * call[-1]),
    "a subclass of rotary": lambda layer: setattr(layer, "rotary", type("Mine", (qkv.RotaryEmbedding,), {})(8)),
    "a hook of q_norm": lambda layer: layer.q_norm.register_forward_hook(lambda *call: 2 * call[-1]),
    "another norm": lambda layer: setattr(layer, "k_norm", nn.LayerNorm(8)),
    "norms of two eps": lambda layer: setattr(layer.q_norm, "eps", 1.0),
    "a method of the layer": lambda layer: setattr(layer, "_project_out", lambda out, x: out),
    "a gradient": lambda layer: layer.q_proj.weight.requires_grad_(True),
    "a gain with a gradient": lambda layer: layer.k_norm.weight.requires_grad_(True),
    "a dtype of its own": lambda layer: layer.double(),
    "a backend": lambda layer: setattr(layer, "backend", "sdpa"),
    "a scale that is no number": lambda layer: setattr(layer, "scale", torch.tensor(0.5)),
    "a softcap of 0": lambda layer: setattr(layer, "softcap", 0.0),
    "a function as gate": lambda layer: setattr(layer, "gate_proj", torch.sigmoid),
}


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_watched_or_replaced_is_called(name: str) -> None:
    layer = qkv.CausalAttention(32, 4, qk_norm=True, rotary=qkv.RotaryEmbedding(8)).requires_grad_(False)
    x = torch.randn(1, 3, 32)
    assert str(layer.explain(x)) == "one call of the kernel"
    WATCHED[name](layer)
    x = x.to(layer.q_proj.weight.dtype)
    assert str(layer.explain(x)).startswith("composed: ")


def test_calls_that_ask_for_more_are_composed() -> None:
    layer, x = qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8)).requires_grad_(False), torch.randn(2, 3, 32)
    calls: dict[str, dict[str, Any]] = {
        "bias or positions are given": {"positions": torch.arange(3)},
        "the mask has more than an interval": {"mask": Mask.padding(torch.tensor([3, 1]))},
        "the mask has chunks or a prefix": {"mask": Mask.chunked(2)},
        "the cache is a PagedKVCache": {"cache": qkv.PagedKVCache()},
    }
    for reason, options in calls.items():
        assert layer.explain(x, **options).reason == reason
        layer(x, **options)
    assert layer.explain(torch.randn(1, 17, 32)).reason == "x has not 1 to 16 tokens"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.explain(x).reason == "torch.autocast casts parts of it"
    assert layer.explain(x.clone().requires_grad_()).reason.startswith("gradients")
    dropping = qkv.CausalAttention(32, 4, dropout=0.5).requires_grad_(False)
    assert dropping.explain(x).reason == "weights are dropped"
    assert dropping.eval().explain(x).is_one_call
    for other in (qkv.DifferentialAttention(32, 4), qkv.Attention(32, 4, gate=True)):
        assert not other.requires_grad_(False).explain(x).is_one_call


def test_explain_refuses_what_the_layer_does() -> None:
    layer = qkv.CausalAttention(16, 2).requires_grad_(False)
    for x, error in (("x", TypeError), (torch.ones(3, 16), ValueError), (torch.ones(1, 3, 15), ValueError)):
        with pytest.raises(error, match=r"^CausalAttention: x must be"):
            layer.explain(x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^CausalAttention: cache must be a cache of qkv or None; got str"):
        layer.explain(torch.ones(1, 3, 16), cache="kv")  # type: ignore[arg-type]
    nested = torch.nested.nested_tensor([torch.ones(2, 16)], layout=torch.jagged)
    assert not layer.explain(nested).is_one_call


@torch.no_grad()
def test_sizes_are_those_of_the_weights() -> None:
    layer, x = qkv.CausalAttention(16, 2), torch.randn(1, 3, 16)
    want = layer(x)
    for heads in (-1, 2.0, 7):
        layer.num_kv_heads = heads  # type: ignore[assignment]
        assert torch.equal(layer(x), want)
    layer.head_dim = -8
    assert not layer.explain(x).is_one_call


@torch.no_grad()
def test_explain_changes_nothing() -> None:
    model = nn.ModuleDict({name: qkv.CausalAttention(16, 2) for name in "ab"})
    caches, x = qkv.Caches.for_model(model), torch.randn(1, 2, 16)
    for _ in range(2):
        assert model["b"].explain(x, cache=caches).is_one_call
        for layer in model.values():
            layer(x, cache=caches)
    assert caches.length == 4
    window = qkv.CausalAttention(16, 2, mask=Mask.causal(3))
    assert window.explain(torch.randn(1, 8, 16), cache=qkv.SlidingKVCache(3)).reason == "tokens of several windows of 3"


def test_with_gradients_enabled_a_cache_concatenates() -> None:
    layer = qkv.CausalAttention(16, 2).requires_grad_(False)
    assert layer.explain(torch.randn(1, 1, 16), cache=qkv.KVCache()).reason.startswith("gradients are enabled")


@torch.no_grad()
def test_caches_and_their_copies_stay_independent() -> None:
    layer, x = made("rotary"), torch.randn(2, 12, 64)
    cache = qkv.KVCache()
    layer(x[:, :3], cache=cache)
    shared, deep, sent = copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    held = cache.append(*torch.zeros(2, 2, 2, 1, 16))
    values = held.k.clone()
    cache.crop(3)
    want = layer(x[:, 3:5], cache=cache)
    for other in (shared, deep, sent):
        assert other.length == 3
        assert torch.equal(layer(x[:, 3:5], cache=other), want)
    assert values.shape[2] == 4 and cache.length == 5
    with pytest.raises(ValueError, match="keys of another layer"):
        made("rotary")(x[:, :1], cache=cache)
    assert cache.length == 5


def test_overwritten_views_that_a_graph_needs_are_an_error_of_torch() -> None:
    layer, x, cache = made("rotary").requires_grad_(False), torch.randn(1, 9, 64), qkv.KVCache()
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        keys = cache.latest(4)
    q = torch.randn(1, 2, 4, 16, requires_grad=True)
    out = (keys.k * q).sum()
    with torch.no_grad():
        cache.crop(2)
        layer(x[:, 4:6], cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@torch.no_grad()
def test_calls_that_fail_leave_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("rotary"), torch.randn(1, 8, 64)
    full = qkv.KVCache(capacity=4)
    layer(x[:, :4], cache=full)
    with pytest.raises(ValueError, match="capacity is 4 tokens"):
        layer(x[:, :1], cache=full)
    cache = qkv.KVCache()
    layer(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        layer(x[:, :1].double(), cache=cache)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 64\)"):
        layer(x[:, :1, :5], cache=cache)
    with pytest.raises(ValueError, match="k must be"):
        layer(torch.randn(2, 1, 64), cache=cache)

    def fail(*_: Any) -> bool:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("qkv.kernels.layer_step", fail)
        with pytest.raises(MemoryError):
            layer(x[:, :1], cache=cache)
    assert cache.length == 4
    want = qkv.KVCache()
    layer(x[:, :4], cache=want)
    assert torch.equal(layer(x[:, 4:5], cache=cache), layer(x[:, 4:5], cache=want))


@torch.no_grad()
def test_strided_inputs_and_weights_are_read_where_they_lie() -> None:
    layer, x = made("rotary"), torch.randn(2, 3, 64)
    want = layer(x)
    wide = torch.full((2, 7, 130), torch.nan)
    wide[:, ::2][:, :3, 1:65] = x
    assert torch.equal(layer(wide[:, ::2][:, :3, 1:65]), want)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear = getattr(layer, name)
        spacious = torch.full((linear.out_features, linear.in_features + 9), torch.nan)
        spacious[:, 4:-5] = linear.weight
        linear.weight = nn.Parameter(spacious[:, 4:-5])
    assert torch.equal(layer(x), want)
    cache, apart = qkv.KVCache(), copy.deepcopy(layer)
    apart.q_proj.weight = nn.Parameter(layer.q_proj.weight.t().contiguous().t())  # the kernel refuses it: composed
    torch.testing.assert_close(torch.cat([apart(part, cache=cache) for part in x.split(1, dim=1)], dim=1), want)
    assert cache.length == 3


@torch.no_grad()
def test_non_finite_numbers_pass_through_as_in_the_parts() -> None:
    layer, x, cache = made("multi-head"), torch.randn(1, 6, 40), qkv.KVCache()
    layer(x[:, :3], cache=cache)
    clean = copy.deepcopy(cache)
    x[0, 3, 7] = torch.nan
    assert layer(x[:, 3:4], cache=cache).isnan().any()
    cache.crop(3)
    assert torch.equal(layer(x[:, 4:5], cache=cache), layer(x[:, 4:5], cache=clean))


@torch.no_grad()
def test_inference_mode_and_hooks_of_the_layer() -> None:
    layer, x, cache = made("rotary"), torch.randn(1, 6, 64), qkv.KVCache()
    want = layer(x[:, :5])
    calls: list[Tensor] = []
    layer.register_forward_hook(lambda *call: calls.append(call[-1]))
    with torch.inference_mode():
        got = layer(x[:, :5], cache=cache)
        layer(x[:, 5:], cache=cache)
    assert torch.equal(got, want) and len(calls) == 2
    assert layer(x[:, :1], cache=cache).shape == (1, 1, 64) and cache.length == 7


def test_linear_functions_that_were_patched_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, linear = made("multi-head").requires_grad_(False), torch.randn(1, 2, 40), F.linear
    before = layer(x)
    monkeypatch.setattr(F, "linear", lambda *call: 2 * linear(*call))
    assert not torch.allclose(layer(x), before)
