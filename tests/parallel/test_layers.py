"""Layers with ``tokens=``: every mechanism over ranks is what it is in one process, gradients of weights summed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel import sharded
from parallel.ranks import Ranks, mesh
from parallel.sharded import joined, ragged, weights_like
from torch import Tensor, nn

import qkv
from qkv import Mask, parallel
from qkv.parallel.runs import even, zigzag

Of = Callable[[int], Ranks]
N = 41
IDS = torch.tensor([[0] * 9 + [1] * 20 + [2] * 12, [5] * 41])
SCALING = qkv.RotaryScaling.dynamic(2.0, max_position_embeddings=16)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "scaled dot-product": lambda: qkv.ScaledDotProductAttention(24, head_dim=8, value_dim=6),
    "multi-head": lambda: qkv.MultiHeadAttention(24, 6, gate=True),
    "causal": lambda: qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4), qk_norm=True),
    "sliding": lambda: qkv.SlidingWindowAttention(24, 6, 8, sink_tokens=2),
    "window": lambda: qkv.SlidingWindowAttention(24, 6, 8, causal=True, sink_logits=True),
    "multi-query": lambda: qkv.MultiQueryAttention(24, 6, mask=Mask.causal(), alibi=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    "grouped-query": lambda: qkv.GroupedQueryAttention(24, 6, 3, mask=Mask.causal() & Mask.documents(IDS)),
    "position bias": lambda: qkv.CausalAttention(24, 6, position_bias=qkv.RelativePositionBias(6)),
    "rotary by length": lambda: qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4, scaling=SCALING)),
    "differential": lambda: qkv.DifferentialAttention(
        24, 3, mask=Mask.causal(), rotary=qkv.RotaryEmbedding(4, scaling=SCALING)
    ),
    "latent": lambda: qkv.LatentAttention(
        24, 6, kv_rank=8, nope_dim=4, rope_dim=2, mask=Mask.causal(window=11), rotary=qkv.RotaryEmbedding(2)
    ),
}
RUNS = {"even": even(N, 2), "ragged": ragged(N, 3), "zigzag": zigzag(N, 3)}


def compare(results: list[dict[str, Any]], layout: Any, layers: list[nn.Module], out: Tensor, x: Tensor) -> None:
    """Compares what ranks have found with a backward pass of one process, and with its output."""
    (out * weights_like(x)).sum().backward()
    torch.testing.assert_close(joined([one["out"] for one in results], layout, 1), out.detach())
    torch.testing.assert_close(joined([one["x"] for one in results], layout, 1), x.grad)
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            total = sum(one[f"{index}.{name}"] for one in results)
            torch.testing.assert_close(
                total, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_over_ranks_is_the_layer(ranks: Of, name: str, runs: str) -> None:
    torch.manual_seed(0)
    layer, layout = LAYERS[name](), RUNS[runs]
    x = torch.randn(2, N, 24, requires_grad=True)
    results = ranks(len(layout)).run(sharded.run_layer, layer, x.detach(), layout)
    compare(results, layout, [layer], layer(x), x)


@pytest.mark.parametrize("whole", [False, True], ids=["over ranks", "whole"])
def test_cross_attention_reads_a_context_over_ranks_or_whole(ranks: Of, whole: bool) -> None:
    torch.manual_seed(0)
    layer, layout = qkv.CrossAttention(24, 6, context_dim=10, num_kv_heads=2), ragged(N, 3)
    x, context = torch.randn(2, N, 24, requires_grad=True), torch.randn(2, 17, 10)
    other = None if whole else ragged(17, 3, 1)
    options = {"mask": Mask.padding(torch.tensor([17, 5]))}
    results = [
        *ranks(3).run(run_with_options, layer, x.detach(), layout, context, other, options),
    ]
    compare(results, layout, [layer], layer(x, context, **options), x)


def run_with_options(
    layer: nn.Module, x: Tensor, layout: Any, context: Tensor | None, other: Any, options: dict[str, Any]
) -> dict[str, Any]:
    return sharded.run_layer(layer, x, layout, context, other, **options)


def test_masks_biases_and_positions_of_a_call(ranks: Of) -> None:
    """Masks and biases are of all tokens, positions of those of the rank."""
    torch.manual_seed(0)
    layer, layout = qkv.Attention(24, 6, rotary=qkv.RotaryEmbedding(4)), ragged(N, 3)
    x, bias = torch.randn(2, N, 24, requires_grad=True), torch.randn(1, 6, N, N)
    keep = torch.rand(2, N) < 0.7
    options = {"mask": Mask.padding(keep) & Mask.causal(window=9), "bias": bias}
    results = ranks(3).run(run_with_options, layer, x.detach(), layout, None, None, options)
    compare(results, layout, [layer], layer(x, **options), x)


def test_a_layer_that_reads_the_keys_of_another(ranks: Of) -> None:
    torch.manual_seed(0)
    first = qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4))
    second = qkv.CrossLayerAttention(24, 6, num_kv_heads=2, mask=Mask.causal(), rotary=qkv.RotaryEmbedding(4))
    layout, x = ragged(N, 3), torch.randn(2, N, 24, requires_grad=True)
    results = ranks(3).run(run_reader, first, second, x.detach(), layout)
    cache = qkv.KVCache()
    compare(results, layout, [first, second], second(first(x, cache=cache), cache=cache), x)


def run_reader(first: nn.Module, second: nn.Module, x: Tensor, layout: Any) -> dict[str, Any]:
    return sharded.run_layer(first, x, layout, reader=second)


def _call(change: str) -> str:
    """A call that is wrong on all ranks."""
    tokens = parallel.Tokens.even(20, mesh())
    layer, x = qkv.CausalAttention(24, 6), tokens.take(torch.randn(1, 20, 24))
    options: dict[str, Any] = {"tokens": tokens}
    if change == "rows":
        x = x[:, 1:]
    elif change == "width":
        x = x[..., 1:]
    elif change == "tokens":
        options["tokens"] = 20
    elif change == "context tokens alone":
        options = {"context_tokens": tokens}
    elif change == "context tokens":
        options["context_tokens"] = tokens
    elif change == "no context tokens":
        layer = qkv.CrossAttention(24, 6)
        options["context"] = x
    elif change == "cache":
        options["cache"] = qkv.SlidingKVCache(4)
    elif change == "filled cache":
        options["cache"] = qkv.KVCache()
        layer(x, cache=options["cache"])
    elif change == "cache without keys":
        layer = qkv.CrossLayerAttention(24, 6)
        options["cache"] = qkv.KVCache()
    elif change == "cache of one rank":
        cache = qkv.KVCache()
        with torch.no_grad():
            layer(x, tokens=tokens, cache=cache)
            layer(x[:, :1], cache=cache)
    elif change == "positions":
        options["positions"] = tokens.positions
    elif change == "positions and length":
        layer = qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4, scaling=SCALING))
        options["positions"] = tokens.positions
    elif change == "latent cache":
        layer = qkv.LatentAttention(24, 6, kv_rank=8, nope_dim=4)
        options["cache"] = qkv.LatentKVCache()
    layer(x, **options)
    return "none"


MESSAGES = {
    "rows": r"CausalAttention: x must have the \d rows that the layout gives rank \d of 3; got \d. Use tokens.take",
    "width": r"CausalAttention: x must be .*24",
    "tokens": r"CausalAttention: tokens must be a qkv.parallel.Tokens or None; got int",
    "context tokens alone": r"context_tokens need tokens, the layout of x; got None",
    "context tokens": r"context_tokens must be None in self-attention; got Tokens\(20 over 3 ranks",
    "no context tokens": r"context_tokens must say which tokens of the context this rank has; got None",
    "cache": r"cache must be a KVCache or None in a call over ranks, .*; got SlidingKVCache",
    "filled cache": r"cache must have 0 tokens before this call over ranks: be new, .*; got one of [67]",
    "cache without keys": r"cache must have [67] tokens before this call over ranks: .*; got one of 0",
    "cache of one rank": r"cache must not be one that a call over ranks has filled, which has the keys of one rank",
    "positions": r"positions rotate queries and keys, so the layer needs a rotary",
    "positions and length": r"positions must be None in a call over ranks with a scaling that depends on the length",
    "latent cache": r"LatentAttention: cache must be None in a call over ranks; got LatentKVCache",
}


def test_errors_of_layers_are_raised_on_all_ranks(ranks: Of) -> None:
    for change, message in MESSAGES.items():
        for one in ranks(3).refused(_call, change):
            assert re.search(message, one.message), f"{change}: {one.message}"
