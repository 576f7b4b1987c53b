"""The arithmetic of KV caches, against numbers worked out by hand and against a cache that a model has filled."""

from types import SimpleNamespace

import pytest

from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import CacheSize, LayerShape, cache_bytes, cache_sizes, layer_shapes, readable_bytes

SMOLLM2 = 30 * (LayerShape(num_heads=9, num_kv_heads=3, head_dim=64, value_dim=64, window=None),)


def test_grouped_query_model_beside_multi_head_and_multi_query():
    # 30 layers * 4096 tokens * (64 + 64) numbers * 4 bytes = 62 914 560 bytes for each KV head; a window of 512 is 1/8.
    # In int8, a quarter, and two scales of 4 bytes for each token, layer and KV head: 983 040 bytes for each KV head.
    assert cache_sizes(SMOLLM2, length=4096, window=512, bytes_per_number=4) == [
        CacheSize("MHA", False, (9,), 566_231_040, 70_778_880, 150_405_120),
        CacheSize("GQA", True, (3,), 188_743_680, 23_592_960, 50_135_040),
        CacheSize("MQA", False, (1,), 62_914_560, 7_864_320, 16_711_680),
    ]


@pytest.mark.parametrize(("num_kv_heads", "own"), [(6, "MHA"), (1, "MQA")])
def test_model_that_is_multi_head_or_multi_query_has_no_third_row(num_kv_heads, own):
    sizes = cache_sizes(2 * (LayerShape(6, num_kv_heads, 8, 8, None),), length=10, window=4, bytes_per_number=2)
    assert [(size.attention, size.is_model) for size in sizes] == [("MHA", own == "MHA"), ("MQA", own == "MQA")]


def test_key_and_value_widths_count_separately():
    assert cache_bytes((LayerShape(6, 2, 24, 16, None),), length=5, bytes_per_number=2) == 5 * 2 * (24 + 16) * 2


def test_layers_keep_their_own_window_where_it_is_shorter():
    layers = (LayerShape(4, 2, 8, 8, None), LayerShape(4, 2, 8, 8, 3))
    (_, own, _) = cache_sizes(layers, length=10, window=5, bytes_per_number=4)
    per_token = 2 * (8 + 8) * 4
    assert (own.num_bytes, own.window_bytes) == ((10 + 3) * per_token, (5 + 3) * per_token)
    assert own.int8_bytes == (10 + 3) * 2 * (8 + 8 + 8)


def test_int8_agrees_with_our_cache():
    """Codes and scales of what `qkv.Int8KVCache` holds."""
    import torch

    import qkv

    cache = qkv.Int8KVCache()
    kept = cache.append(*torch.randn(2, 1, 2, 7, 16).unbind())
    held = sum(tensor.nbytes for tensor in (kept.k, kept.v, kept.k_scale, kept.v_scale))
    assert cache_sizes((LayerShape(4, 2, 16, 16, None),), length=7, window=4, bytes_per_number=2)[1].int8_bytes == held


def test_window_longer_than_the_text_saves_nothing():
    for size in cache_sizes(SMOLLM2, length=100, window=512, bytes_per_number=2):
        assert size.window_bytes == size.num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (188_743_680, "180.0 MiB"),
        (2**31, "2.0 GiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_readable_bytes(num_bytes, text):
    assert readable_bytes(num_bytes) == text


def _config(**numbers):
    config = SimpleNamespace(model_type="odd", **numbers)
    config.get_text_config = lambda: config
    return config


@pytest.mark.parametrize(
    ("config", "cache"),
    [
        (_config(num_attention_heads=4), SimpleNamespace(layers=[])),
        (_config(num_attention_heads=4), object()),
        (_config(), SimpleNamespace(layers=[SimpleNamespace(keys=1)])),
        (_config(num_attention_heads=4, kv_lora_rank=8), SimpleNamespace(layers=[SimpleNamespace(keys=1)])),
    ],
)
def test_model_without_keys_and_values_by_heads_is_refused(config, cache):
    with pytest.raises(CommandError, match="the cache of a 'odd' model has no keys and values by head"):
        layer_shapes(config, cache)
