"""Multi-query attention: all query heads share one key head and one value head."""

import pytest
import torch

import qkv


@pytest.mark.parametrize("heads", [2, 3, 8])
def test_the_cache_is_smaller_by_exactly_the_number_of_heads(heads: int) -> None:
    def nbytes(layer: qkv.Attention) -> int:
        cache = qkv.KVCache(capacity=40)
        with torch.no_grad():
            for chunk in (17, 1, 1):
                layer(torch.randn(2, chunk, 48), cache=cache)
        return cache.nbytes

    mask = qkv.Mask.causal()
    multi_head = nbytes(qkv.MultiHeadAttention(48, heads, head_dim=8, mask=mask))
    assert multi_head == heads * nbytes(qkv.MultiQueryAttention(48, heads, head_dim=8, mask=mask))
    assert multi_head == 2 * 2 * heads * 40 * 8 * 4


def test_every_head_reads_the_same_keys_and_values() -> None:
    layer = qkv.MultiQueryAttention(24, 4)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (6, 24)
    x = torch.randn(2, 7, 24)
    k, v = layer.k_proj(x)[:, None], layer.v_proj(x)[:, None]
    q = layer.q_proj(x).unflatten(-1, (4, 6)).transpose(1, 2)
    want = (q @ k.mT / 6**0.5).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.out_proj(want.transpose(1, 2).flatten(2)))


def test_gradients_of_the_shared_head_are_the_sums_over_the_query_heads() -> None:
    q, k, v = torch.randn(1, 4, 7, 6), torch.randn(1, 1, 7, 6), torch.randn(1, 1, 7, 6)
    k.requires_grad_(), v.requires_grad_()
    shared = torch.autograd.grad(qkv.attention(q, k, v).square().sum(), [k, v])
    copies = [k.detach().repeat(1, 4, 1, 1).requires_grad_(), v.detach().repeat(1, 4, 1, 1).requires_grad_()]
    own = torch.autograd.grad(qkv.attention(q, *copies).square().sum(), copies)
    torch.testing.assert_close(shared, tuple(grad.sum(1, keepdim=True) for grad in own))


def test_keys_and_values_are_not_copied_for_their_group() -> None:
    from test_sliding_window import counting

    q, k = torch.randn(1, 64, 1, 16), torch.randn(1, 1, 2048, 16)
    with counting() as count:
        qkv.attention(q, k, k)
    assert count.bytes < k.nbytes
