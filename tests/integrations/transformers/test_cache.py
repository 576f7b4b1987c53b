"""Caches for transformers' models: what they return is what transformers' own return, without the copies."""

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from qkv.cache.buffer import AppendBuffer
from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers.cache import AppendLayer, Int8Layer, Int8SlidingLayer, QKVCache, SlidingLayer
from qkv.integrations.transformers.lazy_tensor import Int8Tensor

SIZES: dict[str, int] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

LENGTHS = (7, 1, 1, 1, 3, 1, 1, 12, 1, 1, 1, 40, 1)


def tokens(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 5)


def assert_same_update(mine: Any, theirs: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    assert mine.get_mask_sizes(k.shape[2]) == theirs.get_mask_sizes(k.shape[2])
    for got, want in zip(mine.update(k, v), theirs.update(k, v), strict=True):
        assert torch.equal(got, want)
    assert mine.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("window", [2, 3, 5, 11, 100])
def test_a_sliding_layer_returns_what_the_one_of_transformers_does(window: int) -> None:
    mine, theirs = SlidingLayer(window), DynamicSlidingWindowLayer(window)
    for length in LENGTHS:
        assert_same_update(mine, theirs, *tokens(length))
    rows = torch.tensor([1, 1])
    mine.reorder_cache(rows)
    theirs.reorder_cache(rows)
    assert_same_update(mine, theirs, *tokens(2))


def test_a_sliding_layer_keeps_two_windows() -> None:
    layer = SlidingLayer(5)
    for length in (100, *[1] * 30):
        layer.update(*tokens(length))
        assert layer.keys.untyped_storage().nbytes() <= 2 * 3 * 10 * 4 * 4


def test_a_sliding_layer_that_records_the_past_can_be_cropped() -> None:
    mine, theirs = SlidingLayer(5), DynamicSlidingWindowLayer(5)
    for layer in (mine, theirs):
        layer.activate_past_recording()
    for length in (7, 3, 2):
        assert_same_update(mine, theirs, *tokens(length))
        mine.crop(-1)
        theirs.crop(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.reset(),
        lambda layer: layer.offload() or layer.prefetch(),
    ],
)
def test_an_append_layer_supports_every_operation_of_transformers(change: Any) -> None:
    mine, theirs = AppendLayer(), DynamicLayer()
    for length in LENGTHS:
        assert_same_update(mine, theirs, *tokens(length))
    change(mine)
    change(theirs)
    batch = theirs.keys.shape[0] if theirs.keys is not None else 2
    for length in LENGTHS:
        assert_same_update(mine, theirs, *tokens(length, batch))


@torch.no_grad()
def test_appending_copies_only_new_tokens() -> None:
    layer = AppendLayer()
    layer.update(*tokens(100))
    layer.update(*tokens(1))
    places = set()
    for _ in range(20):
        places.add(layer.update(*tokens(1))[0].data_ptr())
    layer.crop(-5)
    places.add(layer.update(*tokens(1))[0].data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("dtype", [None, torch.int8])
@torch.no_grad()
def test_all_layers_have_their_memory_before_the_first_update(dtype: torch.dtype | None) -> None:
    """Or it would lie among what a prefill computes: 577 MiB at the peak of 4096 tokens of SmolLM2-135M, now 395."""
    config = transformers.LlamaConfig(num_hidden_layers=3)
    cache, (k, v) = QKVCache(config, dtype), tokens(50)
    cache.update(k, v, 0)
    rest = [part for layer in cache.layers[1:] for part in buffers_of(layer)]
    places = [part.memory.data_ptr() for part in rest]
    for step in range(20):
        for index in range(1, 3):
            keys, _ = cache.update(*((k, v) if step == 0 else tokens(1)), index)
    assert keys.shape[2] == 69
    assert [part.memory.data_ptr() for part in rest] == places


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_layers_may_differ_from_the_configuration(dtype: torch.dtype | None) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=3)
    cache, theirs = QKVCache(config, dtype), DynamicCache(config=config)
    shapes = [(2, 3, 7, 4), (2, 1, 7, 8), (1, 3, 20, 4)]
    for index, shape in enumerate(shapes):
        for length in (shape[2], 1, 70, 1):
            k = torch.randn(*shape[:2], length, shape[3])
            for got, want in zip(cache.update(k, -k, index), theirs.update(k, -k, index), strict=True):
                assert got.shape == want.shape
                assert (got - want).abs().max() <= (want.abs().max() / 127 if dtype else 0)


