"""Cross-attention: queries from one sequence, keys and values from another."""

import torch

import qkv


def test_lengths_and_widths_of_the_two_sequences_are_independent() -> None:
    layer = qkv.CrossAttention(24, 4, context_dim=10)
    for lq, lk in ((3, 11), (11, 3), (1, 1)):
        assert layer(torch.randn(2, lq, 24), torch.randn(2, lk, 10)).shape == (2, lq, 24)


def test_context_vectors_are_weighted_sums_of_the_second_inputs_values() -> None:
    layer = qkv.CrossAttention(24, 4, context_dim=10, num_kv_heads=2)
    x, context = torch.randn(2, 3, 24), torch.randn(2, 11, 10)
    weights = layer.attention_weights(x, context)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
    values = layer.v_proj(context).unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, dim=1)
    want = layer.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, context), want)


def test_values_come_from_the_context_alone() -> None:
    layer = qkv.CrossAttention(24, 4)
    context = torch.randn(2, 11, 24)
    constant = context[:, :1].expand(-1, 11, -1)
    first, second = layer(torch.randn(2, 3, 24), constant), layer(torch.randn(2, 3, 24), constant)
    torch.testing.assert_close(first, second)  # equal keys give equal weights: the queries cannot show


def test_gradients_reach_both_sequences() -> None:
    layer = qkv.CrossAttention(24, 4, context_dim=10)
    x, context = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 11, 10, requires_grad=True)
    layer(x, context).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(-1) > 0).all()
    assert context.grad is not None and (context.grad.abs().sum(-1) > 0).all()


def test_the_context_is_projected_once_and_reused_at_every_decoding_step() -> None:
    layer = qkv.CrossAttention(24, 4, context_dim=10).eval()
    calls = []
    layer.k_proj.register_forward_hook(lambda *_: calls.append("k"))
    layer.v_proj.register_forward_hook(lambda *_: calls.append("v"))
    x, context, cache = torch.randn(2, 7, 24), torch.randn(2, 11, 10), qkv.CrossKVCache()
    want = layer(x, context)
    calls.clear()
    steps = [layer(x[:, :1], context, cache=cache)]
    steps += [layer(x[:, i : i + 1], cache=cache) for i in range(1, 6)]
    steps += [layer(x[:, 6:], context, cache=cache)]
    assert calls == ["k", "v"]
    torch.testing.assert_close(torch.cat(steps, 1), want)


def test_padding_of_the_context() -> None:
    layer = qkv.CrossAttention(24, 4)
    x, context = torch.randn(2, 3, 24), torch.randn(2, 11, 24)
    mask = qkv.Mask.padding(torch.tensor([11, 4]))
    got = layer(x, context, mask=mask)
    torch.testing.assert_close(got[:1], layer(x[:1], context[:1]))
    torch.testing.assert_close(got[1:], layer(x[1:], context[1:, :4]))
