"""The attention layers and `RotaryEmbedding`."""

from qkv.layers.attention import Attention as Attention
from qkv.layers.named import CausalAttention as CausalAttention
from qkv.layers.named import CrossAttention as CrossAttention
from qkv.layers.named import GroupedQueryAttention as GroupedQueryAttention
from qkv.layers.named import MultiHeadAttention as MultiHeadAttention
from qkv.layers.named import MultiQueryAttention as MultiQueryAttention
from qkv.layers.named import ScaledDotProductAttention as ScaledDotProductAttention
from qkv.layers.named import SlidingWindowAttention as SlidingWindowAttention
from qkv.layers.rotary import RotaryEmbedding as RotaryEmbedding