@pytest.mark.parametrize("window", [None, 5])
def test_a_refused_update_changes_nothing(window: int | None) -> None:
    layer = AppendLayer() if window is None else SlidingLayer(window)
    with pytest.raises(ValueError, match=r"keys must be \(B, heads, L, width\); got shape \(2, 5\)"):
        layer.update(torch.randn(2, 5), torch.randn(2, 5))
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    assert_same_update(layer, theirs, *tokens(4))
    for k, v, message in (
        (*tokens(1, batch=1), r"keys must be \(2, 3, L, 4\) like the cached ones; got shape \(1, 3, 1, 4\)"),
        (*tokens(1, batch=3), r"keys must be \(2, 3, L, 4\) like the cached ones; got shape \(3, 3, 1, 4\)"),
        (tokens(1)[0], tokens(1)[0], r"values must be \(2, 3, L, 5\) like the cached ones; got shape \(2, 3, 1, 4\)"),
        (tokens(1)[0], tokens(1)[1][0], r"values must be \(B, heads, L, width\); got shape \(3, 1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.update(k, v)
    assert_same_update(layer, theirs, *tokens(3))


@pytest.mark.parametrize("make", [SlidingLayer, Int8SlidingLayer])
@pytest.mark.parametrize("how", ["gradients", "drafts"])
def test_a_refused_update_that_transformers_computes_changes_nothing(make: Any, how: str) -> None:
    layer, theirs = make(5), DynamicSlidingWindowLayer(5)
    for each in (layer, theirs) if how == "drafts" else ():
        each.activate_past_recording()

    def given(length: int, batch: int = 2) -> list[torch.Tensor]:
        return [x.requires_grad_(how == "gradients") for x in tokens(length, batch)]

    for length in (4, 3):
        assert_same_update(layer, theirs, *given(length))
        with pytest.raises(
            ValueError, match=r"keys must be \(2, 3, L, 4\) like the cached ones; got shape \(1, 3, 1, 4\)"
        ):
            layer.update(*given(1, batch=1))
    assert_same_update(layer, theirs, *given(2))


@pytest.mark.parametrize("make", [SlidingLayer, Int8SlidingLayer])
@torch.no_grad()
def test_a_window_longer_than_the_text_takes_what_its_tokens_need(make: Any) -> None:
    layer, whole = make(1 << 62), Int8Layer() if make is Int8SlidingLayer else AppendLayer()
    for length in (5, 1, 1015, 1, 1, 1, 1, 2000, 1):
        k, v = tokens(length)
        claimed = layer.claim(k.shape, v.shape, k) if length == 1 and make is SlidingLayer else None
        if claimed is None:
            got = layer.update(k, v)
        else:
            claimed.k[:, :, -1:], claimed.v[:, :, -1:] = k, v
            got = claimed.k, claimed.v
        for mine, theirs in zip(got, whole.update(k, v), strict=True):
            assert mine.shape == theirs.shape and torch.equal(mine + 0, theirs + 0)
        memory = layer._cache._parts[0].memory if make is Int8SlidingLayer else layer._keys.memory
        assert memory.shape[2] <= max(1024, 2 * layer.get_seq_length())
    assert layer.get_seq_length() == 3026 < memory.shape[2]


@torch.no_grad()
def test_a_wider_dtype_is_kept_as_transformers_keeps_it() -> None:
    mine, theirs = AppendLayer(), DynamicLayer()
    k, v = tokens(4)
    assert_same_update(mine, theirs, k.bfloat16(), v.bfloat16())
    assert_same_update(mine, theirs, *tokens(2))
    assert mine.keys.dtype is torch.float32
    assert_same_update(mine, theirs, *tokens(2))


def buffers_of(layer: Any) -> tuple[AppendBuffer, ...]:
    return layer._cache._parts if isinstance(layer, Int8Layer) else (layer._keys, layer._values)


def test_a_crop_does_not_restore_dropped_tokens() -> None:
    layer, (k, v) = AppendLayer(), tokens(6)
    layer.update(k, v)
    layer.crop(-2)
    new = tokens(1)
    assert torch.equal(layer.update(*new)[0], torch.cat([k[:, :, :4], new[0]], dim=2))


def test_gradients_flow_through_the_cache() -> None:
    layer, first, second = AppendLayer(), *(tokens(3)[0].requires_grad_() for _ in range(2))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first)) and torch.equal(second.grad, torch.ones_like(second))


