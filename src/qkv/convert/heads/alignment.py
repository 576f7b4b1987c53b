"""`align_heads`: heads that will share keys and values are chosen and turned so that they agree."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.heads.pooling import divisors

SWEEPS = 50
"""The most passes over the heads of a group. Each changes less than the one before."""
ENOUGH = 1e-5
"""Heads are turned until a pass betters their agreement by less than this share."""

Turn = Callable[[Tensor], Tensor]
"""The allowed ``R (..., D, D)`` that is closest to a matrix: the one of largest ``<R, matrix>``."""


class Projections(NamedTuple):
    """The weights of an attention, head after head. Of queries, keys and values, a bias is one more column (`join`)."""

    q: Tensor
    """``(H * D, C)``."""
    k: Tensor
    """``(Hkv * D, C)``."""
    v: Tensor
    """``(Hkv * Dv, C)``."""
    out: Tensor
    """``(C, H * Dv)``; its bias has no part in this."""


def join(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias as the last column of the weight."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


class KeySymmetry(NamedTuple):
    """Which turns of queries and keys leave their scores as they are.

    Positions turn the pairs of channels of rotary embeddings; what commutes with that is a turn of each pair. Channels
    that positions leave alone can be turned in any way, but for norms of queries and keys, whose gains are tied to
    channels.
    """

    rotary_dim: int = 0
    """Leading channels that positions turn."""
    interleaved: bool = False
    """How they are paired, as in `qkv.RotaryEmbedding`."""
    normed: bool = False
    """Whether queries and keys are normalised: then none."""

    def closest(self, matrix: Tensor) -> Tensor:
        """The allowed turn of largest ``<R, matrix>``, for ``matrix (..., D, D)``."""
        turn = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix).clone()
        if self.normed:
            return turn
        channels = torch.arange(self.rotary_dim, device=matrix.device)
        one, other = channels.view(-1, 2).T if self.interleaved else channels.view(2, -1)
        along = matrix[..., one, one] + matrix[..., other, other]
        across = matrix[..., other, one] - matrix[..., one, other]
        angle = torch.atan2(across, along)
        turn[..., one, one] = turn[..., other, other] = angle.cos()
        turn[..., other, one], turn[..., one, other] = angle.sin(), -angle.sin()
        rest = slice(self.rotary_dim, None)
        turn[..., rest, rest] = closest_orthogonal(matrix[..., rest, rest])
        return turn


class Alignment(NamedTuple):
    """What becomes of the heads of a layer; what the layer computes does not change."""

    order: Tensor
    """``(Hkv,)``: which KV head comes where, its query heads with it. Groups are contiguous."""
    key_turns: Tensor
    """``(Hkv, D, D)``, in the new order."""
    value_turns: Tensor
    """``(Hkv, Dv, Dv)``, in the new order."""

    def apply(self, projections: Projections) -> Projections:
        """The projections, reordered and turned, in fp32 (fp64 for fp64)."""

        def turned(rows: Tensor, turns: Tensor) -> Tensor:
            heads = _precise(rows).reshape(len(turns), -1, turns.shape[1], rows.shape[1])[self.order]
            return (turns[:, None] @ heads).flatten(0, 2)

        q, k, v, out = projections
        return Projections(
            turned(q, self.key_turns),
            turned(k, self.key_turns),
            turned(v, self.value_turns),
            turned(out.T, self.value_turns).T,
        )

    def query_order(self, num_heads: int) -> Tensor:
        """``(num_heads,)``: which query head comes where."""
        return torch.arange(num_heads, device=self.order.device).view(len(self.order), -1)[self.order].flatten()


def align_heads(
    projections: Projections,
    num_kv_heads: int,
    new_kv_heads: int,
    freedom: KeySymmetry,
    *,
    gain: Tensor | None = None,
) -> Alignment:
    """Reorders and turns the heads of a layer so that `pool_heads` finds like heads beside each other.

    A KV head may change places with another, its query heads with it. Its keys and queries may be turned by one ``R``
    that commutes with the rotation of positions, and its values by any orthogonal ``S``, which the columns of the
    output projection undo. All of these leave the function of the layer as it is. Of them, those are looked for that
    make heads of a group agree, that is, make the least of::

        sum_g sum_{j in g} |K_j - mean_g K|^2 / |K|^2  +  the same of V

    where ``K_j`` and ``V_j`` are the rows of head j, with ``gain`` on the columns.

    Groups are found by swapping heads as long as it helps; the turns by generalised Procrustes analysis. Neither need
    be the best there is, but they are never worse than neighbours as they stand, which plain pooling takes. Nothing is
    drawn: the same weights give the same heads.

    Args:
        projections: of the layer.
        num_kv_heads: heads of keys and values that it has.
        new_kv_heads: the number of groups, a divisor.
        freedom: of queries and keys.
        gain: ``(C,)``, of the norm through which the layer's input comes; it tells which columns count most.

    Raises:
        ValueError: for sizes that do not fit together, and keys and values that are not finite.

    Example:
        >>> import torch
        >>> from qkv.convert import KeySymmetry, Projections, align_heads
        >>> q, k, v, out = (torch.randn(32, 32) for _ in range(4))
        >>> alignment = align_heads(Projections(q, k, v, out), 4, 2, KeySymmetry(rotary_dim=8))
        >>> alignment.order.shape, alignment.key_turns.shape
        (torch.Size([4]), torch.Size([4, 8, 8]))

    Source: Jin et al. 2024, "Align Attention Heads Before Merging Them", which measures agreement on calibration data
    and searches groups by annealing; here weights alone say how heads agree.
    """
    if new_kv_heads < 1 or num_kv_heads % new_kv_heads:
        raise ValueError(
            f"align_heads: new_kv_heads must divide num_kv_heads; got {new_kv_heads} and {num_kv_heads}, "
            f"for which {', '.join(map(str, divisors(num_kv_heads)))} would do."
        )
    q, k, v, out = projections
    if any(size % num_kv_heads for size in (len(q), len(k), len(v), out.shape[1])):
        raise ValueError(
            f"align_heads: q, k, v and out.T must have as many rows for each of {num_kv_heads} KV heads; "
            f"got shapes {', '.join(str(tuple(weight.shape)) for weight in projections)}."
        )
    if gain is not None and gain.shape not in ((k.shape[1],), (k.shape[1] - 1,)):
        raise ValueError(
            f"align_heads: gain must have a number for each of the {k.shape[1]} columns of k, but for a bias; "
            f"got shape {tuple(gain.shape)}."
        )
    turns = (freedom.closest, closest_orthogonal)
    grams = [_gram(_rows(weight, gain, num_kv_heads)) for weight in (k, v)]
    if not all(gram.isfinite().all() for gram in grams):
        raise ValueError("align_heads: keys and values must be finite; some are NaN or infinite.")
    keys, values = (_agreement_of_pairs(gram, turn) for gram, turn in zip(grams, turns, strict=True))
    neighbours = torch.arange(num_kv_heads).view(new_kv_heads, -1)
    found: list[tuple[float, Tensor, list[Tensor]]] = []
    for groups in (neighbours, _group(keys + values, neighbours.shape[1])):
        turned = [_turn(gram, groups, turn) for gram, turn in zip(grams, turns, strict=True)]
        found.append((sum(a for a, _ in turned), groups.flatten(), [t for _, t in turned]))
    _, order, (key_turns, value_turns) = max(found, key=lambda candidate: candidate[0])
    return Alignment(order.to(key_turns.device), key_turns, value_turns)


def closest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal R of largest ``<R, matrix>``: the solution of the Procrustes problem."""
    u, _, vh = torch.linalg.svd(matrix)
    turn: Tensor = u @ vh
    return turn


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _rows(weight: Tensor, gain: Tensor | None, num_kv_heads: int) -> Tensor:
    """``(Hkv, D, C)``: what heads make of an input, at the same size whichever projection it is."""
    rows = _precise(weight)
    if gain is not None:
        rows = torch.cat([rows[:, : len(gain)] * _precise(gain), rows[:, len(gain) :]], dim=1)
    size = torch.linalg.vector_norm(rows).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.div(rows, size).view(num_kv_heads, -1, rows.shape[1])


