"""qkv for torch: `accelerate` routes calls of its attention, `varlen_attn` is its API of packed sequences."""

from qkv.integrations.torch.accelerate import accelerate as accelerate
from qkv.integrations.torch.varlen import AuxRequest as AuxRequest
from qkv.integrations.torch.varlen import varlen_attn as varlen_attn

__all__ = [
    "AuxRequest",
    "accelerate",
    "varlen_attn",
]
