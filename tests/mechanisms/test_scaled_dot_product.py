"""Scaled dot-product attention: scores divided by sqrt(d_k), softmax, and the weighted sum of values."""

import torch

import qkv


def test_weights_of_each_row_sum_to_one() -> None:
    q, k = torch.randn(2, 3, 7, 11), torch.randn(2, 3, 13, 11)
    weights = qkv.attention_weights(q, k)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))


def test_output_is_the_sum_of_the_values_with_these_weights() -> None:
    q, k, v = torch.randn(2, 3, 7, 11), torch.randn(2, 3, 13, 11), torch.randn(2, 3, 13, 5)
    weights = qkv.attention_weights(q, k)
    torch.testing.assert_close(qkv.attention(q, k, v), torch.einsum("bhij,bhjd->bhid", weights, v))


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    q, k = torch.randn(1, 2, 7, 11), torch.randn(1, 2, 13, 11)
    for width in (1, 5, 29):
        assert qkv.attention(q, k, torch.randn(1, 2, 13, width)).shape == (1, 2, 7, width)
    layer = qkv.ScaledDotProductAttention(24, head_dim=11, value_dim=5)
    assert layer.v_proj.weight.shape == (5, 24)
    assert layer(torch.randn(2, 7, 24)).shape == (2, 7, 24)


def test_a_hand_computed_row() -> None:
    q = torch.tensor([[[[2.0, 0.0]]]])
    k = torch.tensor([[[[2.0, 5.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    # Scores 4 / sqrt(2) and 0, so the first weight is the sigmoid of 2 sqrt(2).
    first = 1 / (1 + torch.tensor(-(8.0**0.5)).exp())
    torch.testing.assert_close(qkv.attention(q, k, v)[0, 0, 0], torch.stack([first, 1 - first]))


def saturation(width: int, scale: float | None) -> tuple[float, float]:
    """The mean largest weight, and the mean slope of a weight against its score, for unit-normal queries and keys."""
    generator = torch.Generator().manual_seed(width)
    q, k = (torch.randn(1, 1, 64, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = qkv.attention_weights(q, k, scale=scale)
    return weights.amax(-1).mean().item(), (weights * (1 - weights)).sum(-1).mean().item()


def test_the_scale_keeps_the_softmax_out_of_saturation_as_the_width_grows() -> None:
    with_scale = [saturation(width, None) for width in (16, 64, 256, 1024)]
    without = [saturation(width, 1.0) for width in (16, 64, 256, 1024)]
    largest, slopes = zip(*with_scale, strict=True)
    assert max(largest) < 0.25 and max(slopes) < 1.1 * min(slopes)
    largest, slopes = zip(*without, strict=True)
    assert list(largest) == sorted(largest) and largest[-1] > 0.9
    assert list(slopes) == sorted(slopes, reverse=True) and slopes[-1] < slopes[0] / 5


def test_the_gradient_of_queries_vanishes_without_the_scale_and_not_with_it() -> None:
    def norm(width: int, scale: float | None) -> float:
        generator = torch.Generator().manual_seed(width)
        q, k, v = (torch.randn(1, 1, 64, width, generator=generator, dtype=torch.float64) for _ in range(3))
        q.requires_grad_()
        scores = width**-0.5 if scale is None else scale
        (grad,) = torch.autograd.grad(qkv.attention(q, k, v, scale=scale).square().sum() / width, q)
        return (grad / scores).norm().item() / width**0.5  # the gradient that reaches a score, whatever its scale

    scaled = [norm(width, None) for width in (16, 1024)]
    bare = [norm(width, 1.0) for width in (16, 1024)]
    assert scaled[1] > 0.5 * scaled[0]
    assert bare[1] < 0.5 * bare[0]


def test_every_position_reaches_every_other_in_one_step() -> None:
    layer = qkv.ScaledDotProductAttention(8).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    for i in range(9):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).all()