def _gram(heads: Tensor) -> Tensor:
    """``(n, n, D, D)``: the products of the rows of each head with those of each other."""
    rows, (count, width) = heads.flatten(0, 1), heads.shape[:2]
    return (rows @ rows.mT).view(count, width, count, width).transpose(1, 2)


def _agreement_of_pairs(gram: Tensor, turn: Turn) -> Tensor:
    """``(n, n)``: the product of two heads when one is turned to the other; 0 of a head with itself."""
    one, other = torch.triu_indices(len(gram), len(gram), offset=1)
    crossed = gram[one, other]
    agreement = crossed.new_zeros(len(gram), len(gram))
    agreement[one, other] = (turn(crossed) * crossed).sum((-2, -1))
    both: Tensor = agreement + agreement.mT
    return both


def _group(agreement: Tensor, size: int) -> Tensor:
    """``(groups, size)``: heads that agree well, by the better of two starts."""
    agreement = agreement.cpu().double()
    neighbours = torch.arange(len(agreement)) // size
    found = [_swap(agreement, start) for start in (neighbours, _collect(agreement, size))]
    label = max(found, key=lambda label: float(agreement[label[:, None] == label].sum()))
    groups = [torch.nonzero(label == group).flatten() for group in label.unique()]
    return torch.stack(sorted(groups, key=lambda group: int(group[0])))


