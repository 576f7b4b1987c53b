"""`apply_rotary_pos_emb`, as transformers' function of that name, by the kernel."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qkv import kernels
from qkv.rotation import Rotation, rotate_by_tables

Apply = Callable[..., tuple[Tensor, Tensor]]


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys: ``q * cos + rotate_half(q) * sin``, where ``rotate_half([x, y]) = [-y, x]``.

    Args:
        q, k: ``(B, heads, L, D)``; ``(B, L, heads, D)`` if ``unsqueeze_dim`` is 2. They may differ in heads.
        cos, sin: ``(B or 1, L, d)``, from the rotary embedding of a model, with a column for each of the first d
            channels of q and k; the others are unchanged.
        unsqueeze_dim: the dimension of heads in q and k.

    Returns:
        q and k, rotated, in their dtypes and shapes.

    Raises:
        RuntimeError: for shapes that do not fit together.

    Example:
        >>> import torch
        >>> from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
        >>> from qkv.integrations.transformers import apply_rotary_pos_emb
        >>> q, k = torch.randn(1, 8, 3, 64), torch.randn(1, 2, 3, 64)
        >>> cos, sin = LlamaRotaryEmbedding(LlamaConfig(head_dim=64))(q, torch.arange(3)[None])
        >>> q, k = apply_rotary_pos_emb(q, k, cos, sin)

    Source: ``transformers.models.llama.modeling_llama.apply_rotary_pos_emb`` and its copies in other models, whose d is
    D. They round each product and the sum, to the dtype that q and cos have in common; here all of it is in fp32, and
    rounded once, to the dtype of q. In fp32, the bits are the same.
    """
    rotation, heads = Rotation(cos=cos, sin=sin, halves=True), unsqueeze_dim % q.dim()
    if not (_fits(q, cos, heads) and _fits(k, cos, heads) and sin.shape == cos.shape):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate_by_tables(q, cos, sin, rotation), rotate_by_tables(k, cos, sin, rotation)
    x = [q, k] if heads == 1 else [q.transpose(1, 2), k.transpose(1, 2)]
    q, k = kernels.rotate(x, rotation)
    return (q, k) if heads == 1 else (q.transpose(1, 2), k.transpose(1, 2))


def _fits(x: Tensor, table: Tensor, heads: int) -> bool:
    """Whether the table has a row for each token of x and a column for each of its first channels."""
    if x.dim() != 4 or table.dim() != 3 or heads not in (1, 2):
        return False
    rows, tokens, columns = table.shape
    return rows in (1, x.shape[0]) and tokens == x.shape[3 - heads] and columns % 2 == 0 and columns <= x.shape[3]


@functools.lru_cache(maxsize=1024)
@torch.no_grad()
def is_usual(theirs: Apply, rotary_dim: int) -> bool:
    """Whether a rotation is that of Llama, of this many channels of 8: the same bits for some numbers."""
    q, k = torch.linspace(-2, 3, 2 * 3 * 8).view(1, 2, 3, 8), torch.linspace(3, -1, 3 * 8).view(1, 1, 3, 8)
    angles = torch.linspace(0, 5, 3 * rotary_dim // 2).view(1, 3, rotary_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        rotated = theirs(q, k, cos, sin, 1)
        transposed = theirs(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    except Exception:  # other arguments, or other shapes
        return False
    ours = apply_rotary_pos_emb(q, k, cos, sin)
    return (
        isinstance(rotated, tuple)
        and len(rotated) == len(transposed) == 2
        and all(map(torch.equal, rotated, ours))
        and all(torch.equal(x.transpose(1, 2), y) for x, y in zip(transposed, ours, strict=True))
    )
