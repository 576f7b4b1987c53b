"""A layer with rotary embedding against twenty lines by hand, and its rotary embedding alone.

    python benchmarks/rotary.py           measures, prints, and writes results/PROCESSOR/rotary.json
    python benchmarks/rotary.py shared    the same on a machine that others use: processor time of one thread

The first layer of the README: 512 wide, 8 heads on 2, fp32. By hand are torch's SDPA, a cache that concatenates, and
tables of cos and sin made once. `RotaryEmbedding` is measured by the kernel and by torch's operators, which make their
tables anew at each call.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import machine
from torch import Tensor, nn

import qkv
from qkv import kernels
from qkv.bench.timing import Spread, interleaved
from qkv.layers.rotary import rotate_both
from qkv.rotation import rotate_by_operators

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 512, 8, 2, 64
KEYS = (64, 512, 4096)
PROMPT = 2048
IS_SHARED = sys.argv[1:] == ["shared"]
STEPS = 16
"""Decoding steps of a measurement, after which a cache is as before."""


class ByOperators(qkv.RotaryEmbedding):
    """`qkv.RotaryEmbedding` by torch's operators, one call for queries and one for keys."""

    def forward(
        self,
        x: Tensor,
        offset: int | Tensor = 0,
        *,
        positions: Tensor | None = None,
        length: int | Tensor | None = None,
    ) -> Tensor:
        return rotate_by_operators(x, self._rotation(x, offset, positions, length))


class ByHand(nn.Module):
    """The layer as people write it."""

    def __init__(self, layer: qkv.Attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
        angles = torch.arange(2 * max(KEYS))[:, None] * qkv.RotaryEmbedding(HEAD_DIM).frequencies
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        cos, sin = self.cos[start : start + x.shape[2]], self.sin[start : start + x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        start = cache[0].shape[2] if cache else 0
        q, k = self.rotate(q, start), self.rotate(k, start)
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        cache[:] = [k, v]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected


def layers() -> tuple[qkv.Attention, qkv.Attention, ByHand]:
    """The layer by the kernel, by torch's operators, and by hand, with the same weights."""
    ours, before = (
        qkv.CausalAttention(WIDTH, HEADS, num_kv_heads=KV_HEADS, rotary=rotary(HEAD_DIM), bias=False).eval()
        for rotary in (qkv.RotaryEmbedding, ByOperators)
    )
    before.load_state_dict(ours.state_dict())
    return ours, before, ByHand(ours).eval()


def decoding(keys: int) -> dict[str, Spread]:
    """Steps of one token after so many, each candidate on a cache of its own."""
    ours, before, by_hand = layers()
    prompt, x = torch.randn(1, keys, WIDTH), torch.randn(1, 1, WIDTH)

    def by_cache(layer: qkv.Attention) -> Callable[[], Tensor]:
        cache = qkv.KVCache()
        layer(prompt, cache=cache)

        def steps() -> Tensor:
            out = [layer(x, cache=cache) for _ in range(STEPS)]
            cache.crop(keys)
            return out[-1]

        return steps

    start: list[Tensor] = []
    by_hand(prompt, start)

    def steps_by_hand() -> Tensor:
        cache = [*start]
        out: list[Tensor] = [by_hand(x, cache) for _ in range(STEPS)]
        return out[-1]

    return _compared({"by hand": steps_by_hand, "operators": by_cache(before), "kernel": by_cache(ours)}, STEPS)


def prefill() -> dict[str, Spread]:
    """A prompt at once."""
    ours, before, by_hand = layers()
    x = torch.randn(1, PROMPT, WIDTH)
    return _compared({"by hand": lambda: by_hand(x, []), "operators": lambda: before(x), "kernel": lambda: ours(x)}, 1)


def alone(tokens: int) -> dict[str, Spread]:
    """The rotation of queries and keys, as projections leave them."""
    ours, before, by_hand = layers()
    q, k = (torch.randn(1, tokens, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    kernel, operators, where = ours.get_submodule("rotary"), before.get_submodule("rotary"), {"offset": 100}
    candidates: dict[str, Callable[[], Tensor]] = {
        "by hand": lambda: (by_hand.rotate(q, 100), by_hand.rotate(k, 100))[0],
        "operators": lambda: rotate_both(operators, q, k, where)[0],
        "kernel": lambda: rotate_both(kernel, q, k, where)[0],
    }
    return _compared(candidates, 1)


def _compared(candidates: dict[str, Callable[[], Tensor]], calls: int) -> dict[str, Spread]:
    """The time of one of so many calls, after a check that all candidates compute the same."""
    first, *others = [run() for run in candidates.values()]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)
    measured = interleaved(candidates, clock=time.process_time if IS_SHARED else time.perf_counter)
    return {
        name: Spread(
            median_us=round(times["median_us"] / calls, 2),
            low_us=round(times["low_us"] / calls, 2),
            high_us=round(times["high_us"] / calls, 2),
        )
        for name, times in measured.items()
    }


def main() -> None:
    """Measures everything, in order."""
    assert kernels.absence() is None, kernels.absence()
    if IS_SHARED:
        torch.set_num_threads(1)
    with torch.inference_mode():
        results: dict[str, object] = {
            "clock": "processor time" if IS_SHARED else "wall",
            "rotation alone": {f"{tokens} tokens": alone(tokens) for tokens in (1, PROMPT)},
            "step": {f"{keys} keys": decoding(keys) for keys in KEYS},
            f"prefill of {PROMPT}": prefill(),
        }
    machine.save("rotary", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
