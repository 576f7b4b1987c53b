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
    """Sliding window, the query's own key included; None without."""
    bias: bool
    """Whether the projections of q, k and v have biases."""
    qk_norm: bool
    """Whether queries and keys are normalised."""
    rotary: str
    """The rotary embedding in words; empty without."""
    parameters: int
    """Of all projections and norms of the attention."""
    kv_parameters: int
    """Of the key and value projections among them."""
    cross: bool = False
    """Whether keys and values come from an encoder."""
    latent: tuple[int, int] | None = None
    """Widths of the latent and the rotary key that a cache stores for all heads; None where it stores KV heads."""
    place: str = ""
    """The module that the layers are in, where a model has attention in several."""
    is_complete: bool = True
    """Whether a window or a rotary embedding that is not stated is one that the layer does not have."""

    @property
    def cached_widths(self) -> tuple[int, int]:
        """The two widths that a cache stores for each KV head, or for all."""
        return self.latent or (self.head_dim, self.value_dim)

    def with_kv_heads(self, num_kv_heads: int) -> "LayerAttention":
        """The layer with another number of KV heads."""
        kv_parameters = self.kv_parameters * num_kv_heads // self.num_kv_heads
        parameters = self.parameters - self.kv_parameters + kv_parameters
        return self._replace(num_kv_heads=num_kv_heads, parameters=parameters, kv_parameters=kv_parameters)


class Inspection(NamedTuple):
    """The attention of a model, as returned by `inspect_checkpoint`."""

    model_type: str
    dtype: str
    """Storage dtype of keys and values, as named in the file format, or in the configuration."""
    parameters: int
    """Of the whole model."""
    layers: tuple[LayerAttention, ...]
    """Layers with a KV cache: the decoder's self-attention, then its cross-attention."""
    encoder: tuple[LayerAttention, ...] = ()
    """Layers without one, which a conversion does not change: those of encoders, of texts, images or speech."""
    is_convertible: bool = True
    """Whether `convert_checkpoint` takes models of this type."""
    is_stored: bool = True
    """Whether parameters and dtype are those of files; else of the configuration."""

    @property
    def attention_parameters(self) -> int:
        """Of all attention layers."""
        return sum(layer.parameters for layer in (*self.encoder, *self.layers))

    @property
    def possible_kv_heads(self) -> list[int]:
        """The numbers of KV heads that all layers can be pooled to, including the current one; none without a cache."""
        return divisors(math.gcd(*(layer.num_kv_heads for layer in self.layers)))

    def with_kv_heads(self, num_kv_heads: int) -> "Inspection":
        """The model with another number of KV heads."""
        layers = tuple(layer.with_kv_heads(num_kv_heads) for layer in self.layers)
        saved = sum(layer.parameters for layer in self.layers) - sum(layer.parameters for layer in layers)
        return self._replace(layers=layers, parameters=self.parameters - saved)
