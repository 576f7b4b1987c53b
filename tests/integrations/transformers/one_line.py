"""Small models of transformers, as `accelerate` finds them: on their own attention."""

from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
STEPS = 5
"""New tokens of a generation."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

GROUPS = {"num_key_value_heads": 2}
NARROW = {"head_dim": 8, "sliding_window": 5, **GROUPS}
HALVES = {
    **{f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_model": 32,
    "decoder_start_token_id": 2,
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPS,
    "qwen3": {"head_dim": 8, **GROUPS},
    "gemma3_text": NARROW,
    "gpt2": {},
    "gpt_neox": {},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": HALVES,
}


def model(kind: str = "llama", **options: Any) -> Any:
    """A model with a head for tokens, whose next tokens are far from equally likely."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **TOKENS, **DECODERS.get(kind, {}), **options})
    kinds = transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM
    found = kinds[0 if kind == "bert" else 1 if config.is_encoder_decoder else 2].from_config(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return found


def generated(of: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    """Greedy tokens, and the cache."""
    keep = {} if ids is not IDS else {"attention_mask": LEFT}
    steps = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    return of.generate(ids, **keep, **{**steps, **options})
