"""A layer's call with few tokens as one call of the kernel: the function of its parts, whatever layer and cache."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from fuzz.caches import check_pools
from layers.test_projection import CHANGES
from solver import library
from torch import Tensor, nn

import qkv
from qkv import Mask, kernels
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
    "gate": lambda: qkv.CausalAttention(48, 4, num_kv_heads=2, gate=True, rotary=qkv.RotaryEmbedding(12)),
    "gate, odd widths": lambda: qkv.CausalAttention(21, 3, value_dim=5, gate=True, bias=False),
    "chunks": lambda: qkv.CausalAttention(32, 4, mask=Mask.chunked(4, start=1)),
    "prefix": lambda: qkv.Attention(32, 4, mask=Mask.prefix(3)),
    "prefix of each row": lambda: qkv.Attention(32, 4, mask=Mask.prefix(torch.tensor([0, 5, 2], dtype=torch.int32))),
    "dilation": lambda: qkv.CausalAttention(32, 4, mask=Mask.causal(3, sink_tokens=1, dilation=2)),
}
CACHES: dict[str, Callable[[], Any]] = {
    "growing": qkv.KVCache,
    "reserved": lambda: qkv.KVCache(capacity=64),
    "int8": qkv.Int8KVCache,
    "paged": lambda: qkv.PagedKVCache(page_size=3),
    "paged, int8": lambda: qkv.PagedKVCache(page_size=3, dtype="int8"),
}
WINDOWS: dict[str, Callable[[], Any]] = {
    "sliding": lambda: qkv.SlidingKVCache(7),
    "sliding, int8": lambda: qkv.SlidingKVCache(7, dtype="int8"),
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
    allowance = peer.double().abs().max().item() / 127 if "int8" in kind else 0.0
    assert_within_budget(got, want, peer, name, allowance)
    if layer.gate_proj is None:
        assert torch.equal(got, peer)
        for one, other in zip(cache.state_dict().values(), others.state_dict().values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@torch.no_grad()
def test_a_sliding_cache_drops_the_same_tokens(sink_tokens: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask.causal(5, sink_tokens=sink_tokens)
    layer = qkv.CausalAttention(32, 4, mask=mask, num_kv_heads=2, rotary=qkv.RotaryEmbedding(8)).eval()
    x = torch.randn(2, 45, 32)
    caches = [qkv.SlidingKVCache(5, sink_tokens, dtype=dtype) for _ in range(2)]
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
    "make",
    [
        *(qkv.KVCache, qkv.Int8KVCache, lambda: qkv.SlidingKVCache(6), lambda: qkv.SlidingKVCache(6, dtype="int8")),
        *(lambda: qkv.PagedKVCache(page_size=4), lambda: qkv.PagedKVCache(page_size=4, dtype="int8")),
    ],
    ids=["kv", "int8", "sliding", "sliding, int8", "paged", "paged, int8"],
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


def composed(layer: qkv.Attention, *call: Any, **options: Any) -> Tensor:
    """The layer by its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "MAX_TOKENS", 0)
        out: Tensor = layer(*call, **options)
    return out


@pytest.mark.parametrize("kind", [*CACHES, *WINDOWS])
@torch.no_grad()
def test_slots_to_spare_are_neither_read_nor_written(kind: str) -> None:
    layer = qkv.CausalAttention(32, 4, num_kv_heads=2, mask=Mask.causal(7), rotary=qkv.RotaryEmbedding(8)).eval()
    make = {**CACHES, **WINDOWS}[kind]
    cache, peer, x = make(), make(), torch.randn(3, 9, 32)
    for part in x.split([4, 1, 2, 1, 1], dim=1):
        spare = [
            buffer.memory[:, :, buffer.stop + part.shape[1] :] for buffer in cache._parts if buffer.memory is not None
        ]
        for slots in spare:
            slots.fill_(float("nan") if slots.is_floating_point() else 127)
        kept = [slots.clone() for slots in spare]
        assert layer.explain(part, cache=cache).is_one_call
        got = layer(part, cache=cache)
        assert torch.equal(got, composed(layer, part, cache=peer))
        assert all(torch.equal(a.nan_to_num(3), b.nan_to_num(3)) for a, b in zip(spare, kept, strict=True))


