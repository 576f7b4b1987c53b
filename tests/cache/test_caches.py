"""All caches: which layer owns them, which calls they refuse, and that copies are independent."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.caches import saved
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkv
from qkv import Mask, kernels

X = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
CACHES: dict[str, Callable[[], Any]] = {
    "kv": qkv.KVCache,
    "int8": qkv.Int8KVCache,
    "paged": lambda: qkv.PagedKVCache(page_size=3),
    "paged, int8": lambda: qkv.PagedKVCache(page_size=3, dtype="int8"),
    "sliding": lambda: qkv.SlidingKVCache(4),
    "sliding, int8": lambda: qkv.SlidingKVCache(4, dtype="int8"),
}
each_cache = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)


def windowed() -> qkv.Attention:
    torch.manual_seed(0)
    return qkv.Attention(24, 6, num_kv_heads=2, mask=Mask.causal(4), rotary=qkv.RotaryEmbedding(4)).eval()


@each_cache
@torch.no_grad()
def test_a_cache_that_another_layer_filled_is_refused(make: Callable[[], Any]) -> None:
    layer, other, cache = windowed(), qkv.CausalAttention(24, 6, num_kv_heads=2, mask=Mask.causal(4)), make()
    want = layer(X[:, :4], cache=make())
    layer(X[:, :3], cache=cache)
    message = (
        r"its 3 tokens are keys of another layer, Attention\(24, num_heads=6\); got a call of "
        r"CausalAttention\(24, num_heads=6\)\. Make one cache per layer, or reset it"
    )
    for call in (other, other.attention_weights):
        with pytest.raises(ValueError, match=message):
            call(X[:, 3:4], cache=cache)
    assert cache.length == 3
    torch.testing.assert_close(layer(X[:, 3:4], cache=cache), want[:, 3:], rtol=1e-4, atol=1e-5)
    cache.reset()
    assert cache.length == 0
    other(X[:1], cache=cache)
    assert cache.length == 6


@torch.no_grad()
def test_ownership_of_caches_by_copies_of_a_layer() -> None:
    layer, cache = windowed(), qkv.KVCache()
    layer(X[:, :3], cache=cache)
    copy.copy(layer)(X[:, 3:4], cache=cache)  # the same weights
    with pytest.raises(ValueError, match="keys of another layer"):
        copy.deepcopy(layer)(X[:, 4:5], cache=cache)
    alone = copy.deepcopy(cache)
    layer(X[:, 4:5], cache=alone)
    for pair in ((layer, cache), (cache, layer)):
        along = dict(zip(("a", "b"), copy.deepcopy(pair), strict=True)).values()
        twin_cache, twin = sorted(along, key=lambda one: isinstance(one, torch.nn.Module))
        twin(X[:, 4:5], cache=twin_cache)
        with pytest.raises(ValueError, match="keys of another layer"):
            layer(X[:, 5:], cache=twin_cache)
    copy.deepcopy(layer)(X[:, 4:5], cache=pickle.loads(pickle.dumps(cache)))  # free for the next layer
    k = torch.randn(2, 2, 3, 4)
    free = qkv.KVCache()
    free.append(k, k)
    layer(X[:, 3:4], cache=free)
    assert free.length == 4


@torch.no_grad()
def test_a_cache_keeps_neither_layer_nor_context_alive() -> None:
    layer, cache, context = qkv.CrossAttention(24, 6), qkv.CrossKVCache(), X.clone()
    layer(X, context, cache=cache)
    gone = [weakref.ref(layer), weakref.ref(context)]
    del layer, context
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and cache.length == 6


@each_cache
@pytest.mark.parametrize("mask", [Mask.full(), Mask.band(3, 1), Mask.padding(torch.tensor([6, 4]))], ids=repr)
@torch.no_grad()
def test_a_layer_that_sees_later_keys_is_refused_with_a_filled_cache(make: Callable[[], Any], mask: Mask) -> None:
    if isinstance(make(), qkv.SlidingKVCache):
        mask = mask & Mask.band(3, None)
    layer, cache = qkv.Attention(24, 6, mask=mask), make()
    layer(X[:, :5], cache=cache)
    with pytest.raises(
        ValueError,
        match=r"tokens in the cache, the mask must not show keys after the query.*; got .* Use Mask\.causal\(\)",
    ):
        layer(X[:, 5:], cache=cache)
    assert cache.length == 5
    layer(X[:, 5:], mask=Mask.causal(), cache=cache)  # a prompt that sees all of itself, and a text behind it
    written = torch.ones(1, cache.append(*torch.zeros(2, 2, 6, 0, 4)).lk + 1, dtype=torch.bool)
    if mask.left is None:
        layer(X[:, 5:], mask=Mask.dense(written), cache=cache)
        assert cache.columns == 7


CHUNKS = Mask.causal() & Mask.chunked(4, start=3)


@pytest.mark.parametrize("parts", [[1] * 13, [2, 5, 6], [9, 1, 3], [13]], ids=str)
@pytest.mark.parametrize(
    "mask", [CHUNKS, CHUNKS & Mask.causal(2), Mask.causal(2, dilation=3), Mask.causal(2, dilation=3) & CHUNKS], ids=repr
)
@torch.no_grad()
def test_a_sliding_cache_of_a_chunk_or_a_dilated_window_suffices(mask: Mask, parts: list[int]) -> None:
    layer, x = qkv.Attention(24, 6, mask=mask, rotary=qkv.RotaryEmbedding(4)).double(), torch.randn(2, 13, 24).double()
    for cache in (qkv.SlidingKVCache(4), qkv.KVCache()):
        steps = [layer(part, cache=cache) for part in x.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
        assert cache.length == 13


@pytest.mark.parametrize("dtype", [None, "int8"])
@torch.no_grad()
def test_a_window_longer_than_the_text_takes_what_its_tokens_need(dtype: Any) -> None:
    cache, whole = qkv.SlidingKVCache(1 << 62, dtype=dtype), qkv.Int8KVCache() if dtype else qkv.KVCache()
    rows = copy.deepcopy(cache)
    for length in (5, 1, 1100, 1, 2000, 1):
        k, v = torch.randn(2, 2, 3, length, 4)
        got, want = cache.append(k, v), whole.append(k, v)
        assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v) and got.offset == want.offset
        is_token = torch.ones(2, length, dtype=torch.bool)
        is_token[0, : length // 2] = False
        rows.append(k, v, is_token)
        for each in (cache, rows):
            token = each.nbytes // each._parts[0].memory.shape[2]  # type: ignore[union-attr]
            assert each.nbytes <= token * max(1024, 2 * whole.length)


@pytest.mark.parametrize("dtype", [None, "int8"])
@torch.no_grad()
def test_steps_of_a_layer_move_a_window_to_larger_memory(dtype: Any) -> None:
    layer = qkv.CausalAttention(24, 6, num_kv_heads=2, mask=Mask.causal(5000), rotary=qkv.RotaryEmbedding(4)).eval()
    window, whole = qkv.SlidingKVCache(5000, dtype=dtype), qkv.Int8KVCache() if dtype else qkv.KVCache()
    for length in (1022, 1, 1, 1, 1):
        x = torch.randn(2, length, 24)
        assert torch.equal(layer(x, cache=window), layer(x, cache=whole))
    assert window._parts[0].memory.shape[2] > 1024  # type: ignore[union-attr]


@torch.no_grad()
def test_a_sliding_cache_refuses_chunks_and_dilated_windows_that_reach_further() -> None:
    for mask in (Mask.causal() & Mask.chunked(5), Mask.causal(3, dilation=2), Mask.causal() & Mask.prefix(2)):
        with pytest.raises(
            ValueError, match=r"SlidingKVCache\(window=4, sink_tokens=0\) drops keys that Mask.causal\("
        ):
            qkv.Attention(24, 6, mask=mask)(X, cache=qkv.SlidingKVCache(4))


@each_cache
@pytest.mark.parametrize("lengths", [4, torch.tensor([4, 2])], ids=str)
@torch.no_grad()
def test_a_prefix_must_be_given_in_one_call(make: Callable[[], Any], lengths: int | Tensor) -> None:
    prefix = Mask.prefix(lengths)
    cache = make()
    mask = prefix & Mask.band(3, None) if isinstance(cache, qkv.SlidingKVCache) else prefix
    layer = qkv.Attention(24, 6, mask=mask)
    layer(X[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"pass all tokens \(or the prefix\) in one call"):
        layer(X[:, 3:], cache=cache)
    assert cache.length == 3
    cache.reset()
    steps = [layer(part, cache=cache) for part in X.split([4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(X), atol=0.02, rtol=0.02)  # int8 rounds


@torch.no_grad()
def test_whole_chunks_that_see_all_of_themselves_may_be_appended() -> None:
    layer, cache = qkv.Attention(24, 6, mask=Mask.chunked(2)), qkv.KVCache()
    steps = [layer(part, cache=cache) for part in X.split([4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(X))
    layer(X[:, :1], cache=cache)
    with pytest.raises(ValueError, match="the mask must not show keys after the query"):
        layer(X[:, :1], cache=cache)


@each_cache
@torch.no_grad()
def test_a_call_that_fails_adds_nothing(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = windowed(), make()
    want = torch.cat([layer(part, cache=cache) for part in X.split([4, 1, 1], dim=1)], dim=1)
    cache = make()
    for part in X.split([4, 1, 1], dim=1):
        with pytest.raises(ValueError, match="keep"):
            layer(part, mask=Mask.padding(torch.ones(2, 99, dtype=torch.bool)), cache=cache)
        with pytest.raises(ValueError, match="is not a band"):
            layer(part, mask=Mask.causal(3, sink_tokens=1), cache=cache)
        monkeypatch.setattr(layer.out_proj, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer(part, cache=cache)
        monkeypatch.undo()
        done = cache.length
        found = layer(part, cache=cache)
        assert torch.equal(found, want[:, done : done + part.shape[1]])


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_caches_of_the_wrong_kind_are_refused_by_name() -> None:
    for cache in (object(), {}, [torch.zeros(1)]):
        with pytest.raises(TypeError, match=rf"in self-attention; got {type(cache).__name__}"):
            windowed()(X, cache=cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["layer", "latent", "model"])
def test_gradient_checkpointing_does_not_append_twice(kind: str, use_reentrant: bool) -> None:
    layer: torch.nn.Module = qkv.CausalAttention(16, 2)
    cache: Any = qkv.KVCache()
    if kind == "latent":
        layer = qkv.LatentAttention(16, 2, kv_rank=8, nope_dim=8, rope_dim=0, mask=Mask.causal())
        cache = qkv.LatentKVCache()
    if kind == "model":
        cache = qkv.Caches.for_model(layer)
    x = torch.randn(1, 5, 16, requires_grad=True)
    out = checkpoint(lambda x: layer(x, cache=cache), x, use_reentrant=use_reentrant)
    with pytest.raises(
        RuntimeError,
        match=r"Attention: a call with a cache must not run in a backward pass, where gradient checkpointing repeats "
        r"it; the cache has its tokens already\. Train without a cache, or call the layer outside of the checkpoint",
    ):
        out.sum().backward()
    with torch.no_grad():
        layer(x[:, :1], cache=cache)
    assert cache.length == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_full_cross_cache_refuses_another_context(mode: Any) -> None:
    layer, cache = qkv.CrossAttention(24, 6), qkv.CrossKVCache()
    with mode():
        context = X.clone()
        want = layer(X, context, cache=cache)
        other, swapped, negated = context + 1, context.flip(1), -context
        for same in (context, context.clone(), context[:, :], context.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(layer(X, same, cache=cache), want)
        for wrong in (other, swapped, negated, context.flip(0), context.roll(1, 2)):
            with pytest.raises(ValueError, match="contains another context, of as many tokens as the one given"):
                layer(X, wrong, cache=cache)
        context[0, 0, 0] += 1
        with pytest.raises(ValueError, match="contains another context"):
            layer(X, context, cache=cache)
        context[0, 0, 0] -= 1
        for twin in (copy.copy(cache), copy.deepcopy(cache) if mode is torch.no_grad else cache):
            with pytest.raises(ValueError, match="contains another context"):
                layer(X, other, cache=twin)
    with pytest.raises(ValueError, match="keys of another layer"):
        qkv.CrossAttention(24, 6)(X, cache=cache)


@each_cache
@torch.no_grad()
def test_a_copy_and_its_origin_grow_apart(make: Callable[[], Any]) -> None:
    """Each as a cache that was given the same tokens alone, whichever is appended to first."""

    def grown(*tokens: Tensor) -> Tensor:
        alone = make()
        for one in tokens:
            found = alone.append(one, one)
        return values_of(found)

    def values_of(found: Any) -> Tensor:
        return found.v if found.pages is None else found.pages.gather(found.v)

    first, one, two, three = (torch.randn(2, 2, count, 16) for count in (3, 1, 1, 2))
    for order in ((0, 1), (1, 0)):
        caches = [make()]
        caches[0].append(first, first)
        caches.append(copy.copy(caches[0]))
        for token, index in zip((one, two), order, strict=True):
            assert torch.equal(values_of(caches[index].append(token, token)), grown(first, token))
        for token, index in zip((one, two), order, strict=True):
            assert torch.equal(values_of(caches[index].append(three, three)), grown(first, token, three))


@torch.no_grad()
def test_a_cross_cache_selects_and_crops_its_context() -> None:
    layer, cache, rows = qkv.CrossAttention(24, 6), qkv.CrossKVCache(), torch.tensor([1, 1, 0])
    layer(X, X, cache=cache)
    cache.select(rows)
    want = layer(X[rows], X[rows])
    torch.testing.assert_close(layer(X[rows], cache=cache), want)
    torch.testing.assert_close(layer(X[rows], X[rows], cache=cache), want)
    with pytest.raises(ValueError, match="contains another context"):
        layer(X[rows], X[rows.flip(0)], cache=cache)
    cache.crop(4)
    torch.testing.assert_close(layer(X[rows], X[rows, :4], cache=cache), layer(X[rows], X[rows, :4]))
    with pytest.raises(ValueError, match="contains a context of 4 tokens; got another of 6"):
        layer(X[rows], X[rows], cache=cache)
    cache.reset()
    torch.testing.assert_close(layer(X, X.flip(1), cache=cache), layer(X, X.flip(1)))
    bare = qkv.CrossKVCache()
    bare.append(*torch.randn(2, 2, 6, 6, 4))
    layer(X, cache=bare)
    with pytest.raises(ValueError, match="were appended without a context"):
        layer(X, X, cache=bare)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_cross_attention_refuses_another_context() -> None:
    torch.compiler.reset()
    layer, cache = qkv.CrossAttention(24, 6), qkv.CrossKVCache()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = compiled(X, X.clone(), cache=cache)
        torch.testing.assert_close(compiled(X, X, cache=cache), want)
        with pytest.raises(ValueError, match="contains another context"):
            compiled(X, X + 1, cache=cache)


@torch.no_grad()
def test_a_sliding_cache_with_beams_and_refused_drafts() -> None:
    layer = windowed()
    x = torch.randn(2, 20, 24)
    want, cache, rows = layer(x), qkv.SlidingKVCache(4), torch.tensor([1, 0, 1])
    layer(x[:, :11], cache=cache)
    layer(torch.randn(2, 3, 24), cache=cache)  # a draft
    cache.crop(12)
    cache.crop(11)
    torch.testing.assert_close(layer(x[:, 11:14], cache=cache), want[:, 11:14])
    cache.select(rows)
    torch.testing.assert_close(layer(x[rows, 14:], cache=cache), want[rows, 14:])
    with pytest.raises(ValueError, match=r"length of crop must be at least \d+ of 20 tokens, .* dropped keys; got 3"):
        cache.crop(3)
    with pytest.raises(ValueError, match="length of crop must be between 0 and 20, the tokens in the cache; got 21"):
        cache.crop(21)
    assert cache.length == 20


@each_cache
@torch.no_grad()
def test_lazily_negated_tokens(make: Callable[[], Any]) -> None:
    cache, other, k = make(), make(), torch.randn(1, 2, 3, 8)
    for _ in range(3):
        got, want = cache.append(torch._neg_view(-k), torch._neg_view(-k)), other.append(k, k)
        assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)


@each_cache
@pytest.mark.parametrize("load", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), None])
@torch.no_grad()
def test_copies_have_the_tokens_and_are_independent(make: Callable[[], Any], load: Any) -> None:
    layer, cache = windowed(), make()
    layer(X[:, :4], cache=cache)
    twin = saved(cache, weights_only=True) if load is None else load(cache)
    for each in (cache, twin):
        other = make()
        want = torch.cat([layer(part, cache=other) for part in X.split([4, 1, 1], dim=1)], dim=1)
        for i in (4, 5):
            torch.testing.assert_close(layer(X[:, i : i + 1], cache=each), want[:, i : i + 1])
            layer(torch.randn(2, 1, 24), cache=copy.copy(each))


def test_a_deep_copy_of_a_graph_is_refused_and_a_copy_shares_it() -> None:
    layer, cache = windowed(), qkv.KVCache()
    layer(X[:, :4], cache=cache)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"were computed with gradients\. Use copy\.copy"):
            copied(cache)
    layer(X[:, 4:], cache=copy.copy(cache)).sum().backward()
    assert layer.k_proj.weight.grad is not None


@each_cache
def test_keys_appended_under_inference_mode_may_be_saved_for_backward(make: Callable[[], Any]) -> None:
    layer, cache = windowed(), make()
    with torch.inference_mode():
        layer(X[:, :3], cache=cache)
    layer.requires_grad_(False).q_proj.requires_grad_(True)
    layer(X[:, 3:5], cache=cache).sum().backward()
    assert layer.q_proj.weight.grad is not None
    cross, context = qkv.CrossAttention(24, 6), qkv.CrossKVCache()
    with torch.inference_mode():
        cross(X, X.clone(), cache=context)
    cross(X, cache=context).sum().backward()
    assert cross.q_proj.weight.grad is not None


@each_cache
def test_overwritten_views_that_a_graph_needs_are_an_error_of_torch(make: Callable[[], Any]) -> None:
    """Views returned under no_grad and used in a graph, then cropped and overwritten by either kind of append."""
    for tail in (1, 3):
        cache, k, q = make(), torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 16, requires_grad=True)
        with torch.no_grad():
            keys = cache.append(k, k)
        out = (keys.k * q).sum()
        with torch.no_grad():
            cache.crop(3 - tail)
            cache.append(k, k)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@each_cache
@torch.no_grad()
def test_a_batch_of_no_rows_is_a_batch(make: Callable[[], Any]) -> None:
    layer = windowed()
    cache, filled = make(), make()
    assert layer(X[:0, :3], cache=cache).shape == (0, 3, 24)
    with pytest.raises(ValueError, match=r"k must be \(0, 2, L, 4\) .*, as at the first append; got \(2, 2, 1, 4\)"):
        layer(X[:, :1], cache=cache)
    assert cache.length == 3
    keep = torch.ones(0, 2, dtype=torch.bool)
    assert layer(X[:0, :2], mask=Mask.padding(keep), cache=cache).shape == (0, 2, 24)
    layer(X[:, :5], cache=filled)
    cache.join(filled)
    assert torch.equal(layer(X[:, 5:], cache=cache), layer(X[:, 5:], cache=filled))


def test_the_kernel_rounds_into_no_other_shape() -> None:
    x, codes, scale = torch.randn(2, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.int8), torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"codes and scale must be \(2, 2, 3, 4\) and \(2, 2, 3\); got \(1, 2, 3, 4\)"):
        kernels.quantize(x, codes, scale)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((3, 2, 1, 4), torch.float32),
        ((2, 3, 1, 4), torch.float32),
        ((2, 2, 1, 5), torch.float32),
        ((2, 2, 1, 4), torch.bfloat16),
    ],
    ids=["batch", "heads", "width", "dtype"],
)
@each_cache
@torch.no_grad()
def test_slots_for_other_tokens_are_not_claimed(
    make: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    cache, k = make(), torch.randn(2, 2, 3, 4)
    cache.append(k, k)
    before = [x.clone() for x in cache.keys().gathered().tokens]
    assert cache.claim(shape, shape, torch.empty(1, dtype=dtype)) is None
    assert cache.length == 3
    assert all(map(torch.equal, cache.keys().gathered().tokens, before))
    assert cache.claim((2, 2, 1, 4), (2, 2, 1, 4), k) is not None, "tokens like those before"
