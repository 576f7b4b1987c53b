"""Converts a Llama of 1.5 GB in 4 shards: ``python tests/convert/large.py``.

Prints the time, and by how much the largest resident set of the converting process exceeds that of an interpreter with
torch and transformers loaded; then compares the result with the means of the groups, by numpy, and loads it with
transformers.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYERS, WIDTH, HEADS, HEAD, GROUPS, MLP, WORDS, SHARDS = 24, 1536, 24, 64, 4, 4096, 32000, 4

CONVERT = """
import re, sys, time
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from qkv.convert import convert_checkpoint
torch.set_num_threads(1)
def resident(which):
    return int(re.search(which + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before, started = resident("VmRSS"), time.perf_counter()
Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
convert_checkpoint(sys.argv[1], sys.argv[2], int(sys.argv[3]))
print(time.perf_counter() - started, (resident("VmHWM") - before) * 1024)
"""
"""Arguments: source, result, KV heads. Prints seconds, and the bytes by which memory grew at its peak (Linux)."""


def make(folder: Path) -> int:
    """Writes the checkpoint, a shard at a time, and returns its size."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": HEAD,
        "intermediate_size": MLP,
        "vocab_size": WORDS,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    parts = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    parts |= {"mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP)}
    parts |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    shapes |= {f"model.layers.{layer}.{n}.weight": shape for layer in range(LAYERS) for n, shape in parts.items()}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    names, generator = list(shapes), torch.Generator().manual_seed(0)
    weight_map, size = {}, 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        tensors = {n: torch.randn(shapes[n], generator=generator).mul_(WIDTH**-0.5).bfloat16() for n in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def check(source: Path, out: Path) -> int:
    """Compares all tensors and returns how many were pooled."""
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    pooled = 0
    for file in sorted(set(weight_map.values())):
        with safe_open(source / file, "pt") as before, safe_open(out / file, "pt") as after:
            assert set(before.keys()) == set(after.keys())
            for name in before.keys():  # noqa: SIM118
                wanted = before.get_tensor(name)
                if ".k_proj." in name or ".v_proj." in name:
                    heads = wanted.float().numpy().reshape(GROUPS, HEADS // GROUPS, HEAD, WIDTH)
                    a, b, c, d, e, f = (heads[:, i] for i in range(6))
                    mean = (((a + b) + (c + d)) + (e + f)) / np.float32(6)
                    wanted = torch.from_numpy(mean).reshape(-1, WIDTH).bfloat16()
                    pooled += 1
                assert torch.equal(after.get_tensor(name), wanted), name
    return pooled


def main() -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        size = make(source)
        command = [sys.executable, "-c", CONVERT, str(source), str(out), str(GROUPS)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        seconds, peak = float(printed[0]), int(printed[1]) / 2**20
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards: {seconds:.1f} s, peak {peak:.1f} MiB above the interpreter")
        print(f"{check(source, out)} tensors are the rounded means of their groups, all others the bytes they were")
        model, loading_info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(loading_info.values()), loading_info
        logits = model(torch.arange(7)[None]).logits
        print(f"loaded by transformers with {model.config.num_key_value_heads} KV heads; logits {tuple(logits.shape)}")
        assert logits.isfinite().all()


if __name__ == "__main__":
    main()
