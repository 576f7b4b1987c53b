"""Grouped-query attention: query heads in groups with one key head and one value head each."""

import pytest
import torch

import qkv
from qkv.backends import BACKENDS


def test_as_many_groups_as_heads_is_multi_head_and_one_is_multi_query_bit_for_bit() -> None:
    x = torch.randn(2, 11, 24)
    for groups, named in ((6, qkv.MultiHeadAttention(24, 6)), (1, qkv.MultiQueryAttention(24, 6))):
        grouped = qkv.GroupedQueryAttention(24, 6, groups)
        grouped.load_state_dict(named.state_dict())
        assert torch.equal(grouped(x), named(x))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("backend", [backend.NAME for backend in BACKENDS])
def test_groups_are_contiguous_and_equal_repeated_heads_bit_for_bit(backend: str, groups: int) -> None:
    q, k, v = torch.randn(2, 6, 11, 8), torch.randn(2, groups, 13, 8), torch.randn(2, groups, 13, 8)
    repeats = 6 // groups
    want = qkv.attention(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), backend=backend)
    got = qkv.attention(q, k, v, backend=backend)
    assert torch.equal(got, want)
    if 1 < groups < 6:
        interleaved = qkv.attention(q, k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1), backend=backend)
        assert not torch.allclose(got, interleaved)


def test_any_group_size_divides_the_cache() -> None:
    sizes = {}
    for groups in (1, 2, 3, 6):
        cache = qkv.KVCache()
        qkv.GroupedQueryAttention(24, 6, groups).requires_grad_(False)(torch.randn(1, 16, 24), cache=cache)
        sizes[groups] = cache.nbytes
    assert sizes == {groups: groups * sizes[1] for groups in sizes}


def test_a_state_dict_moves_between_the_names() -> None:
    state = qkv.Attention(24, 6, num_kv_heads=2, mask=qkv.Mask.causal()).state_dict()
    for layer in (
        qkv.GroupedQueryAttention(24, 6, 2),
        qkv.CausalAttention(24, 6, num_kv_heads=2),
        qkv.SlidingWindowAttention(24, 6, 4, num_kv_heads=2),
        qkv.CrossAttention(24, 6, num_kv_heads=2),
    ):
        layer.load_state_dict(state)
        assert list(layer.state_dict()) == list(state)
