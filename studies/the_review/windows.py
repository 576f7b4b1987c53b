"""Sliding windows: how far layers reach, what they cost as the text grows, and a cache that stops growing."""

from typing import Any

import torch
from settings import Settings
from torch import Tensor

import qkv
from qkv.bench.mechanisms import OURS, Mechanism, Sizes
from qkv.bench.peak_memory import peak_memory
from qkv.bench.timing import interleaved
from qkv.masks import Mask


def sliding_window(settings: Settings) -> dict[str, Any]:
    """Reach, time, memory and cache."""
    return {
        "reach": {"causal": reach(settings, causal=True), "both sides": reach(settings, causal=False)},
        "visible": visible(settings.window),
        "cost": cost(settings),
        "cache": cache(settings),
    }


def visible(window: int) -> dict[str, list[int]]:
    """Distances of the keys that the two forms of a window show to a query in the middle."""
    masks = {"both sides": Mask.sliding(window), "causal": Mask.causal(window)}
    return {
        name: [
            3 * window - key for key in mask.visible(6 * window, 6 * window)[0, 0, 3 * window].nonzero()[:, 0].tolist()
        ]
        for name, mask in masks.items()
    }


def reach(settings: Settings, *, causal: bool) -> dict[str, list[int]]:
    """How many positions a token in the middle influences in each layer of a stack with residual connections.

    By gradients, in fp64, whose smallest are not lost beside the residual; and by the bits of hidden states in fp32:
    how many change beyond the positions that windows reach, if this token changes.
    """
    window, depth = settings.window, settings.depth
    sides = ((window - 1), 0) if causal else (window // 2, window // 2)
    length = 2 * depth * window + 1
    token = length // 2
    torch.manual_seed(0)
    layers = [qkv.SlidingWindowAttention(16, 2, window, causal=causal) for _ in range(depth)]
    x = torch.randn(1, length, 16)
    changed = x.clone()
    changed[0, token] += 1
    expected, bits, outside = [], [], []
    with torch.no_grad():
        for number, (before, after) in enumerate(zip(stack(layers, x), stack(layers, changed), strict=True), 1):
            differs = (before != after)[0].any(-1)
            # A later position sees this token, and so does an earlier one where windows look ahead.
            first, last = token - number * sides[1], token + number * sides[0]
            differs_within = differs[first : last + 1]
            expected.append(last - first + 1)
            bits.append(int(differs_within.sum()))
            outside.append(int(differs.sum() - differs_within.sum()))
    wide = x.double().requires_grad_()
    gradients = [
        int(torch.autograd.grad(hidden[0, token].sum(), wide, retain_graph=True)[0][0].any(-1).sum())
        for hidden in stack([layer.double() for layer in layers], wide)
    ]
    return {"expected": expected, "gradients": gradients, "bits_inside": bits, "bits_outside": outside}


def stack(layers: list[qkv.SlidingWindowAttention], x: Tensor) -> list[Tensor]:
    """The hidden states after each layer."""
    found = []
    for layer in layers:
        x = x + layer(x)
        found.append(x)
    return found


def cost(settings: Settings) -> dict[str, Any]:
    """Time and peak memory of a forward and backward pass by length, of a window and of all earlier keys."""
    found: dict[str, Any] = {"lengths": list(settings.lengths), "time_us": {}, "peak_bytes": {}}
    calls, cases = {}, {}
    for name, mask in (("window", Mask.causal(settings.long_window)), ("causal", Mask.causal())):
        for length in settings.lengths:
            case = _mechanism(settings, mask, length, backward=True)
            forward = _mechanism(settings, mask, length, backward=False)
            cases[f"{name} {length}"] = case
            calls[f"{name} forward {length}"] = forward.prepare(OURS, forward.inputs())
            calls[f"{name} both {length}"] = case.prepare(OURS, case.inputs())
    times = interleaved(calls, rounds=settings.rounds, seconds_per_round=settings.seconds_per_round / 10)
    for name in ("window", "causal"):
        for passes in ("forward", "both"):
            found["time_us"][f"{name} {passes}"] = [times[f"{name} {passes} {length}"] for length in settings.lengths]
        found["peak_bytes"][name] = [peak_memory(cases[f"{name} {length}"], OURS) for length in settings.lengths]
    return found


def _mechanism(settings: Settings, mask: Mask, length: int, *, backward: bool) -> Mechanism:
    heads = settings.num_heads
    sizes = Sizes(1, length, heads, heads, settings.head_dim, settings.long_window, torch.float32, False, backward)
    return Mechanism("window", sizes, heads, heads, length, mask)


def cache(settings: Settings) -> dict[str, Any]:
    """Bytes of a cache that grows and of one that slides, after each number of tokens."""
    found: dict[str, Any] = {"tokens": list(settings.cached), "all": [], "window": []}
    caches = {"all": qkv.KVCache(), "window": qkv.SlidingKVCache(settings.cache_window)}
    step = min(settings.cached) // 2
    for tokens in range(step, max(settings.cached) + 1, step):
        k, v = torch.zeros(2, 1, 2, step, 16)
        for name, each in caches.items():
            each.append(k, v)
            if tokens in settings.cached:
                found[name].append(each.nbytes)
    return found
