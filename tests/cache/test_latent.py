"""`LatentKVCache`: what `test_caches` demands of the others, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.caches import saved

import qkv
from qkv import Mask

X = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))


def build(mask: Mask | None = None) -> qkv.LatentAttention:
    torch.manual_seed(0)
    mask = Mask.causal() if mask is None else mask
    rotary = qkv.RotaryEmbedding(4)
    return qkv.LatentAttention(24, 3, kv_rank=10, nope_dim=6, rope_dim=4, mask=mask, rotary=rotary).eval()


@torch.no_grad()
def test_latents_of_another_layer_are_refused() -> None:
    layer, other, cache = build(), build(), qkv.LatentKVCache()
    layer(X[:, :3], cache=cache)
    message = (
        r"its 3 tokens are keys of another layer, LatentAttention\(24, num_heads=3\); got a call of LatentAttention"
    )
    for call in (other, other.attention_weights):
        with pytest.raises(ValueError, match=message):
            call(X[:, 3:4], cache=cache)
    assert cache.length == 3
    copy.copy(layer)(X[:, 3:4], cache=cache)  # the same weights
    copy.deepcopy(layer)(X[:, 4:5], cache=pickle.loads(pickle.dumps(cache)))  # free for the next layer
    cache.reset()
    other(X[:1], cache=cache)
    assert cache.length == 6


def test_other_layers_refuse_latents() -> None:
    with pytest.raises(TypeError, match="in self-attention; got LatentKVCache"):
        qkv.MultiQueryAttention(24, 3)(X, cache=qkv.LatentKVCache())
    with pytest.raises(TypeError, match="in cross-attention; got LatentKVCache"):
        qkv.CrossAttention(24, 3)(X, X, cache=qkv.LatentKVCache())  # type: ignore[arg-type]


@torch.no_grad()
def test_a_mask_that_shows_later_keys_is_refused_with_a_filled_cache() -> None:
    layer, cache = build(Mask.full()), qkv.LatentKVCache()
    layer(X[:, :5], cache=cache)
    with pytest.raises(
        ValueError, match=r"LatentKVCache: with 5 tokens in the cache, the mask must not show keys after"
    ):
        layer(X[:, 5:], cache=cache)
    layer(X[:, 5:], mask=Mask.causal(), cache=cache)
    assert cache.length == 6


@torch.no_grad()
def test_a_call_that_fails_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    layer, cache = build(), qkv.LatentKVCache()
    want = layer(X)
    for part in X.split([4, 1, 1], dim=1):
        before = cache.length
        with pytest.raises(ValueError, match="keep"):
            layer(part, mask=Mask.padding(torch.ones(2, 99, dtype=torch.bool)), cache=cache)
        monkeypatch.setattr(layer.out_proj, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer(part, cache=cache)
        monkeypatch.undo()
        assert cache.length == before
        got = layer(part, cache=cache)
        torch.testing.assert_close(got, want[:, before : before + part.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), None])
@torch.no_grad()
def test_copies_have_the_tokens_and_are_independent(load: Callable[[Any], Any] | None) -> None:
    layer, cache = build(), qkv.LatentKVCache()
    layer(X[:, :4], cache=cache)
    twin = saved(cache, weights_only=True) if load is None else load(cache)
    for each in (cache, twin):
        for i in (4, 5):
            torch.testing.assert_close(layer(X[:, i : i + 1], cache=each), layer(X)[:, i : i + 1])
            layer(torch.randn(2, 1, 24), cache=copy.copy(each))


def test_a_deep_copy_of_a_graph_is_refused_and_a_copy_shares_it() -> None:
    layer, cache = build(), qkv.LatentKVCache()
    layer(X[:, :4], cache=cache)
    with pytest.raises(RuntimeError, match=r"were computed with gradients\. Use copy\.copy"):
        copy.deepcopy(cache)
    layer(X[:, 4:], cache=copy.copy(cache)).sum().backward()
    assert layer.kv_a_proj.weight.grad is not None


def test_latents_appended_under_inference_mode_may_be_saved_for_backward() -> None:
    layer, cache = build(), qkv.LatentKVCache()
    with torch.inference_mode():
        layer(X[:, :3], cache=cache)
    layer(X[:, 3:5], cache=cache).sum().backward()
    assert layer.q_proj.weight.grad is not None


@torch.no_grad()
def test_capacity_is_allocated_once_and_is_a_limit() -> None:
    layer, cache = build(), qkv.LatentKVCache(capacity=5)
    layer(X[:, :3], cache=cache)
    assert cache.nbytes == 2 * 5 * (10 + 4) * 4
    layer(X[:, 3:5], cache=cache)
    with pytest.raises(ValueError, match=r"LatentKVCache: capacity is 5 tokens; got 1 more than the 5 in the cache"):
        layer(X[:, 5:], cache=cache)
    assert cache.length == 5 and cache.nbytes == 2 * 5 * (10 + 4) * 4


def test_latents_that_do_not_fit_are_refused() -> None:
    cache, latents, rotary_keys = qkv.LatentKVCache(), torch.randn(2, 1, 3, 10), torch.randn(2, 1, 3, 4)
    heads = torch.randn(2, 3, 3, 10)
    with pytest.raises(ValueError, match=r"latents must be \(B, 1, L, rank\), shared by all heads; got \(2, 3, 3,"):
        cache.append(heads, heads)
    cache.append(latents, rotary_keys)
    wrong = [
        (latents[..., :9], torch.randn(2, 1, 3, 5), r"must be \(2, 1, L, 10\) in torch.float32"),
        (latents, rotary_keys[..., :3], r"must be \(2, 1, L, 4\) in torch.float32"),
        (latents[:1], rotary_keys[:1], r"got \(1, 1, 3, 10\)"),
        (latents.double(), rotary_keys.double(), "in torch.float64"),
        (latents, rotary_keys[:, :, :2], "must agree in batch, heads and length"),
        (latents[0], rotary_keys[0], r"got shape \(1, 3, 10\)"),
    ]
    for k, v, message in wrong:
        with pytest.raises(ValueError, match=f"LatentKVCache: .*{message}"):
            cache.append(k, v)
        assert cache.length == 3
    other = qkv.LatentKVCache()
    other.append(latents[..., :9], torch.randn(2, 1, 3, 5))
    with pytest.raises(ValueError, match="LatentKVCache: both caches must have latents of 10; got 9"):
        cache.join(other)
    cache.reset()
    cache.append(latents[..., :9], torch.randn(2, 1, 3, 5))  # other widths, when it is empty
    assert cache.length == 3
    empty = qkv.LatentKVCache()
    empty.join(other)
    assert torch.equal(empty.append(latents[:, :, :1, :9], torch.zeros(2, 1, 1, 5)).v[:, :, :3], latents[..., :9])
