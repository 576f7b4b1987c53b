"""Small models of transformers, with random weights and on eager attention, by name."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from families.compare import draw_weights

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
BART = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
}


def decoder(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**SIZES, **HEADS, **options}), attn_implementation="eager"
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": decoder("llama"),
    "mistral": decoder("mistral", sliding_window=7),
    "qwen3": decoder("qwen3"),
    "gemma2": decoder("gemma2", sliding_window=7, query_pre_attn_scalar=8),
    "gpt_oss": decoder("gpt_oss", sliding_window=7, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=6, attn_implementation="eager")
    ),
    "gpt_neox": decoder("gpt_neox"),
    "deepseek_v3": decoder(
        "deepseek_v3", num_key_value_heads=6, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2,
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZES, num_attention_heads=6, attn_implementation="eager")
    ),
    "bart": lambda: transformers.BartModel(transformers.BartConfig(**BART, attn_implementation="eager")),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    draw_weights(model)
    return model