def _collect(agreement: Tensor, size: int) -> Tensor:
    """The group of each head, where the first head that has none collects those that agree best."""
    label = torch.full((len(agreement),), -1)
    for group in range(len(agreement) // size):
        label[(label < 0).nonzero()[0]] = group
        for _ in range(size - 1):
            with_group = agreement[:, label == group].sum(1)
            label[with_group.where(label < 0, -torch.inf).argmax()] = group
    return label


def _swap(agreement: Tensor, label: Tensor) -> Tensor:
    """Swaps heads between groups, the best pair first, as long as heads of a group agree better."""
    label = label.clone()
    while True:
        with_group = agreement @ torch.nn.functional.one_hot(label).double()
        own = with_group.gather(1, label[:, None])
        moved = with_group[:, label]
        gain = moved + moved.mT - 2 * agreement - own - own.mT
        gain[label[:, None] == label] = 0.0
        best = int(gain.argmax())
        if gain.flatten()[best] <= ENOUGH * agreement.abs().sum():
            return label
        one, other = divmod(best, len(agreement))
        label[[one, other]] = label[[other, one]]


def _turn(gram: Tensor, groups: Tensor, turn: Turn) -> tuple[float, Tensor]:
    """The turns of all heads, in the order of groups, and how well the heads of groups then agree."""
    parts = [_turn_group(gram[group[:, None], group], turn) for group in groups]
    return sum(agreement for agreement, _ in parts), torch.cat([turns for _, turns in parts])


def _turn_group(gram: Tensor, turn: Turn) -> tuple[float, Tensor]:
    """Turns each head in its turn to the sum of the others, from the better of two starts: as they are, or one by one.

    No step lowers the agreement ``sum_ij <R_i Z_i, R_j Z_j>`` of heads Z, so it ends no lower than it is at first.
    """

    def agree(turns: Tensor) -> float:
        return float(torch.einsum("iab,ijbc,jac->", turns, gram, turns))

    def toward(turns: Tensor, head: int, others: list[int]) -> Tensor:
        return turn((turns[others] @ gram[others, head]).sum(0))

    count, width = gram.shape[1:3]
    as_they_are = torch.eye(width, dtype=gram.dtype, device=gram.device).repeat(count, 1, 1)
    turns = as_they_are.clone()
    for head in range(1, count):
        turns[head] = toward(turns, head, list(range(head)))
    agreement, turns = max([(agree(start), start) for start in (turns, as_they_are)], key=lambda start: start[0])
    for _ in range(SWEEPS):
        for head in range(count):
            turns[head] = toward(turns, head, [other for other in range(count) if other != head])
        before, agreement = agreement, agree(turns)
        if agreement - before <= ENOUGH * abs(agreement):
            break
    return agreement, turns