@torch.no_grad()
def test_memory_of_values_may_be_shorter_than_that_of_keys() -> None:
    layer = qkv.CausalAttention(32, 4, num_kv_heads=2).eval()
    cache, peer, x = qkv.KVCache(), qkv.KVCache(), torch.randn(1, 6, 32)
    for each in (cache, peer):
        layer(x[:, :4], cache=each)
    _, values = cache._parts
    values._set_memory(values.memory[:, :, :5].clone(), 4, is_writable=True)
    for token in (x[:, 4:5], x[:, 5:]):  # the second moves values alone to larger memory
        assert torch.equal(layer(token, cache=cache), layer(token, cache=peer))
    assert all(map(torch.equal, cache.keys().tokens, peer.keys().tokens))


@pytest.mark.parametrize("name", ["keys", "values", "k_scale", "v_scale"])
@torch.no_grad()
def test_memory_of_fewer_slots_than_keys_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = qkv.CausalAttention(32, 4, num_kv_heads=2).eval(), qkv.Int8KVCache()
    call, calls, x = kernels.layer_step, [], torch.randn(1, 5, 32)
    monkeypatch.setattr("qkv.kernels.layer_step", lambda *given: calls.append(given) or call(*given))
    for part in x.split([4, 1], dim=1):
        layer(part, cache=cache)
    tensors, numbers = calls[-1]
    assert call(tensors, numbers)
    shorter = getattr(tensors, name)[:, :, : numbers.key_count - 1]
    assert not call(tensors._replace(**{name: shorter}), numbers)


@pytest.mark.parametrize("kind", [*CACHES, *WINDOWS])
@torch.no_grad()
def test_positions_given_by_the_caller(kind: str) -> None:
    layer = qkv.CausalAttention(32, 4, num_kv_heads=2, mask=Mask.causal(7), rotary=qkv.RotaryEmbedding(8)).eval()
    make = {**CACHES, **WINDOWS}[kind]
    cache, peer, x = make(), make(), torch.randn(3, 12, 32)
    for given in (
        torch.tensor([4, 0, 9]),
        torch.tensor([[0, 7, -3], [2, 2, 2], [100000, 1, 0]]),
        torch.tensor([[5, 1, 3]], dtype=torch.int32),
        torch.arange(18, dtype=torch.uint8).view(3, 6)[:, ::2],
    ):
        part = x[:, cache.length : cache.length + 3]
        assert layer.explain(part, positions=given, cache=cache).is_one_call
        assert torch.equal(
            layer(part, positions=given, cache=cache), composed(layer, part, positions=given, cache=peer)
        )
    assert torch.equal(layer(x[:, :3], positions=given), composed(layer, x[:, :3], positions=given))
    assert not torch.equal(layer(x[:, :3], positions=given), layer(x[:, :3]))
    for wrong in (torch.arange(2), torch.zeros(2, 3).long(), torch.zeros(3), torch.tensor(1), [0, 1, 2]):
        assert layer.explain(part, positions=wrong).reason == "positions are not integers (L,) or (B, L)"
        with pytest.raises((TypeError, ValueError), match="positions must be"):
            layer(part, positions=wrong, cache=cache)
    assert cache.length == 12
    sections = qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8, sections=(2, 1, 1))).eval()
    assert not sections.explain(part, positions=torch.zeros(3, 3, 3).long()).is_one_call


