"""`qkv.parallel.Heads`: on real ranks, a layer of which each has some heads computes and learns as one process does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from parallel.ranks import Ranks, mesh
from qkv import Mask

Of = Callable[[int], Ranks]

GROUPS: dict[str, Callable[[], qkv.Attention]] = {
    "multi-head": lambda: qkv.MultiHeadAttention(24, 12, head_dim=4),
    "cross": lambda: qkv.CrossAttention(24, 12, num_kv_heads=12, head_dim=4, context_dim=20),
    "six KV heads": lambda: qkv.CausalAttention(24, 12, num_kv_heads=6, head_dim=4, qk_norm=True),
    "two KV heads": lambda: qkv.CausalAttention(24, 12, num_kv_heads=2, head_dim=4, qk_norm=True),
    "window": lambda: qkv.SlidingWindowAttention(24, 12, 4, head_dim=4, alibi=[0.1 * h for h in range(12)]),
    "multi-query": lambda: qkv.MultiQueryAttention(24, 12, head_dim=4, qk_norm=True, sink_logits=True),
    "grouped": lambda: qkv.GroupedQueryAttention(24, 12, 12, head_dim=4, value_dim=6, softcap=5.0, gate=True),
    "all options": lambda: qkv.CausalAttention(
        24, 12, num_kv_heads=1, head_dim=4, value_dim=6, rotary=qkv.RotaryEmbedding(4), qk_norm=True, gate=True,
        sink_logits=True, alibi=[0.1 * h for h in range(12)], position_bias=qkv.RelativePositionBias(12),
    ),
    "no biases": lambda: qkv.CausalAttention(24, 12, num_kv_heads=12, head_dim=4, bias=False),
    "differential": lambda: qkv.DifferentialAttention(24, 12, num_kv_heads=12, mask=Mask.causal(), head_dim=4),
}  # fmt: skip


def made(name: str) -> qkv.Attention:
    """A layer whose norms and sinks are not those of the start, under which errors cancel."""
    torch.manual_seed(3)
    layer = GROUPS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def over_ranks(layer: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(layer, mesh(), qkv.parallel.Heads())


def whole(tensor: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def learned(name: str, cut: bool) -> dict[str, Tensor]:
    """The output of a step, and every gradient."""
    layer = made(name)
    if cut:
        over_ranks(layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 24, generator=generator, requires_grad=True)
    context = None
    if layer.context_dim is not None:
        context = torch.randn(2, 5, layer.context_dim, generator=generator, requires_grad=True)
    bias = torch.randn(1, 12, 7, 5 if context is not None else 7, generator=generator, requires_grad=True)
    out = layer(x, context, bias=bias)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "bias": bias.grad}
    if context is not None:
        found["context"] = context.grad
    weights = layer.attention_weights(x, context, bias=bias)
    found["weights"] = weights.detach()
    return found | {name: whole(parameter.grad) for name, parameter in layer.named_parameters()}


UNFIT = {("six KV heads", 4), ("two KV heads", 3)}
"""Refused: a rank would have one and a half KV heads."""
CUTS = [(name, count) for name in GROUPS for count in (2, 3, 4) if (name, count) not in UNFIT]


@pytest.mark.parametrize("name, count", CUTS)
def test_outputs_and_gradients_are_those_of_one_process(name: str, count: int, ranks: Of) -> None:
    want = learned(name, cut=False)
    for got in ranks(count).run(learned, name, True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")
