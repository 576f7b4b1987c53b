"""Llama and its descendants: separate projections for q, k and v, or a packed one (Phi-3)."""

import re
from typing import Any

import torch
from torch import Tensor

from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.layout import Layout
from qkv.convert.files.safetensors import TensorSpec


def convert_separate(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Pools a tensor of keys or values; copies any other."""
    if not (pooling.changes and family.is_kv(name)):
        return [Output(name, spec, (name,))]
    pooled = spec._replace(shape=(pooling.rows, *spec.shape[1:]))
    return [Output(name, pooled, (name,), lambda weight: pooling.pool(name, weight))]


def convert_packed(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Pools a tensor with the rows of all queries, then all keys, then all values; copies any other."""
    if not (pooling.changes and family.is_kv(name)):
        return [Output(name, spec, (name,))]
    pooled = spec._replace(shape=(pooling.query_rows + 2 * pooling.rows, *spec.shape[1:]))
    return [Output(name, pooled, (name,), lambda weight: pool_packed(pooling, name, weight))]


def pool_packed(pooling: Pooling, name: str, weight: Tensor) -> Tensor:
    """Pools the key and value rows of a packed tensor."""
    keys = pooling.heads.num_kv_heads * pooling.heads.head_dim
    q, k, v = weight.split([pooling.query_rows, keys, keys])
    return torch.cat([q, pooling.pool(f"{name}.k", k), pooling.pool(f"{name}.v", v)])


def _configure(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    return {**config, "num_key_value_heads": pooling.num_kv_heads}


SELF_ATTENTION = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.self_attn\.(.+)")
SEPARATE = Family(
    SELF_ATTENTION,
    re.compile(r"[kv]_proj\.(weight|bias)"),
    False,
    convert_separate,
    _configure,
    layout=Layout(),
)
PACKED = Family(
    SELF_ATTENTION,
    re.compile(r"qkv_proj\.(weight|bias)"),
    True,
    convert_packed,
    _configure,
    layout=Layout(("qkv_proj",)),
)
GEMMA = SEPARATE._replace(layout=Layout(norm_offset=1.0))
PHI = SEPARATE._replace(layout=Layout(out="dense"))