@pytest.mark.parametrize("kind", [*CACHES, *WINDOWS])
@torch.no_grad()
def test_padding_given_at_every_step(kind: str) -> None:
    """As `generate` passes it: the prompt padded on the left, then a mask over all columns."""
    layer = qkv.CausalAttention(32, 4, num_kv_heads=2, mask=Mask.causal(7), rotary=qkv.RotaryEmbedding(8)).eval()
    make = {**CACHES, **WINDOWS}[kind]
    cache, peer, x = make(), make(), torch.randn(3, 24, 32)
    first = torch.arange(5) >= torch.tensor([[0], [4], [2]])
    keep = torch.cat([first, first.new_ones(3, 19)], dim=1)
    stop, prompt = 5, Mask.padding(first)
    assert layer.explain(x[:, :5], mask=prompt, cache=cache).reason == "some of the new tokens are padding"
    assert torch.equal(layer(x[:, :5], mask=prompt, cache=cache), composed(layer, x[:, :5], mask=prompt, cache=peer))
    for count in (1, 1, 3, 1, 5, 1):
        part, stop = x[:, stop : stop + count], stop + count
        if count == 5:
            keep[:, 5:7] = False  # a later call may hide tokens of earlier ones
        for mask in (Mask.padding(keep[:, :stop]), Mask.padding(keep[:, :stop]) & Mask.padding(torch.full((3,), stop))):
            for each in (cache, peer):
                each.crop(each.lengths.clamp(max=stop - count - 5 + first.sum(1)))
            assert layer.explain(part, mask=mask, cache=cache).is_one_call
            assert torch.equal(layer(part, mask=mask, cache=cache), composed(layer, part, mask=mask, cache=peer))


@torch.no_grad()
def test_padding_without_a_cache() -> None:
    layer, x = qkv.Attention(32, 4, gate=True).eval(), torch.randn(3, 4, 32)
    lengths = torch.tensor([4, 1, 3], dtype=torch.int32)
    keep = torch.arange(4) < lengths[:, None]
    for mask in (Mask.padding(lengths), Mask.padding(keep), Mask.padding(lengths[:1]), Mask.padding(keep[1:2])):
        assert layer.explain(x, mask=mask).is_one_call
        got, peer = layer(x, mask=mask), composed(layer, x, mask=mask)
        want = composed(copy.deepcopy(layer).double(), x.double(), mask=mask)
        assert_within_budget(got, want, peer, repr(mask))
    for mask in (Mask.padding(lengths[:2]), Mask.padding(keep[:, :3])):
        with pytest.raises(ValueError, match="must fit"):
            layer(x, mask=mask)


