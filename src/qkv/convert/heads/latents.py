"""`factorise`: keys and values of all heads from a joint latent of low rank, and rotary keys that heads share."""

from typing import NamedTuple

import torch
from torch import Tensor


class LatentFactors(NamedTuple):
    """The projections of latent attention, fp64. C columns: of the input, and one more for biases."""

    q: Tensor
    """(H, nope_dim + 2 n, C)"""
    down: Tensor
    """(rank + 2 n, C), the latents' rows, then the rotary keys', whose pairs of channels are neighbours"""
    up: Tensor
    """(H, nope_dim + value_dim, rank)"""
    frequency: Tensor
    """(n,), which of the layer's frequencies each pair of the rotary key has"""


def factorise(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, weights: Tensor, *, rank: int, n: int) -> LatentFactors:
    """Projections of latent attention that compute what those of grouped heads do, up to what is left out.

    **Rotary keys.** Two channels that rotate together are one complex number, and the keys of all G heads at one
    frequency a vector z of G of them, which rotate by the same factor. So a unitary U at each frequency, applied to z
    and to queries, leaves scores as they are: ``conj(U q) @ U z = conj(q) @ z``. U is chosen by the singular vectors of
    the projections: components are uncorrelated, for inputs that are. The n largest of all frequencies become the
    rotary key. The others, if any, lose their rotation, which changes scores by their distance.

    **Latents.** Keys that do not rotate, or no longer, and values are linear in the input. The best approximation of
    both of this rank, after scaling keys to the norm of values, is the joint singular value decomposition.

    Args:
        q, k, v: ``(H, D, C)``, ``(G, D, C)`` and ``(G, Dv, C)``, fp64: rows of the projections by head.
        pairs: ``(F, 2)``, the channels of D that rotate together, by frequency.
        weights: ``(C,)``, the root mean square of each column's input, by which errors are weighed.
        rank: of the latents, at most ``min(C, G * (D + Dv) - 2 n)``, which is exact.
        n: number of pairs of the rotary key; ``F * G`` is exact.

    Source: TransMLA (Meng et al. 2025), sections 4.2 and 4.3, which rotates with real orthogonal matrices and chooses
    the same number of components at each frequency; MHA2MLA (Ji et al. 2025) for the joint decomposition.
    """
    groups, group = len(k), len(q) // len(k)
    z, z_q = _complex(k, pairs).transpose(0, 1), _complex(q, pairs)  # (F, G, C), (H, F, C)
    basis, size, _ = torch.linalg.svd(z * weights, full_matrices=False)
    unitary = basis.mH
    is_rotary = torch.zeros(size.numel(), dtype=torch.bool)
    is_rotary[size.flatten().argsort(descending=True, stable=True)[:n]] = True
    is_rotary = is_rotary.view(size.shape)
    components = unitary @ z
    frequency, component = is_rotary.nonzero(as_tuple=True)
    rotary_keys = _interleaved(components[frequency, component])
    of_group = unitary[frequency, component].T.repeat_interleave(group, dim=0)  # (H, n)
    rotary_queries = _interleaved(of_group[:, :, None] * z_q[:, frequency])

    still = (basis @ (components * ~is_rotary[..., None])).transpose(0, 1)  # (G, F, C), what is left of each head
    channels = [*pairs[~is_rotary.all(dim=1)].flatten().tolist()]
    channels += [channel for channel in range(k.shape[1]) if channel not in pairs.flatten().tolist()]
    keys = k.clone()
    keys[:, pairs[:, 0]], keys[:, pairs[:, 1]] = still.real, still.imag
    keys = keys[:, channels]

    is_rounding = keys.norm() <= k.norm() * torch.finfo(k.dtype).eps * k.shape[2]
    balance = torch.zeros_like(v.norm()) if is_rounding else v.norm() / keys.norm()
    rows = torch.cat([keys * balance, v], dim=1)
    left, sizes, right = torch.linalg.svd(rows.flatten(0, 1) * weights, full_matrices=False)
    down = sizes[:rank, None] * right[:rank] / weights
    up = left[:, :rank].view(groups, -1, rank).clone()
    up[:, : len(channels)] = 0 if is_rounding else up[:, : len(channels)] / balance
    return LatentFactors(
        torch.cat([q[:, channels], rotary_queries], dim=1),
        torch.cat([down, rotary_keys]),
        up.repeat_interleave(group, dim=0),
        frequency,
    )


def _complex(rows: Tensor, pairs: Tensor) -> Tensor:
    """(heads, F, C): a complex number for each pair of channels of rows (heads, D, C)."""
    return torch.complex(rows[:, pairs[:, 0]], rows[:, pairs[:, 1]])


def _interleaved(numbers: Tensor) -> Tensor:
    """(..., 2 n, C): real and imaginary parts of complex numbers (..., n, C), in turns."""
    return torch.stack([numbers.real, numbers.imag], dim=-2).flatten(-3, -2)
