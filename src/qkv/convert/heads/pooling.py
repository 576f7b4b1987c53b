"""`pool_heads`: the rows of several key/value heads become the rows of one."""

from typing import Literal, get_args

import torch
from torch import Tensor

from qkv.arguments import require_int

How = Literal["mean", "first", "random"]
Method = Literal["mean", "first", "random", "aligned"]
"""Of layers and models; one tensor alone cannot be aligned."""


def pool_heads(weight: Tensor, num_kv_heads: int, new_kv_heads: int, *, how: How = "mean", seed: int = 0) -> Tensor:
    """Pools ``num_kv_heads`` heads of a projection to ``new_kv_heads``, each from ``num_kv_heads / new_kv_heads``.

    Args:
        weight: ``(num_kv_heads * D, ...)``: the weight or the bias of a projection to keys or values, head after head.
        num_kv_heads: heads that it has.
        new_kv_heads: heads that the result has, a divisor. With as many as before, the result is ``weight`` itself.
        how: ``mean`` of the heads of a group, in fp32 (fp64 for fp64) and rounded once; the ``first`` of them; or
            ``random``, drawn anew from a normal distribution with the root mean square of ``weight``.
        seed: of ``random``.

    Returns:
        ``(new_kv_heads * D, ...)`` in the dtype of ``weight``.

    Raises:
        ValueError: for sizes that do not divide, and another ``how``.
        TypeError: for a weight that is not floating-point.

    Groups are contiguous, as transformers reads them: query head h reads key/value head ``h // (H / Hkv)``. Neighbours
    are summed first, then sums of neighbours, and the sum is divided once. Powers of two divide exactly, so that in
    fp32 and fp64 pooling by a power of two and then by any factor gives the bits of pooling at once, short of
    overflow and underflow; in bf16 and fp16 each step rounds.

    Example:
        >>> import torch
        >>> from qkv.convert import pool_heads
        >>> pool_heads(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), num_kv_heads=4, new_kv_heads=2)
        tensor([[2.],
                [6.]])

    Source: Ainslie et al. 2023, section 2.1 and figure 4, whose "random" draws as the model was initialised.
    """
    if not weight.dtype.is_floating_point:
        raise TypeError(f"pool_heads: weight must be floating-point; got {weight.dtype}.")
    require_int("pool_heads", "num_kv_heads", num_kv_heads)
    require_int("pool_heads", "new_kv_heads", new_kv_heads)
    if new_kv_heads < 1 or num_kv_heads < 1 or num_kv_heads % new_kv_heads:
        raise ValueError(
            f"pool_heads: new_kv_heads must divide num_kv_heads; got {new_kv_heads} and {num_kv_heads}, "
            f"for which {', '.join(map(str, divisors(num_kv_heads)))} would do."
        )
    if weight.dim() < 1 or weight.shape[0] % num_kv_heads:
        raise ValueError(
            f"pool_heads: the first dimension of weight must hold {num_kv_heads} heads of equal width; "
            f"got shape {tuple(weight.shape)}."
        )
    if how not in get_args(How):
        raise ValueError(
            f"pool_heads: how must be one of {', '.join(get_args(How))}; got {how!r}. "
            "aligned takes all projections: convert_layer, convert_state_dict."
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
    """Reorders query heads whose groups are interleaved (head h reads ``h % Hkv``) so that groups are contiguous.

    Args:
        weight: of the query projection, or with ``dim=1`` of the output projection, whose columns follow the heads.
        num_heads: query heads.
        num_kv_heads: groups, a divisor.
        dim: which dimension counts the heads.

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
            f"group_heads: dimension {dim} of weight must hold {num_heads} heads of equal width, in {num_kv_heads} "
            f"groups of equal size; got shape {tuple(weight.shape)}."
        )
    before, after = weight.shape[:dim], weight.shape[dim + 1 :]
    heads = weight.reshape(*before, num_heads // num_kv_heads, num_kv_heads, -1, *after)
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2)


def _sum_neighbours(heads: Tensor) -> Tensor:
    """Sums over dimension 1, pair by pair."""
    while (count := heads.shape[1]) > 1:
        pairs = heads[:, 0 : count - 1 : 2] + heads[:, 1::2]
        heads = torch.cat([pairs, heads[:, -1:]], dim=1) if count % 2 else pairs
    return heads[:, 0]


def divisors(number: int) -> list[int]:
    """From the number itself down to 1.

    Example:
        >>> divisors(8)
        [8, 4, 2, 1]
    """
    return [n for n in range(number, 0, -1) if number % n == 0]
