"""Causal attention: no query sees a later key, and decoding with a cache equals the full pass in any chunking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkv
from qkv import Mask

LAYERS = {
    "causal": lambda: qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4)),
    "causal window": lambda: qkv.SlidingWindowAttention(24, 6, 5, causal=True, rotary=qkv.RotaryEmbedding(4)),
    "window and sinks": lambda: qkv.SlidingWindowAttention(24, 6, 5, causal=True, sink_tokens=2, qk_norm=True),
    "everything": lambda: qkv.CausalAttention(
        24, 6, num_kv_heads=3, value_dim=3, softcap=4.0, sink_logits=True, alibi=torch.rand(6), qk_norm=True
    ),
}
CACHES = {
    "causal": [qkv.KVCache, lambda: qkv.KVCache(capacity=23)],
    "causal window": [qkv.KVCache, lambda: qkv.SlidingKVCache(5), lambda: qkv.SlidingKVCache(8)],
    "window and sinks": [qkv.KVCache, lambda: qkv.SlidingKVCache(5, sink_tokens=2), lambda: qkv.SlidingKVCache(7, 3)],
    "everything": [qkv.KVCache],
}
PAIRS = [(layer, index) for layer, caches in CACHES.items() for index in range(len(caches))]


@pytest.mark.parametrize("layer", LAYERS)
def test_future_inputs_have_exactly_zero_gradient(layer: str) -> None:
    module = LAYERS[layer]()
    x = torch.randn(2, 13, 24, requires_grad=True)
    out = module(x)
    for i in range(13):
        (grad,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        assert not grad[:, i + 1 :].any()
        assert grad[:, i].any()


def test_every_past_input_has_a_gradient() -> None:
    x = torch.randn(1, 13, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(LAYERS["causal"]()(x)[:, -1].sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("layer", "index"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_prefill_in_any_chunking_and_decoding_equal_the_full_pass(layer: str, index: int, data: st.DataObject) -> None:
    length = 23
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1))))
    torch.manual_seed(3)
    module, x = LAYERS[layer]().eval(), torch.randn(2, length, 24)
    cache = CACHES[layer][index]()
    with torch.no_grad():
        want = module(x)
        pieces = [module(x[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), want)
    assert cache.length == length


@pytest.mark.parametrize(("layer", "index"), PAIRS)
def test_gradients_through_a_cache_equal_those_of_the_full_pass(layer: str, index: int) -> None:
    module, x = LAYERS[layer]().double(), torch.randn(1, 17, 24, dtype=torch.float64, requires_grad=True)
    cache, upstream = CACHES[layer][index](), torch.randn(1, 17, 24, dtype=torch.float64)
    pieces = [module(x[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 11), (11, 17))]
    got = torch.autograd.grad(torch.cat(pieces, dim=1), [x, *module.parameters()], upstream)
    want = torch.autograd.grad(module(x), [x, *module.parameters()], upstream)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("layer", "index"), [pair for pair in PAIRS if pair[0] != "everything"])
def test_padded_rows_decode_as_they_would_alone(layer: str, index: int, side: str) -> None:
    module, length, padding = LAYERS[layer]().eval(), 19, 6
    if layer == "window and sinks" and side == "left":
        padding = 0  # a padded row's first keys are its padding: the sinks of the text are elsewhere
    x = torch.randn(2, length, 24)
    keep = torch.ones(2, length, dtype=torch.bool)
    alone = slice(padding, None) if side == "left" else slice(None, length - padding)
    keep[1] = False
    keep[1, alone] = True
    cache, pieces = CACHES[layer][index](), []
    with torch.no_grad():
        for a, b in ((0, 8), (8, 9), (9, 12), *((i, i + 1) for i in range(12, length))):
            pieces.append(module(x[:, a:b], mask=Mask.padding(keep[:, :b]), cache=cache))
        got = torch.cat(pieces, dim=1)
        torch.testing.assert_close(got[:1], module(x[:1]))
        torch.testing.assert_close(got[1:, alone], module(x[1:, alone]))
