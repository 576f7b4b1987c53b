"""`RotaryEmbedding`: rotary position embedding of queries and keys."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qkv.arguments import require_count, require_finite, require_flag, require_positive
from qkv.layers.arguments import require_vector
from qkv.layers.constants import Numbers, constant


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by ``position * base ** (-2 i / rotary_dim)``: scores then depend on distances only.

    Args:
        head_dim: width of a head.
        base: base of the frequencies, ``theta`` in most configurations.
        rotary_dim: number of leading channels to rotate, even; all if None.
        interleaved: pairs are ``(0, 1), (2, 3), ...`` (RoFormer, GPT-J) if True, ``(i, i + rotary_dim / 2)``
            (GPT-NeoX, Llama and nearly all checkpoints of transformers) if False.
        position_scale: factor of the positions; ``1 / s`` interpolates to s times the trained length.
        frequencies: ``(rotary_dim / 2,)`` numbers instead of those from ``base``: for Llama 3, YaRN and others.

    The module has no state: frequencies are computed from these arguments, in fp32 on the device of x, so that casts,
    ``meta`` construction and checkpoints do not affect them.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a rotary_dim that is odd or larger than head_dim, and frequencies of another length or on
            ``meta``.

    Example:
        >>> import torch, qkv
        >>> rotary = qkv.RotaryEmbedding(8)
        >>> rotary(torch.randn(1, 2, 5, 8), offset=3).shape
        torch.Size([1, 2, 5, 8])

    Source: RoFormer, section 3.2; rotation in fp32 whatever the dtype, where transformers rotates in the dtype of q.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        position_scale: float = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        caller = "RotaryEmbedding"
        require_count(caller, "head_dim", head_dim)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        require_count(caller, "rotary_dim", rotary_dim, 0)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"{caller}: rotary_dim must be even and at most head_dim={head_dim}; got {rotary_dim}.")
        require_positive(caller, "base", base)
        require_flag(caller, "interleaved", interleaved)
        require_finite(caller, "position_scale", position_scale)
        self.head_dim = head_dim
        self.base = base
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.position_scale = position_scale
        self._custom: Numbers | None = None
        if frequencies is not None:
            given = require_vector(caller, "frequencies", frequencies, rotary_dim // 2, "one per pair of channels")
            self._custom = given._replace(dtype=torch.float32)

    @property
    def frequencies(self) -> Tensor:
        """``(rotary_dim / 2,)``, the angle by which each pair of channels rotates per position, on the CPU."""
        return self._frequencies(torch.device("cpu")).clone()

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Rotates ``x (B, H, L, head_dim)``, whose token i has position ``i + offset``.

        Args:
            x: queries or keys.
            offset: one for all tokens, or integers ``(L,)``, one per token, for packed sequences.

        Raises:
            ValueError: if the width of x is not head_dim.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"RotaryEmbedding: x must have width {self.head_dim}; got shape {tuple(x.shape)}.")
        positions = torch.arange(x.shape[-2], device=x.device) + offset
        angles = (positions.float() * self.position_scale)[:, None] * self._frequencies(x.device)
        return rotate(x, angles.cos(), angles.sin(), interleaved=self.interleaved)

    def _frequencies(self, device: torch.device) -> Tensor:
        """Frequencies in fp32, regardless of the dtype of the module: bf16 represents integers up to 256 only."""
        if self._custom is not None:
            return self._custom.on(device)
        return constant(_geometric, self.base, self.rotary_dim, device)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"


def _geometric(base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """``base ** (-2 i / rotary_dim)`` for each pair i."""
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    frequencies: Tensor = base**-exponent
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates the first 2 n channels of ``x (..., width)`` in pairs, in fp32, by the angles of ``cos, sin (..., n)``.

    Channels are paired as in `RotaryEmbedding`; the others are unchanged.
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    wide = rotated.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        rotated = torch.stack([first, second], dim=-1).flatten(-2)
    else:
        rotated = torch.cat([first, second], dim=-1)
    rotated = rotated.to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
