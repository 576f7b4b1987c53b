"""`pool_heads`: merges the rows of each group of key/value heads into those of one head."""

from typing import Literal, get_args

import torch
from torch import Tensor

from qkv.arguments import require_int

PoolMethod = Literal["mean", "first", "random"]
ConversionMethod = Literal["mean", "first", "random", "aligned"]
"""For layers and models; aligning needs all projections of a layer."""


def pool_heads(
    weight: Tensor, num_kv_heads: int, new_kv_heads: int, *, how: PoolMethod = "mean", seed: int = 0
) -> Tensor:
    """Pools contiguous groups of ``num_kv_heads / new_kv_heads`` heads of a projection into one head each.

    Args:
        weight: ``(num_kv_heads * D, ...)``: weight or bias of a key or value projection, rows ordered by head.
        num_kv_heads: heads in ``weight``.
        new_kv_heads: heads in the result, a divisor. If equal to ``num_kv_heads``, returns ``weight`` itself.
        how: ``mean`` of the group, computed in fp32 (fp64 for fp64) and rounded once; the ``first`` head of it; or
            ``random``: new values from a normal distribution with the root mean square of ``weight``.
        seed: for ``random``.

    Returns:
        ``(new_kv_heads * D, ...)`` in the dtype of ``weight``.

    Raises:
        ValueError: for sizes that do not divide, and an unknown ``how``.
        TypeError: for a weight that is not floating-point.

    Groups are contiguous as in transformers: query head h reads key/value head ``h // (H / Hkv)``. The mean is a
    pairwise sum and one division. In fp32 and fp64, pooling by a power of two and then by any factor is therefore
    bitwise equal to pooling at once (barring overflow and underflow); in bf16 and fp16 each step rounds.

    Example:
        >>> import torch
        >>> from qkv.convert import pool_heads
        >>> pool_heads(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), num_kv_heads=4, new_kv_heads=2)
        tensor([[2.],
                [6.]])

    Source: Ainslie et al. 2023, section 2.1 and figure 4, whose "random" uses the model's initialisation.
    """
    if not weight.dtype.is_floating_point:
        raise TypeError(f"pool_heads: weight must be floating-point; got {weight.dtype}.")
    require_int("pool_heads", "num_kv_heads", num_kv_heads)
    require_int("pool_heads", "new_kv_heads", new_kv_heads)
    if new_kv_heads < 1 or num_kv_heads < 1 or num_kv_heads % new_kv_heads:
        raise ValueError(
            f"pool_heads: new_kv_heads must divide num_kv_heads={num_kv_heads} "
            f"({', '.join(map(str, divisors(num_kv_heads)))}); got {new_kv_heads}."
        )
    if weight.dim() < 1 or weight.shape[0] % num_kv_heads:
        raise ValueError(
            f"pool_heads: the first dimension of weight must be a multiple of the {num_kv_heads} heads; "
            f"got shape {tuple(weight.shape)}."
        )
    if how not in get_args(PoolMethod):
        raise ValueError(
            f"pool_heads: how must be one of {', '.join(get_args(PoolMethod))}; got {how!r}. "
            "For aligned, which needs all projections, use convert_layer or convert_state_dict."
        )
    if new_kv_heads == num_kv_heads:
        return weight
    heads = weight.reshape(new_kv_heads, num_kv_heads // new_kv_heads, -1, *weight.shape[1:])
    if how == "first":
        return heads[:, 0].flatten(0, 1)
    precise = torch.promote_types(weight.dtype, torch.float32)
    if how == "random":
        generator = torch.Generator(weight.device).manual_seed(seed)
        drawn = torch.empty(heads[:, 0].shape, dtype=precise, device=weight.device).normal_(generator=generator)
        return drawn.mul_(weight.to(precise).square().mean().sqrt()).to(weight.dtype).flatten(0, 1)
    return (_sum_neighbours(heads.to(precise)) / heads.shape[1]).to(weight.dtype).flatten(0, 1)


def group_heads(weight: Tensor, num_heads: int, num_kv_heads: int, *, dim: int = 0) -> Tensor:
    """Reorders query heads from interleaved groups (head h reads ``h % Hkv``) to contiguous groups.

    Args:
        weight: of the query projection, or with ``dim=1`` of the output projection, whose columns belong to heads.
        num_heads: query heads.
        num_kv_heads: groups, a divisor.
        dim: the dimension with the heads.

    Raises:
        ValueError: for sizes that do not divide.

    Example:
        >>> import torch
        >>> from qkv.convert import group_heads
        >>> group_heads(torch.tensor([0.0, 1.0, 10.0, 11.0]), num_heads=4, num_kv_heads=2)
        tensor([ 0., 10.,  1., 11.])
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads or weight.shape[dim] % num_heads:
        raise ValueError(
            f"group_heads: dimension {dim} of weight must be a multiple of the {num_heads} heads, and these of the "
            f"{num_kv_heads} groups; got shape {tuple(weight.shape)}."
        )
    before, after = weight.shape[:dim], weight.shape[dim + 1 :]
    heads = weight.reshape(*before, num_heads // num_kv_heads, num_kv_heads, -1, *after)
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2)


def _sum_neighbours(heads: Tensor) -> Tensor:
    """Pairwise sum over dimension 1."""
    while (count := heads.shape[1]) > 1:
        pairs = heads[:, 0 : count - 1 : 2] + heads[:, 1::2]
        heads = torch.cat([pairs, heads[:, -1:]], dim=1) if count % 2 else pairs
    return heads[:, 0]


def divisors(number: int) -> list[int]:
    """The divisors of a number, in descending order.

    Example:
        >>> divisors(8)
        [8, 4, 2, 1]
    """
    return [n for n in range(number, 0, -1) if number % n == 0]
