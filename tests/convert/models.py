"""Tiny random models of each family, saved as transformers saves them."""

import hashlib
from pathlib import Path
from typing import Any

import torch

SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
LLAMA = {**SIZES, **HEADS, "intermediate_size": 48, "max_position_embeddings": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "attention_bias": True},
    "mistral": {**LLAMA, "sliding_window": 5},
    "ministral": {
        **LLAMA,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
    },
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 12},
    "gemma": {**LLAMA, "head_dim": 16},
    "gemma2": {**LLAMA, "head_dim": 16, "sliding_window": 5},
    "gemma3_text": {**LLAMA, "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": LLAMA,
    "phi": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "starcoder2": LLAMA,
    "gpt2": {"vocab_size": 40, "n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 40, "n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "multi_query": False},
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
}
"""What each model is built with: 8 query heads, 8 KV heads."""

IDS = torch.tensor([[3, 9, 27, 11, 33, 19, 17, 2, 30, 5, 7, 1]])


def build(family: str, **changes: Any) -> Any:
    """A random model whose attention is far from uniform, and whose norms and biases are all in use."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model


def save(
    folder: Path, family: str = "llama", *, shards: str = "1GB", dtype: Any = torch.float32, **changes: Any
) -> Path:
    """Saves a random model and an unrelated file, and returns the folder."""
    model = build(family, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "notes.txt").write_text("kept")
    return folder


def load(folder: Path) -> Any:
    """The model as loaded by transformers, which must find each of its tensors and no others."""
    from transformers import AutoModelForCausalLM

    model, loading_info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading_info.values()), loading_info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def digest(folder: Path) -> dict[str, str]:
    """The bytes of a folder's files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
