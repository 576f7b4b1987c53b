"""`factorise`: keys and values of all heads from a joint latent of low rank, and rotary keys that heads share."""

from typing import NamedTuple

import torch
from torch import Tensor


class LatentFactors(NamedTuple):
    """The projections of latent attention, fp64. C columns: of the input, and one more for biases."""

    q: Tensor
    """(H, nope_dim + rope_dim, C)"""
    down: Tensor
    """(rank + rope_dim, C), the latents' rows, then the rotary keys', whose pairs of channels are neighbours"""
    up: Tensor
    """(H, nope_dim + value_dim, rank)"""


class LatentWidths(NamedTuple):
    """The widths of latent attention that is made of grouped heads."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    """channels of a head that rotate"""
    rank: int
    """of the latents"""
    rope_heads: int
    """components of the keys at each frequency that still rotate, at most num_kv_heads"""

    @property
    def rope_dim(self) -> int:
        """Width of the rotary key, in whose pairs of channels each frequency comes ``rope_heads`` times in a row."""
        return self.rope_heads * self.rotary_dim

    @property
    def nope_dim(self) -> int:
        """Width of the part of a key that comes from latents: what never rotated, or all of it."""
        return self.head_dim - (self.rotary_dim if self.rope_heads == self.num_kv_heads else 0)

    def full_rank(self, columns: int) -> int:
        """The rank with which latents are exact, for inputs of ``columns``, the one for biases included."""
        return min(columns, self.num_kv_heads * (self.head_dim + self.value_dim) - self.rope_dim)


def factorise(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, weights: Tensor, widths: LatentWidths) -> LatentFactors:
    """Projections of latent attention that equal those of grouped heads, except for what the widths leave out.

    **Rotary keys.** Two channels that rotate together are one complex number. At one frequency, the keys of all G heads
    are a vector z of G such numbers, which rotate by the same factor. So a unitary U at each frequency, applied to z
    and to queries, leaves scores unchanged: ``conj(U q) @ U z = conj(q) @ z``. U consists of the singular vectors of
    the projections, so that uncorrelated inputs give uncorrelated components. The ``rope_heads`` largest at each
    frequency become the rotary key. The others, if any, no longer rotate, so their scores lose the distance.

    **Latents.** Values, and keys that do not rotate, are linear in the input. The best approximation of both at a given
    rank, after scaling keys to the norm of values, is the joint singular value decomposition.

    Args:
        q, k, v: ``(H, D, C)``, ``(G, D, C)`` and ``(G, Dv, C)``, fp64: rows of the projections by head.
        pairs: ``(F, 2)``, the channels of D that rotate together, by frequency.
        weights: ``(C,)``, the root mean square of each column's input, by which errors are weighed.
        widths: exact with all G components and full rank.

    Source: TransMLA (Meng et al. 2025), sections 4.2 and 4.3, which rotates with real orthogonal matrices; MHA2MLA (Ji
    et al. 2025) for the joint decomposition.
    """
    group, rope_heads = len(q) // len(k), widths.rope_heads
    z, z_q = _complex(k, pairs).transpose(0, 1), _complex(q, pairs)  # (F, G, C), (H, F, C)
    basis, _, _ = torch.linalg.svd(z * weights, full_matrices=False)
    components = basis.mH @ z
    rotary_keys = _interleaved(components[:, :rope_heads].flatten(0, 1))
    bases = basis.mH[:, :rope_heads].movedim(2, 0).repeat_interleave(group, dim=0)  # (H, F, rope_heads)
    rotary_queries = _interleaved((bases[..., None] * z_q[:, :, None]).flatten(1, 2))

    unrotated = (basis[:, :, rope_heads:] @ components[:, rope_heads:]).transpose(0, 1)  # (G, F, C)
    keys = k.clone()
    keys[:, pairs[:, 0]], keys[:, pairs[:, 1]] = unrotated.real, unrotated.imag
    rotating = set(pairs.flatten().tolist()) if rope_heads == len(k) else set()
    channels = [channel for channel in range(k.shape[1]) if channel not in rotating]
    down, up = _factorise_jointly(keys[:, channels], v, weights, widths.rank)
    return LatentFactors(
        torch.cat([q[:, channels], rotary_queries], dim=1),
        torch.cat([down, rotary_keys]),
        up.repeat_interleave(group, dim=0),
    )


def _factorise_jointly(k: Tensor, v: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(rank, C)`` and ``(G, D + Dv, rank)``, whose product is the best approximation of keys and values together."""
    is_zero = k.norm() <= v.norm() * torch.finfo(k.dtype).eps * k.shape[2]
    balance = torch.zeros_like(v.norm()) if is_zero else v.norm() / k.norm()
    rows = torch.cat([k * balance, v], dim=1)
    left, sizes, right = torch.linalg.svd(rows.flatten(0, 1) * weights, full_matrices=False)
    up = left[:, :rank].view(len(k), -1, rank).clone()
    up[:, : k.shape[1]] = 0 if is_zero else up[:, : k.shape[1]] / balance
    return sizes[:rank, None] * right[:rank] / weights, up


def _complex(rows: Tensor, pairs: Tensor) -> Tensor:
    """(heads, F, C): a complex number for each pair of channels of rows (heads, D, C)."""
    return torch.complex(rows[:, pairs[:, 0]], rows[:, pairs[:, 1]])


def _interleaved(numbers: Tensor) -> Tensor:
    """(..., 2 n, C): real and imaginary parts of complex numbers (..., n, C), interleaved."""
    return torch.stack([numbers.real, numbers.imag], dim=-2).flatten(-3, -2)