def test_gradients_flow_after_tokens_without_gradients() -> None:
    layer, new = AppendLayer(), tokens(1)[0].requires_grad_()
    for _ in range(3):
        layer.update(tokens(1)[0], tokens(1)[0])
    sum(layer.update(new, new)[0].square().sum() for _ in range(2)).backward()
    assert torch.allclose(new.grad, 6 * new)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.reset(),
    ],
)
def test_an_int8_layer_supports_every_operation_and_is_dequantized_for_others(change: Any) -> None:
    mine, theirs = Int8Layer(), DynamicLayer()
    for length in (5, 1, 3):
        k, v = tokens(length)
        mine.update(k, v)
        theirs.update(k, v)
    change(mine)
    change(theirs)
    k, v = tokens(2, theirs.keys.shape[0] if theirs.keys is not None else 2)
    assert mine.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    for got, want in zip(mine.update(k, v), theirs.update(k, v), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert 0 < (got - want).abs().max() <= want.abs().max() / 127


@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: None,
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.crop(-1) if layer.cumulative_length < 5 else None,
        lambda layer: layer.activate_past_recording(),
        lambda layer: layer.reset(),
    ],
)
@torch.no_grad()
def test_a_window_in_int8_is_that_of_transformers(change: Any, length: int) -> None:
    mine, theirs = Int8SlidingLayer(5), DynamicSlidingWindowLayer(5)
    for layer in (mine, theirs):
        torch.manual_seed(0)
        layer.update(*tokens(length))
        layer.update(*tokens(1))
        change(layer)
    for count in (1, 3, 9, 1, 1):
        k, v = tokens(count, theirs.keys.shape[0] if theirs.keys is not None else 2)
        assert mine.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        for got, want in zip(mine.update(k, v), theirs.update(k, v), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert (got - want).abs().max() <= want.abs().max() / 127
        assert mine.get_seq_length() == theirs.get_seq_length() and mine.keys.shape == theirs.keys.shape
    if mine.record_past:
        assert not isinstance(mine.keys, Int8Tensor)  # drafts may be taken back
    else:
        assert isinstance(mine.keys, Int8Tensor)
        with pytest.raises(RuntimeError, match="does not track past states"):
            mine.crop(-1)


@torch.no_grad()
def test_a_window_in_int8_keeps_no_prompt_in_memory() -> None:
    layer = Int8SlidingLayer(5)
    layer.update(*tokens(100))
    slots = {part.memory.shape[2] for part in layer._cache._parts}
    assert slots == {10} and layer.keys.codes.untyped_storage().nbytes() == 2 * 3 * 10 * 4


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_model_reads_a_cache_in_int8(kind: str) -> None:
    torch.manual_seed(0)
    windows = {"sliding_window": 5} if kind == "MistralForCausalLM" else {}
    of = getattr(transformers, kind)
    config = of.config_class(**SIZES, **windows, num_hidden_layers=2)
    model = of(config).eval()
    integration.register()
    ids = torch.randint(3, 97, (2, 12))

    def logits(implementation: str, cache: Any) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 3], 1)], 1)

    exact, cache = logits("qkv", QKVCache(config)), QKVCache(config, dtype=torch.int8)
    with mock.patch.object(Int8Tensor, "materialize", side_effect=AssertionError("materialized")):
        rounded = logits("qkv", cache)
    assert cache.layers[0].keys.codes.dtype == torch.int8
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
    torch.testing.assert_close(logits("sdpa", QKVCache(config, dtype=torch.int8)), rounded, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"or None for that of the model; got torch\.float16"):
        QKVCache(config, dtype=torch.float16)


def test_a_model_generates_the_same_text_with_either_cache() -> None:
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **SIZES, num_hidden_layers=3, head_dim=8, sliding_window=5, layer_types=layer_types
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    ids = torch.randint(3, 97, (2, 9))
    cache = QKVCache(config)
    assert [type(layer) for layer in cache.layers] == [SlidingLayer, AppendLayer, SlidingLayer]
    for options in ({}, {"num_beams": 3}):
        want = model.generate(ids, max_new_tokens=20, do_sample=False, **options)
        got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=QKVCache(config), **options)
        assert torch.equal(got, want)
