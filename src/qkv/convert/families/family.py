"""`Family`: where the models of one type keep their heads, and how they say another number of them.

A family knows which tensors belong to the attention of which layer, what becomes of each tensor, and how the
configuration changes. Shapes are not looked at here: `transformers_schema` holds source and result to what
transformers' models have.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from qkv.convert.families.layout import Layout
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.pooling import How, pool_heads


class Output(NamedTuple):
    """A tensor of the result."""

    name: str
    spec: TensorSpec
    sources: tuple[str, ...]
    """The tensors of the checkpoint that it is made from."""
    compute: Callable[..., Tensor] | None = None
    """Makes it from their values; None where it is the only source as it stands."""


class Pooling(NamedTuple):
    """What `pool_heads` is to do."""

    heads: Heads
    """Before."""
    num_kv_heads: int
    """After."""
    how: How
    seed: int

    def pool(self, name: str, weight: Tensor) -> Tensor:
        """Pools keys or values; what is drawn depends on the name."""
        seed = zlib.crc32(name.encode(), self.seed & 0xFFFFFFFF)
        return pool_heads(weight, self.heads.num_kv_heads, self.num_kv_heads, how=self.how, seed=seed)

    @property
    def query_rows(self) -> int:
        return self.heads.num_heads * self.heads.head_dim

    @property
    def rows(self) -> int:
        """Of keys, or of values, after."""
        return self.num_kv_heads * self.heads.head_dim

    @property
    def changes(self) -> bool:
        return self.num_kv_heads != self.heads.num_kv_heads


class Family(NamedTuple):
    """The models of one ``model_type``."""

    attention: re.Pattern[str]
    """Of the names of tensors of a layer's attention: the number of the layer, and the rest of the name."""
    holds_kv: re.Pattern[str]
    """Of those rests whose rows are keys or values, among others if packed."""
    is_packed: bool
    """Whether queries, keys and values are one tensor."""
    convert: Callable[["Family", str, TensorSpec, Pooling], list[Output]]
    """What becomes of a tensor."""
    configure: Callable[[dict[str, Any], Any, Pooling], dict[str, Any]]
    """The new configuration, from what the old one says and what transformers makes of it."""
    windowed: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    """The configuration with a window in every layer, where it can express one."""
    layout: Layout | None = None
    """Of the projections, where heads can be aligned."""
    cross: re.Pattern[str] | None = None
    """As ``attention``, from a decoder to an encoder."""
    encoder: re.Pattern[str] | None = None
    """As ``attention``, of an encoder, which is not converted."""

    def part(self, name: str) -> tuple[int, str] | None:
        """Layer and rest of the name of a tensor that belongs to an attention that is converted."""
        match = self.attention.fullmatch(name) or (self.cross and self.cross.fullmatch(name))
        return None if match is None else (int(match[1]), match[2])

    def is_kv(self, name: str) -> bool:
        """Whether a tensor holds keys or values."""
        part = self.part(name)
        return part is not None and self.holds_kv.fullmatch(part[1]) is not None
