"""`Family`: the tensor names of one model type, and how its tensors and configuration change with fewer KV heads.

Shapes are not checked here: `transformers_schema` compares source and result with the models of transformers.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from qkv.convert.families.layout import Layout
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.pooling import PoolMethod, pool_heads


class Output(NamedTuple):
    """A tensor of the result."""

    name: str
    spec: TensorSpec
    sources: tuple[str, ...]
    """Names of the input tensors of ``compute``."""
    compute: Callable[..., Tensor] | None = None
    """Computes it from the sources; None where it is a copy of the only source."""


class Pooling(NamedTuple):
    """The arguments of `pool_heads` for a model."""

    heads: Heads
    """Head counts before pooling."""
    num_kv_heads: int
    """KV heads after pooling."""
    how: PoolMethod
    seed: int

    def pool(self, name: str, weight: Tensor) -> Tensor:
        """Pools the rows of keys or values. Random draws are seeded by the tensor's name."""
        seed = zlib.crc32(name.encode(), self.seed & 0xFFFFFFFF)
        return pool_heads(weight, self.heads.num_kv_heads, self.num_kv_heads, how=self.how, seed=seed)

    @property
    def query_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads.num_heads * self.heads.head_dim

    @property
    def rows(self) -> int:
        """Rows of the key (or value) projection after pooling."""
        return self.num_kv_heads * self.heads.head_dim

    @property
    def changes(self) -> bool:
        """Whether the number of KV heads changes."""
        return self.num_kv_heads != self.heads.num_kv_heads


class Family(NamedTuple):
    """How the models of one ``model_type`` are converted."""

    attention: re.Pattern[str]
    """Matches the tensor names of attention layers; groups: layer number, name within the attention."""
    holds_kv: re.Pattern[str]
    """Matches names within the attention of tensors that contain keys or values (and queries, if packed)."""
    is_packed: bool
    """Whether one tensor holds queries, keys and values."""
    convert: Callable[["Family", str, TensorSpec, Pooling], list[Output]]
    """The outputs for a tensor of the checkpoint."""
    configure: Callable[[dict[str, Any], Any, Pooling], dict[str, Any]]
    """The new configuration, from the old ``config.json`` and transformers' configuration object."""
    set_window: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    """The configuration with a sliding window in every layer; None where ``set_windows`` does it, or none can."""
    set_windows: Callable[[dict[str, Any], Any, list[int | None]], dict[str, Any]] | None = None
    """The configuration with the window of each layer, one number or None, from the old ``config.json`` and
    transformers' configuration object; None where layers cannot differ."""
    layout: Layout | None = None
    """The layout of the projections; None where heads cannot be aligned or pruned."""
    cross: re.Pattern[str] | None = None
    """As ``attention``, for the decoder's cross-attention."""
    encoder: re.Pattern[str] | None = None
    """As ``attention``, for the encoder, which is not converted."""

    def split_name(self, name: str) -> tuple[int, str] | None:
        """Layer number and name within the attention; None for tensors outside of converted attention."""
        match = self.attention.fullmatch(name) or (self.cross and self.cross.fullmatch(name))
        return None if match is None else (int(match[1]), match[2])

    def is_kv(self, name: str) -> bool:
        """Whether a tensor contains keys or values."""
        part = self.split_name(name)
        return part is not None and self.holds_kv.fullmatch(part[1]) is not None
