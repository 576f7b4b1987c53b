"""T5, BART and their descendants: the decoder's keys and values are pooled, the encoder is unchanged."""

import re
from typing import Any

from qkv.convert.families.family import Family, Pooling
from qkv.convert.families.llama import convert_separate
from qkv.integrations.transformers.grouped_decoders import CLASS_PREFIX, MODEL_TYPES, TYPE_PREFIX


def _configure(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    """The configuration of our model type: transformers' own has no ``num_key_value_heads``."""
    if not pooling.changes:
        return config
    model_type = TYPE_PREFIX + hf_config.model_type.removeprefix(TYPE_PREFIX)
    classes = [CLASS_PREFIX + name.removeprefix(CLASS_PREFIX) for name in hf_config.architectures or []]
    return {
        **config,
        "model_type": model_type,
        "architectures": classes or None,
        "num_key_value_heads": pooling.num_kv_heads,
    }


T5 = Family(
    re.compile(r"decoder\.block\.(\d{1,9})\.layer\.0\.SelfAttention\.([qkvo]\.weight)"),
    re.compile(r"[kv]\.weight"),
    False,
    convert_separate,
    _configure,
    cross=re.compile(r"decoder\.block\.(\d{1,9})\.layer\.1\.EncDecAttention\.([qkvo]\.weight)"),
    encoder=re.compile(r"encoder\.block\.(\d{1,9})\.layer\.0\.SelfAttention\.([qkvo]\.weight)"),
)
BART = Family(
    re.compile(r"(?:model\.)?decoder\.layers\.(\d{1,9})\.self_attn\.(.+)"),
    re.compile(r"[kv]_proj\.(weight|bias)"),
    False,
    convert_separate,
    _configure,
    cross=re.compile(r"(?:model\.)?decoder\.layers\.(\d{1,9})\.encoder_attn\.(.+)"),
    encoder=re.compile(r"(?:model\.)?encoder\.layers\.(\d{1,9})\.self_attn\.(.+)"),
)
ENCODER_DECODERS = {
    prefix + model_type: T5 if model_type in ("t5", "mt5") else BART
    for prefix in ("", TYPE_PREFIX)
    for model_type in MODEL_TYPES
}
"""Families by ``model_type``, transformers' and ours."""
