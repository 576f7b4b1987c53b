"""qkv where torch's own attention is called, and torch's calls of packed sequences."""

from qkv.integrations.torch.accelerate import accelerate as accelerate
from qkv.integrations.torch.varlen import AuxRequest as AuxRequest
from qkv.integrations.torch.varlen import varlen_attn as varlen_attn
