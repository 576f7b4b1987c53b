"""`RotaryEmbedding`: positions as rotations of queries and keys."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by ``position * base ** (-2 i / rotary_dim)``, so that scores depend on distance alone.

    Args:
        head_dim: width of a head.
        base: base of the frequencies, ``theta`` in most configurations.
        rotary_dim: number of leading channels to rotate, even; all if None.
        interleaved: pairs are ``(0, 1), (2, 3), ...`` (RoFormer, GPT-J) if True, ``(i, i + rotary_dim / 2)``
            (GPT-NeoX, Llama and nearly all checkpoints of transformers) if False.
        position_scale: factor of the positions; ``1 / s`` interpolates to s times the trained length.
        frequencies: ``(rotary_dim / 2,)`` instead of those from ``base``, for Llama 3, YaRN and other schedules.
        device: of the frequencies.

    Raises:
        ValueError: for a rotary_dim that is odd or exceeds head_dim, and frequencies of another length.

    Example:
        >>> import torch, qkv
        >>> rotary = qkv.RotaryEmbedding(8)
        >>> rotary(torch.randn(1, 2, 5, 8), offset=3).shape
        torch.Size([1, 2, 5, 8])

    Source: RoFormer, section 3.2; rotation in fp32 whatever the dtype, where transformers rotates in the dtype of q.
    """

    frequencies: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        position_scale: float = 1.0,
        frequencies: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(
                f"RotaryEmbedding: rotary_dim must be even and at most head_dim={head_dim}; got {rotary_dim}."
            )
        if frequencies is None:
            exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
            frequencies = base**-exponent
        elif frequencies.shape != (rotary_dim // 2,):
            raise ValueError(
                f"RotaryEmbedding: frequencies must be ({rotary_dim // 2},), one a pair of channels; "
                f"got shape {tuple(frequencies.shape)}."
            )
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.position_scale = position_scale
        self.register_buffer("frequencies", frequencies.to(device=device, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Rotates ``x (B, H, L, head_dim)``, whose first token stands at position ``offset``.

        Raises:
            ValueError: when the width of x is not head_dim.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"RotaryEmbedding: x must have width {self.head_dim}; got shape {tuple(x.shape)}.")
        cos, sin = self._tables(x.shape[-2], offset)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def _tables(self, length: int, offset: int) -> tuple[Tensor, Tensor]:
        frequencies = self.frequencies.float()  # A module moved to bf16 would place position 257 at 256.
        positions = torch.arange(length, device=frequencies.device) + offset
        angles = (positions * self.position_scale)[:, None] * frequencies
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return f"{self.head_dim}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turns the first channels of ``x (..., width)`` in pairs, in fp32, by the angles of ``cos`` and ``sin (..., n)``.

    The 2 n channels are paired as `RotaryEmbedding` says; the others stay.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    wide = turned.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = torch.stack([first, second], dim=-1).flatten(-2)
    else:
        turned = torch.cat([first, second], dim=-1)
    turned = turned.to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
