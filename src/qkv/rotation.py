"""`Rotation`: the angles by which heads of queries and keys are rotated, and its definition in torch's operators.

`qkv.kernels.rotate` computes it by the kernel where possible.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Of the first 2 n channels of a head, pairs ``(x, y)`` become ``(cos x - sin y, cos y + sin x)``.

    The angle of pair i is ``float(position) * position_scale * frequencies[..., i]``, each product rounded to fp32; its
    cos and sin are multiplied by ``attention_factor``. Or cos and sin are given instead of angles. The fields
    are the arguments of the operator ``qkv::rotate`` after its tensors.
    """

    positions: Tensor | None = None
    """integers (L,), (B or 1, L), or (axes, B or 1, L); ``offset + offsets[b] + i`` for token i if None"""
    offset: int = 0
    offsets: Tensor | None = None
    """integers (B or 1,)"""
    axes: Tensor | None = None
    """int64 (n,), the axis of the positions by which each pair rotates"""
    frequencies: Tensor | None = None
    """float32 (n,), (L or 1, n) or (B or 1, L or 1, n)"""
    position_scale: float = 1.0
    attention_factor: float = 1.0
    cos: Tensor | None = None
    """(L or 1, n) or (B or 1, L or 1, n), as sin; with ``halves``, 2 n columns"""
    sin: Tensor | None = None
    halves: bool = False
    """whether cos and sin have a column for each channel: for those of x, then for those of y"""
    interleaved: bool = False
    """whether pairs are channels ``(2 i, 2 i + 1)``, else ``(i, i + n)``"""
    inverse: bool = False
    """whether x and y are multiplied by the transposed matrix instead, as gradients are"""


def pairs_of(rotation: Rotation) -> int:
    """n, the number of pairs. No property, as `tensors_of`."""
    if rotation.frequencies is not None:
        return rotation.frequencies.shape[-1]
    assert rotation.cos is not None
    return rotation.cos.shape[-1] // 2 if rotation.halves else rotation.cos.shape[-1]


def tensors_of(rotation: Rotation) -> list[Tensor]:
    """The tensors among the fields. No property, which Dynamo does not find on a named tuple before torch 2.11."""
    fields = (rotation.positions, rotation.offsets, rotation.axes, rotation.frequencies, rotation.cos, rotation.sin)
    return [field for field in fields if field is not None]


def positions_of(rotation: Rotation, x: Tensor) -> Tensor:
    """The positions of the tokens of ``x (..., L, width)``."""
    if rotation.positions is not None:
        return rotation.positions
    counted = torch.arange(rotation.offset, rotation.offset + x.shape[-2], device=x.device)
    return counted if rotation.offsets is None else rotation.offsets[:, None] + counted


def tables(rotation: Rotation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of the tokens of ``x (..., L, width)``: ``(L or 1, n)`` or ``(B or 1, L or 1, n)``."""
    if rotation.cos is not None:
        assert rotation.sin is not None
        return rotation.cos, rotation.sin
    positions = positions_of(rotation, x)
    if rotation.axes is None:
        coordinates = positions[..., None].float()
    else:
        coordinates = positions[rotation.axes].movedim(0, -1).float()
    assert rotation.frequencies is not None
    if rotation.position_scale != 1.0:
        coordinates = coordinates * rotation.position_scale
    angles = coordinates * rotation.frequencies
    cos, sin = angles.cos(), angles.sin()
    if rotation.attention_factor != 1.0:
        cos, sin = cos * rotation.attention_factor, sin * rotation.attention_factor
    return cos, sin


def rotate_by_tables(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """Rotates ``x (..., width)`` in fp32 or higher, by tables that broadcast to ``(..., n)``, or 2 n with halves."""
    pairs = pairs_of(rotation)
    rotated, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    wide = rotated.to(torch.promote_types(x.dtype, torch.float32))
    if rotation.interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    cos_1, cos_2 = cos.chunk(2, dim=-1) if rotation.halves else (cos, cos)
    sin_1, sin_2 = sin.chunk(2, dim=-1) if rotation.halves else (sin, sin)
    if rotation.inverse:
        sin_1, sin_2 = -sin_2, -sin_1
    first, second = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    if rotation.interleaved:
        rotated = torch.stack([first, second], dim=-1).reshape(*first.shape[:-1], 2 * pairs)
    else:
        rotated = torch.cat([first, second], dim=-1)
    rotated = rotated.to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def rotate_by_operators(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the tokens of ``x (B, H, L, width)`` by torch's operators."""
    cos, sin = (table[:, None] if table.dim() == 3 else table for table in tables(rotation, x))
    return rotate_by_tables(x, cos, sin, rotation)
