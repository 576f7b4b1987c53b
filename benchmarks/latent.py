"""A decoding step of latent attention, of the sizes of DeepSeek-V2-Lite, against transformers' module.

    python benchmarks/latent.py [THREADS]      measures, prints, and writes results/PROCESSOR/latent.json

Both have the same weights and 4096 tokens in their caches. The attention of the absorbed form alone is beside its two
limits: reading each latent once, and its multiplications.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import limits, machine
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

import qkv
from qkv.bench.timing import interleaved

CONTEXT, HEADS, RANK, ROPE = 4096, 16, 512, 64
ROUNDS = 7


def module(dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformers' attention, and its rotary embedding."""
    config = DeepseekV3Config(hidden_size=2048, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return DeepseekV3Attention(config, 0).to(dtype).eval(), DeepseekV3RotaryEmbedding(config)


def step_of_transformers(attention: Any, rotary: Any, x: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """A step of transformers, whose cache has the latents."""
    cache = DynamicCache(config=attention.config)
    cache.update(*latents.split([RANK, ROPE], dim=3), 0)
    positions = rotary(x, torch.tensor([[CONTEXT]]))

    def step() -> Tensor:
        out: Tensor = attention(x, position_embeddings=positions, attention_mask=None, past_key_values=cache)[0]
        cache.crop(-1)
        return out

    return step


def step_of_qkv(attention: Any, x: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """A step of `LatentAttention`."""
    layer, cache = qkv.LatentAttention.from_transformers(attention), qkv.LatentKVCache(capacity=CONTEXT + 1)
    cache.append(*latents.split([RANK, ROPE], dim=3))

    def step() -> Tensor:
        out: Tensor = layer(x, cache=cache)
        cache.crop(CONTEXT)
        return out

    return step


@torch.no_grad()
def main() -> None:
    """Measures fp32 and bf16."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    bounds = limits.measure(torch.get_num_threads())
    results = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        attention, rotary = module(dtype)
        x, latents = torch.randn(1, 1, 2048).to(dtype), torch.randn(1, 1, CONTEXT, RANK + ROPE).to(dtype)
        absorbed = torch.randn(1, HEADS, 1, RANK + ROPE).to(dtype), latents, latents[..., :RANK]
        calls: dict[str, Callable[[], object]] = {
            "step of transformers": step_of_transformers(attention, rotary, x, latents),
            "step of qkv": step_of_qkv(attention, x, latents),
            "attention of the step": functools.partial(qkv.attention, *absorbed),
        }
        times = interleaved(calls, rounds=ROUNDS)
        seconds = times["attention of the step"]["median_us"] / 1e6
        read = latents.nbytes / seconds / 1e9
        multiplied = 2 * HEADS * CONTEXT * (2 * RANK + ROPE) / seconds / 1e9
        results.append({"dtype": name, "times": times, "read_gb_per_s": read, "gflops": multiplied})
        for call, spread in times.items():
            print(f"{name}  {call:<22} {spread['median_us'] / 1e3:9.2f} ms")
        ratio = times["step of transformers"]["median_us"] / times["step of qkv"]["median_us"]
        peak = bounds["bf16_gflops"] if name == "bf16" and bounds["bf16_gflops"] else bounds["fp32_gflops"]
        print(f"{name}  {ratio:.0f} times as fast; {read:.1f} GB/s of {bounds['read_gb_per_s']}; ", end="")
        print(f"{multiplied:.0f} GF/s of {peak}", flush=True)
    machine.save("latent", {"limits": bounds, "measurements": results})


if __name__ == "__main__":
    main()