CROSS: dict[str, Callable[[], qkv.Attention]] = {
    "plain": lambda: qkv.CrossAttention(32, 4, context_dim=24),
    "grouped, wider values, norms, gate": lambda: qkv.CrossAttention(
        48, 4, context_dim=24, num_kv_heads=2, value_dim=9, qk_norm=True, gate=True
    ),
    "softcap, sink logits": lambda: qkv.CrossAttention(32, 4, context_dim=24, softcap=2.0, sink_logits=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CROSS)
@torch.no_grad()
def test_cross_attention_reads_the_cached_context(name: str, dtype: torch.dtype) -> None:
    layer = CROSS[name]().eval().to(dtype)
    x, context = torch.randn(3, 4, layer.embed_dim).to(dtype), torch.randn(3, 9, 24).to(dtype)
    exact = copy.deepcopy(layer).double()
    for mask in (Mask.full(), Mask.padding(torch.tensor([9, 1, 4])), Mask.padding(torch.rand(3, 9) > 0.4)):
        cache, other = qkv.CrossKVCache(), qkv.CrossKVCache()
        assert layer.explain(x, context, mask=mask, cache=cache).reason == "no cache has the context yet"
        layer(x, context, mask=mask, cache=cache)
        exact(x.double(), context.double(), mask=mask, cache=other)
        before = cache.state_dict()
        for given, part in ((None, x[:, :1]), (context, x), (context.clone(), x[:, 2:])):
            assert layer.explain(part, given, cache=cache).is_one_call
            got, peer = layer(part, given, cache=cache), composed(layer, part, given, cache=cache)
            assert_within_budget(got, exact(part.double(), cache=other), peer, f"{name}, {mask}")
            assert layer.gate_proj is not None or torch.equal(got, peer)
            assert torch.equal(layer(part, cache=cache, mask=mask), got)
        assert all(torch.equal(before[key], now) for key, now in cache.state_dict().items())


@torch.no_grad()
def test_cross_attention_refuses_what_its_parts_refuse() -> None:
    layer, x, context = CROSS["plain"]().eval(), torch.randn(2, 3, 32), torch.randn(2, 5, 24)
    cache = qkv.CrossKVCache()
    layer(x, context, cache=cache)
    want = layer(x, cache=cache)
    for given, message in (
        (context + 1, "contains another context"),
        (context[:, :4], "contains a context of 5 tokens"),
        (context[:1], r"context must be \(2, Lk, 24\)"),
        (context[..., :3], r"context must be \(2, Lk, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, given, cache=cache)
    with pytest.raises(ValueError, match="keys of another layer"):
        CROSS["plain"]()(x, cache=cache)
    with pytest.raises(ValueError, match="batch"):
        layer(x[:1], cache=cache)
    assert layer.explain(x, mask=Mask.causal(), cache=cache).reason.startswith("the mask or alibi depends on positions")
    with pytest.raises(ValueError, match="offset"):
        layer(x, mask=Mask.causal(), cache=cache)
    calls: list[Any] = []
    layer.k_proj.register_forward_hook(lambda *call: calls.append(call))
    assert layer.explain(x, cache=cache).is_one_call
    layer.q_proj.register_forward_hook(lambda *call: calls.append(call))
    assert not layer.explain(x, cache=cache).is_one_call
    torch.testing.assert_close(layer(x, cache=cache), want)
    assert len(calls) == 1
    with torch.enable_grad():  # keys of a context may have a graph
        fresh, graph = CROSS["plain"]().requires_grad_(False), qkv.CrossKVCache()
        fresh(x, context.requires_grad_(), cache=graph)
        assert fresh.explain(x, cache=graph).reason.startswith("gradients")
        fresh(x, cache=graph).sum().backward()
    assert context.grad is not None


@pytest.mark.parametrize("rounded", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@torch.no_grad()
def test_pages_have_the_bits_of_a_cache_without(page_size: int, dtype: torch.dtype, rounded: Any) -> None:
    """Whatever happens to rows between steps: their pages are scattered, shared and copied on write."""
    layer, x = made("rotary", dtype), torch.randn(4, 60, 64).to(dtype)
    plain = qkv.KVCache() if rounded is None else qkv.Int8KVCache()
    paged = qkv.PagedKVCache(page_size=page_size, dtype=rounded)
    steps: list[Callable[[Any], Any]] = [
        lambda cache: layer(x[:2, :5], cache=cache),
        lambda cache: cache.repeat(2),
        *[lambda cache, i=i: layer(x[:, i : i + 1], cache=cache) for i in range(5, 8)],  # type: ignore[misc]
        lambda cache: cache.crop(torch.tensor([8, 2, 5, 0])),
        lambda cache: layer(x[:, 8:12], cache=cache),
        lambda cache: cache.select(torch.tensor([2, 2, 0, 3])),
        *[lambda cache, i=i: layer(x[:, i : i + 2], cache=cache) for i in range(12, 40, 2)],  # type: ignore[misc]
        lambda cache: cache.join(copy.deepcopy(cache)),
        lambda cache: layer(x.repeat(2, 1, 1)[:, 40:41], cache=cache),
        lambda cache: cache.replace(torch.arange(8).flip(0), pickle.loads(pickle.dumps(cache))),
        lambda cache: layer(x.repeat(2, 1, 1)[:, 41:42], cache=cache),
        lambda cache: cache.load_state_dict(cache.state_dict()),
        lambda cache: layer(x.repeat(2, 1, 1)[:, 42:44], cache=cache),
        lambda cache: cache.crop(0),
        lambda cache: layer(x[:, :4], cache=cache),
    ]
    twin = None
    for number, act in enumerate(steps):
        want, got = act(plain), act(paged)
        assert want is None or torch.equal(got, want)
        check_pools([paged] if twin is None else [paged, twin])
        if number == 3:
            twin, before = copy.copy(paged), paged.state_dict()
    assert twin is not None
    assert all(torch.equal(twin.state_dict()[name], before[name]) for name in before)


@torch.no_grad()
def test_pages_of_a_call_that_fails_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, pool = made("rotary"), torch.randn(2, 30, 64), qkv.PagePool(page_size=4, pages=10)
    cache, prompt = qkv.PagedKVCache(pool), qkv.PagedKVCache(pool)

    def refused(*_: Any) -> bool:
        return False

    def fail(*_: Any) -> bool:
        raise MemoryError

    for error in (None, MemoryError):
        for length in (0, 3, 4, 6):
            cache.reset()
            prompt.reset()
            if length:
                layer(x[:, :length], cache=prompt)
                cache.join(prompt)
            used, tokens = pool.used, length and cache.keys().gathered().k.clone()
            rows = copy.deepcopy(cache._table.rows)
            with monkeypatch.context() as patch:
                patch.setattr("qkv.kernels.layer_step", fail if error else refused)
                patch.setattr("qkv.layers.projection.project", fail)
                patch.setattr("qkv.layers.attention.project", fail)
                with pytest.raises(MemoryError):
                    layer(x[:, 6:9], cache=cache)
            assert (pool.used, cache.length, cache._table.rows) == (used, length, rows)
            assert not length or torch.equal(cache.keys().gathered().k, tokens)
            check_pools([cache, prompt])
    layer(x[:, 6:14], cache=cache)
    with pytest.raises(ValueError, match=r"^PagedKVCache: the pool has 10 pages of 4 tokens"):
        layer(x[:, :9], cache=cache)
    assert cache.length == 14


@torch.no_grad()
def test_caches_of_a_model_over_pages() -> None:
    model = nn.ModuleDict({name: qkv.CausalAttention(16, 2) for name in "ab"}).eval()
    caches = qkv.Caches({name: qkv.PagedKVCache(page_size=4) for name in "ab"})
    caches.bind(model)
    x = torch.randn(1, 9, 16)

    def call(part: Tensor) -> Tensor:
        return model["b"](model["a"](part, cache=caches), cache=caches)

    def interrupted(count: int) -> None:
        with caches.transaction():
            for part in x[:, 3 : 3 + count].split(1, dim=1):
                call(part.expand(2, -1, -1))
            raise KeyboardInterrupt

    call(x[:, :3])
    caches.repeat(2)
    used = [caches[name].pool.used for name in "ab"]
    assert model["a"].explain(x[:, 3:4], cache=caches).is_one_call
    for count in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            interrupted(count)
        assert caches.length == 3 and [caches[name].pool.used for name in "ab"] == used == [1, 1]
    got = call(x[:, 3:6].expand(2, -1, -1))
    caches.reset()
    torch.testing.assert_close(got, call(x[:, :6].expand(2, -1, -1))[:, 3:])


@pytest.mark.parametrize(
    "mask",
    [Mask.causal() & Mask.chunked(4), Mask.causal() & Mask.chunked(4, start=3), Mask.causal(2, dilation=2)],
    ids=str,
)
@torch.no_grad()
def test_chunks_and_dilation_over_a_sliding_cache(mask: Mask) -> None:
    layer, x = qkv.Attention(32, 4, mask=mask, rotary=qkv.RotaryEmbedding(8)).eval(), torch.randn(2, 30, 32)
    caches = [qkv.SlidingKVCache(4) for _ in range(3)]
    for part in x.split([1, 3, 1, 4, 1, 2, 1, 1, 5, 1, 1, 3, 1, 1, 4], dim=1):
        assert layer.explain(part, cache=caches[0]).is_one_call
        got = layer(part, cache=caches[0])
        assert torch.equal(got, composed(layer, part, cache=caches[1]))
    caches[2].append(*torch.zeros(2, 2, 4, 1, 8))
    caches[2].crop(torch.tensor([0, 1]))
    if mask.chunk is not None:
        reason = "counts from the first key, of which rows of different lengths have dropped"
        with pytest.raises(ValueError, match=reason):
            layer(x[:, :1], cache=caches[2])
        assert caches[2].lengths.tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore")
def test_a_step_leaves_graphs_of_pages_alone() -> None:
    layer, x, cache = made("rotary"), torch.randn(2, 8, 64), qkv.PagedKVCache(page_size=4)
    out = layer(x[:, :3], cache=cache)
    twin = copy.copy(cache)
    with torch.no_grad():
        assert layer.explain(x[:, 3:4], cache=cache).is_one_call
        want = composed(layer, x[:, 3:4], cache=twin)
        assert torch.equal(layer(x[:, 3:4], cache=cache), want)
        keys = cache.latest(2)
    out.sum().backward()
    q = torch.randn(2, 2, 4, 16, requires_grad=True)
    out = (keys.k[:2] * q).sum()
    with torch.no_grad():
        layer(x[:, 4:5], cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("isa", kernels.supported_isas())
@torch.no_grad()
def test_every_instruction_set_is_within_budget(isa: str) -> None:
    """Over the steps of a text together: in one of them, of few numbers, a peer may be right by luck."""
    for name in ("rotary", "norms", "gate", "gate, odd widths", "softcap, alibi, sink logits, scale"):
        layer, x = made(name), torch.randn(2, 11, made(name).embed_dim)
        caches = [qkv.PagedKVCache(page_size=3), qkv.KVCache(), qkv.KVCache()]
        in_fp64, steps = copy.deepcopy(layer).double(), []
        for part in x.split([5, 1, 3, 2], dim=1):
            with kernels.use(library(isa)):
                assert layer.explain(part, cache=caches[0]).is_one_call
                got = layer(part, cache=caches[0])
            want = in_fp64(part.double(), cache=caches[1])
            steps.append((got, want, composed(layer, part, cache=caches[2])))
        got, want, peer = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        assert_within_budget(got, want, peer, f"{name}, {isa}")


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


class Watched(qkv.KVCache):
    """A cache of somebody else's."""

    def append(self, *tokens: Any) -> Any:
        SEEN.append("append")
        return super().append(*tokens)


SEEN: list[str] = []


def noting(owner: Any, name: str) -> Callable[..., Any]:
    """What an attribute calls, which notes its calls."""
    before = getattr(owner, name)
    return lambda *call, **options: SEEN.append(name) or before(*call, **options)


def watched_instance(patch: pytest.MonkeyPatch) -> Any:
    cache = qkv.KVCache()
    patch.setattr(cache, "append", noting(cache, "append"))
    return cache


REPLACED: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "F.linear": lambda patch: patch.setattr(F, "linear", noting(F, "linear")),
    "F.rms_norm": lambda patch: patch.setattr(F, "rms_norm", noting(F, "rms_norm")),
    "attention": lambda patch: patch.setattr(qkv.functional, "attention", noting(qkv.functional, "attention")),
    "append of a class": lambda patch: patch.setattr(qkv.KVCache, "append", noting(qkv.KVCache, "append")),
    "append of a cache": watched_instance,
    "append of a subclass": lambda patch: Watched(),
}


@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_a_public_function_that_somebody_replaced_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = qkv.CausalAttention(32, 4, qk_norm=True).requires_grad_(False), torch.randn(1, 3, 32)
    want = layer(x)
    SEEN.clear()
    with monkeypatch.context() as patch:
        cache = REPLACED[name](patch) or qkv.KVCache()
        assert not layer.explain(x, cache=cache).is_one_call
        torch.testing.assert_close(layer(x, cache=cache), want)
        assert SEEN
    assert layer.explain(x, cache=qkv.KVCache()).is_one_call


def test_calls_that_ask_for_more_are_composed() -> None:
    layer, x = qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8)).requires_grad_(False), torch.randn(2, 3, 32)
    calls: dict[str, dict[str, Any]] = {
        "a bias is given": {"bias": torch.zeros(3, 3)},
        "the mask has documents, global tokens or a dense part": {"mask": Mask.documents(torch.zeros(2, 3).long())},
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
    biased = qkv.Attention(32, 4, position_bias=qkv.RelativePositionBias(4))
    for other in (qkv.DifferentialAttention(32, 4), biased):
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
