"""The attention layers, rotary embeddings and position biases."""

from qkv.layers.attention import Attention as Attention
from qkv.layers.cross_layer import CrossLayerAttention as CrossLayerAttention
from qkv.layers.differential import DifferentialAttention as DifferentialAttention
from qkv.layers.latent import LatentAttention as LatentAttention
from qkv.layers.named import CausalAttention as CausalAttention
from qkv.layers.named import CrossAttention as CrossAttention
from qkv.layers.named import GroupedQueryAttention as GroupedQueryAttention
from qkv.layers.named import MultiHeadAttention as MultiHeadAttention
from qkv.layers.named import MultiQueryAttention as MultiQueryAttention
from qkv.layers.named import ScaledDotProductAttention as ScaledDotProductAttention
from qkv.layers.named import SlidingWindowAttention as SlidingWindowAttention
from qkv.layers.position_bias import ContinuousWindowPositionBias as ContinuousWindowPositionBias
from qkv.layers.position_bias import RelativePositionBias as RelativePositionBias
from qkv.layers.position_bias import WindowPositionBias as WindowPositionBias
from qkv.layers.rotary import RotaryEmbedding as RotaryEmbedding
from qkv.layers.rotary_2d import RotaryEmbedding2d as RotaryEmbedding2d
from qkv.layers.rotary_scaling import RotaryScaling as RotaryScaling

__all__ = [
    "Attention",
    "CausalAttention",
    "ContinuousWindowPositionBias",
    "CrossAttention",
    "CrossLayerAttention",
    "DifferentialAttention",
    "GroupedQueryAttention",
    "LatentAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RelativePositionBias",
    "RotaryEmbedding",
    "RotaryEmbedding2d",
    "RotaryScaling",
    "ScaledDotProductAttention",
    "SlidingWindowAttention",
    "WindowPositionBias",
]
