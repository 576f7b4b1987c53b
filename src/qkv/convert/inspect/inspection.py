"""`Inspection`: the attention of a model in numbers."""

import math
from typing import NamedTuple

from qkv.convert.heads.pooling import divisors


class LayerAttention(NamedTuple):
    """The attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of a query and a key."""
    value_dim: int
    window: int | None
    """Keys that a query sees, its own included; None where it sees all before it."""
    bias: bool
    """Whether queries, keys and values have one."""
    qk_norm: bool
    """Whether queries and keys are normalised."""
    rotary: str
    """How positions are rotated, in words; empty where they are not."""
    parameters: int
    """Of all its projections and norms."""
    kv_parameters: int
    """Of keys and values among them."""
    cross: bool = False
    """Whether keys and values come from an encoder."""

    def with_kv_heads(self, num_kv_heads: int) -> "LayerAttention":
        """The same with another number of KV heads."""
        kv_parameters = self.kv_parameters * num_kv_heads // self.num_kv_heads
        parameters = self.parameters - self.kv_parameters + kv_parameters
        return self._replace(num_kv_heads=num_kv_heads, parameters=parameters, kv_parameters=kv_parameters)


class Inspection(NamedTuple):
    """What `inspect_checkpoint` found."""

    model_type: str
    dtype: str
    """In which keys and values are stored, as the file format names it."""
    parameters: int
    """Of the whole model."""
    layers: tuple[LayerAttention, ...]
    """Those with a KV cache. Beside an encoder, the self-attention of the decoder and then its cross-attention."""
    encoder: tuple[LayerAttention, ...] = ()
    """The layers of an encoder, whose heads stay as they are."""

    @property
    def attention_parameters(self) -> int:
        """Of all attention."""
        return sum(layer.parameters for layer in (*self.encoder, *self.layers))

    @property
    def possible_kv_heads(self) -> list[int]:
        """The numbers of KV heads that all layers have or could be pooled to."""
        return divisors(math.gcd(*(layer.num_kv_heads for layer in self.layers)))

    def with_kv_heads(self, num_kv_heads: int) -> "Inspection":
        """The model as it would be with another number of KV heads."""
        layers = tuple(layer.with_kv_heads(num_kv_heads) for layer in self.layers)
        saved = sum(layer.parameters for layer in self.layers) - sum(layer.parameters for layer in layers)
        return self._replace(layers=layers, parameters=self.parameters - saved)
