"""Scaled dot-product attention: weights, the scale, and who reaches whom in one step."""

from typing import Any

import torch
from settings import Settings

import qkv


def scaled_dot_product(settings: Settings) -> dict[str, Any]:
    """Sums of weights, the output as their sum of values, saturation by width, and pairs that one layer connects."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, width, generator=generator) for n, width in ((40, 16), (50, 16), (50, 24)))
    weights = qkv.attention_weights(q, k)
    return {
        "sum_error": (weights.sum(-1) - 1).abs().max().item(),
        "smallest_weight": weights.min().item(),
        "sum_of_values_error": (qkv.attention(q, k, v) - weights @ v).abs().max().item(),
        "value_width": v.shape[-1],
        "key_width": k.shape[-1],
        "saturation": [saturation(width, settings.scored) for width in settings.widths],
        "one_step": one_step(settings.depth * settings.window),
    }


def saturation(width: int, count: int) -> dict[str, float]:
    """The largest weight of a query and the gradient that reaches its scores, with the scale and without.

    Queries and keys are standard normal, and so are values, whose width is always 64. The gradient is that of a sum of
    outputs with random signs by the scores of a query: of a bias of zeros.
    """
    generator = torch.Generator().manual_seed(width)
    q, k = torch.randn(2, 1, 1, count, width, generator=generator)
    v, direction = torch.randn(2, 1, 1, count, 64, generator=generator)
    found: dict[str, float] = {"width": width}
    for name, scale in (("scaled", None), ("unscaled", 1.0)):
        bias = torch.zeros(1, 1, count, count, requires_grad=True)
        out = qkv.attention(q, k, v, bias=bias, scale=scale)
        (gradient,) = torch.autograd.grad((out * direction.sign()).sum(), bias)
        found[f"{name}_gradient"] = gradient.norm(dim=-1).mean().item()
        found[f"{name}_largest"] = qkv.attention_weights(q, k, scale=scale).amax(-1).mean().item()
    return found


def one_step(length: int) -> dict[str, Any]:
    """How many pairs of positions one layer connects: outputs that have a gradient by an input."""
    torch.manual_seed(0)
    layer = qkv.ScaledDotProductAttention(16).double()
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    rows = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0][0].norm(dim=-1) for out in layer(x)[0]]
    return {"length": length, "pairs": int((torch.stack(rows) > 0).sum())}
