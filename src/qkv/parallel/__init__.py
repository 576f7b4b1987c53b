"""Attention over the ranks of a ``torch.distributed`` mesh."""

from qkv.parallel.attention import attention as attention
from qkv.parallel.attention import attention_with_lse as attention_with_lse
from qkv.parallel.attention import explain as explain
from qkv.parallel.attention import merge as merge
from qkv.parallel.tokens import WHOLE as WHOLE
from qkv.parallel.tokens import Tokens as Tokens

__all__ = ["WHOLE", "Tokens", "attention", "attention_with_lse", "explain", "merge"]
