"""`align_heads`: groups similar heads and rotates them towards each other before they are pooled."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.heads.pooling import divisors

MAX_SWEEPS = 50
"""Passes over the heads of a group, at most."""
TOLERANCE = 1e-5
"""Relative improvement of the agreement below which the search stops."""

Project = Callable[[Tensor], Tensor]
"""Maps a matrix ``(..., D, D)`` to the nearest allowed rotation R: the one with the largest ``<R, matrix>``."""


class Projections(NamedTuple):
    """The projection weights of an attention layer, rows ordered by head. Biases of q, k, v are last columns."""

    q: Tensor
    """``(H * D, C)``."""
    k: Tensor
    """``(Hkv * D, C)``."""
    v: Tensor
    """``(Hkv * Dv, C)``."""
    out: Tensor
    """``(C, H * Dv)``, without its bias."""


def join(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Appends the bias to the weight as a last column."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


class KeySymmetry(NamedTuple):
    """The rotations of queries and keys that leave attention scores unchanged.

    Channels with rotary embedding allow one angle for each pair, which commutes with the rotation by positions. The
    other channels allow any orthogonal matrix. QK norms allow no rotation, since their gains belong to channels.
    """

    rotary_dim: int = 0
    """Leading channels with rotary embedding."""
    interleaved: bool = False
    """How they are paired, as in `qkv.RotaryEmbedding`."""
    normed: bool = False
    """Whether queries and keys are normalised."""

    def project(self, matrix: Tensor) -> Tensor:
        """The allowed rotation R with the largest ``<R, matrix>``, for ``matrix (..., D, D)``."""
        rotation = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix).clone()
        if self.normed:
            return rotation
        channels = torch.arange(self.rotary_dim, device=matrix.device)
        one, other = channels.view(-1, 2).T if self.interleaved else channels.view(2, -1)
        along = matrix[..., one, one] + matrix[..., other, other]
        across = matrix[..., other, one] - matrix[..., one, other]
        angle = torch.atan2(across, along)
        rotation[..., one, one] = rotation[..., other, other] = angle.cos()
        rotation[..., other, one], rotation[..., one, other] = angle.sin(), -angle.sin()
        rest = slice(self.rotary_dim, None)
        rotation[..., rest, rest] = project_orthogonal(matrix[..., rest, rest])
        return rotation


class Alignment(NamedTuple):
    """A permutation and rotation of the heads of a layer that leaves its function unchanged."""

    order: Tensor
    """``(Hkv,)``: indices of KV heads in their new order, in contiguous groups. Query heads move with them."""
    key_rotations: Tensor
    """``(Hkv, D, D)``, in the new order."""
    value_rotations: Tensor
    """``(Hkv, Dv, Dv)``, in the new order."""

    def apply(self, projections: Projections) -> Projections:
        """The projections, reordered and rotated, in fp32 (fp64 for fp64)."""

        def rotated(rows: Tensor, rotations: Tensor) -> Tensor:
            heads = _upcast(rows).reshape(len(rotations), -1, rotations.shape[1], rows.shape[1])[self.order]
            return (rotations[:, None] @ heads).flatten(0, 2)

        q, k, v, out = projections
        return Projections(
            rotated(q, self.key_rotations),
            rotated(k, self.key_rotations),
            rotated(v, self.value_rotations),
            rotated(out.T, self.value_rotations).T,
        )

    def query_order(self, num_heads: int) -> Tensor:
        """``(num_heads,)``: indices of query heads in their new order."""
        return torch.arange(num_heads, device=self.order.device).view(len(self.order), -1)[self.order].flatten()


def align_heads(
    projections: Projections,
    num_kv_heads: int,
    new_kv_heads: int,
    symmetry: KeySymmetry,
    *,
    gain: Tensor | None = None,
) -> Alignment:
    """Groups and rotates the heads of a layer so that `pool_heads` averages similar heads.

    KV heads are permuted together with their query heads; keys and queries of a head are rotated by an ``R`` that
    ``symmetry`` allows, its values by any orthogonal ``S``, which the output projection undoes. None of this changes
    the function of the layer. The search minimises::

        sum_g sum_{j in g} |K_j - mean_g K|^2 / |K|^2  +  the same of V

    where ``K_j`` and ``V_j`` are the rows of head j, with columns scaled by ``gain``.

    Groups are found by greedy swaps, rotations by generalised Procrustes analysis. Both are local optima, never worse
    than the contiguous groups of plain pooling, and deterministic.

    Args:
        projections: of the layer.
        num_kv_heads: of the layer.
        new_kv_heads: number of groups, a divisor of ``num_kv_heads``.
        symmetry: the rotations allowed for queries and keys.
        gain: ``(C,)``, weight of the norm before the layer: the scale of the input's channels.

    Raises:
        ValueError: for sizes that do not match, and keys or values that are not finite.

    Example:
        >>> import torch
        >>> from qkv.convert import KeySymmetry, Projections, align_heads
        >>> q, k, v, out = (torch.randn(32, 32) for _ in range(4))
        >>> alignment = align_heads(Projections(q, k, v, out), 4, 2, KeySymmetry(rotary_dim=8))
        >>> alignment.order.shape, alignment.key_rotations.shape
        (torch.Size([4]), torch.Size([4, 8, 8]))

    Source: Jin et al. 2024, "Align Attention Heads Before Merging Them", which measures agreement on calibration data
    and searches groups by annealing. Here agreement is computed from the weights alone.
    """
    if new_kv_heads < 1 or num_kv_heads % new_kv_heads:
        raise ValueError(
            f"align_heads: new_kv_heads must divide num_kv_heads={num_kv_heads} "
            f"({', '.join(map(str, divisors(num_kv_heads)))}); got {new_kv_heads}."
        )
    projects: tuple[Project, ...] = (symmetry.project, project_orthogonal)
    grams = _grams("align_heads", projections, num_kv_heads, gain)
    keys, values = (_agreement_of_pairs(gram, project) for gram, project in zip(grams, projects, strict=True))
    contiguous = torch.arange(num_kv_heads).view(new_kv_heads, -1)
    candidates: list[tuple[float, Tensor, list[Tensor]]] = []
    for groups in (contiguous, _find_groups(keys + values, contiguous.shape[1])):
        aligned = [_align_groups(gram, groups, project) for gram, project in zip(grams, projects, strict=True)]
        candidates.append((sum(a for a, _ in aligned), groups.flatten(), [r for _, r in aligned]))
    _, order, (key_rotations, value_rotations) = max(candidates, key=lambda candidate: candidate[0])
    return Alignment(order.to(key_rotations.device), key_rotations, value_rotations)


class HeadAgreement(NamedTuple):
    """How alike KV heads are once one is turned towards the other, from -1 to 1; 1 on the diagonal."""

    keys: Tensor
    """``(Hkv, Hkv)``"""
    values: Tensor
    """``(Hkv, Hkv)``"""


def head_agreement(
    projections: Projections, num_kv_heads: int, symmetry: KeySymmetry, *, gain: Tensor | None = None
) -> HeadAgreement:
    """How well each pair of KV heads would agree if they were aligned, before they are pooled.

    With ``K_i`` the rows of head i, columns scaled by ``gain``, and R the best rotation that ``symmetry`` allows::

        keys[i, j] = max_R <R K_i, K_j> / (|K_i| |K_j|)

    For values, R is any orthogonal matrix. The mean of two heads that agree by a loses ``(1 - a) / 2`` of their
    squares, where they are of the same size.

    Args:
        projections, num_kv_heads, symmetry, gain: as in `align_heads`.

    Raises:
        ValueError: as `align_heads`.

    Example:
        >>> import torch
        >>> from qkv.convert import KeySymmetry, Projections, head_agreement
        >>> k = torch.randn(8, 32)
        >>> twice = torch.cat([k, -k])  # the second head is the first one, turned by half a circle
        >>> found = head_agreement(Projections(twice, twice, twice, twice.T), 2, KeySymmetry())
        >>> found.keys.round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]])

    Source: Jin et al. 2024, section 3.2, on weights instead of activations.
    """
    agreements = []
    grams = _grams("head_agreement", projections, num_kv_heads, gain)
    for gram, project in zip(grams, (symmetry.project, project_orthogonal), strict=True):
        size = gram.diagonal().diagonal().sum(-1).sqrt()  # the norm of each head
        found = _agreement_of_pairs(gram, project) / (size[:, None] * size).clamp_min(torch.finfo(gram.dtype).tiny)
        agreements.append(found.fill_diagonal_(1))
    return HeadAgreement(*agreements)


def project_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal R with the largest ``<R, matrix>``: the solution of the Procrustes problem."""
    u, _, vh = torch.linalg.svd(matrix)
    rotation: Tensor = u @ vh
    return rotation


def _upcast(weight: Tensor) -> Tensor:
    """Converts to at least fp32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _rows(weight: Tensor, gain: Tensor | None, num_kv_heads: int) -> Tensor:
    """``(Hkv, D, C)``: the rows by head, with columns scaled by ``gain`` and the whole normalised to 1."""
    rows = _upcast(weight)
    if gain is not None:
        rows = torch.cat([rows[:, : len(gain)] * _upcast(gain), rows[:, len(gain) :]], dim=1)
    size = torch.linalg.vector_norm(rows).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.div(rows, size).view(num_kv_heads, -1, rows.shape[1])


def _gram(heads: Tensor) -> Tensor:
    """``(n, n, D, D)``: inner products of the rows of each pair of heads."""
    rows, (count, width) = heads.flatten(0, 1), heads.shape[:2]
    return (rows @ rows.mT).view(count, width, count, width).transpose(1, 2)


def _grams(caller: str, projections: Projections, num_kv_heads: int, gain: Tensor | None) -> list[Tensor]:
    """Of keys and of values, checked."""
    q, k, v, out = projections
    if any(size % num_kv_heads for size in (len(q), len(k), len(v), out.shape[1])):
        raise ValueError(
            f"{caller}: the rows of q, k, v and out.T must be multiples of the {num_kv_heads} KV heads; "
            f"got shapes {', '.join(str(tuple(weight.shape)) for weight in projections)}."
        )
    if gain is not None and gain.shape not in ((k.shape[1],), (k.shape[1] - 1,)):
        raise ValueError(
            f"{caller}: gain must have one value for each of the {k.shape[1]} columns of k (without a bias column); "
            f"got shape {tuple(gain.shape)}."
        )
    grams = [_gram(_rows(weight, gain, num_kv_heads)) for weight in (k, v)]
    if not all(gram.isfinite().all() for gram in grams):
        raise ValueError(f"{caller}: keys and values must be finite; got NaN or infinity.")
    return grams


def _agreement_of_pairs(gram: Tensor, project: Project) -> Tensor:
    """``(n, n)``: inner product of two heads when one is rotated towards the other; 0 on the diagonal."""
    one, other = torch.triu_indices(len(gram), len(gram), offset=1)
    crossed = gram[one, other]
    agreement = crossed.new_zeros(len(gram), len(gram))
    agreement[one, other] = (project(crossed) * crossed).sum((-2, -1))
    both: Tensor = agreement + agreement.mT
    return both


def _find_groups(agreement: Tensor, size: int) -> Tensor:
    """``(groups, size)``: heads grouped for high agreement: greedy swaps from two starts, and the better result."""
    agreement = agreement.cpu().double()
    contiguous = torch.arange(len(agreement)) // size
    candidates = [_swap_heads(agreement, start) for start in (contiguous, _greedy_groups(agreement, size))]
    label = max(candidates, key=lambda label: float(agreement[label[:, None] == label].sum()))
    groups = [torch.nonzero(label == group).flatten() for group in label.unique()]
    return torch.stack(sorted(groups, key=lambda group: int(group[0])))


def _greedy_groups(agreement: Tensor, size: int) -> Tensor:
    """The group of each head: the first free head starts a group and takes the heads that agree best with it."""
    label = torch.full((len(agreement),), -1)
    for group in range(len(agreement) // size):
        label[(label < 0).nonzero()[0]] = group
        for _ in range(size - 1):
            with_group = agreement[:, label == group].sum(1)
            label[with_group.where(label < 0, -torch.inf).argmax()] = group
    return label


def _swap_heads(agreement: Tensor, label: Tensor) -> Tensor:
    """Swaps heads between groups, the best pair first, until no swap raises the agreement within groups."""
    label = label.clone()
    while True:
        with_group = agreement @ torch.nn.functional.one_hot(label).double()
        own = with_group.gather(1, label[:, None])
        moved = with_group[:, label]
        gain = moved + moved.mT - 2 * agreement - own - own.mT
        gain[label[:, None] == label] = 0.0
        best = int(gain.argmax())
        if gain.flatten()[best] <= TOLERANCE * agreement.abs().sum():
            return label
        one, other = divmod(best, len(agreement))
        label[[one, other]] = label[[other, one]]


def _align_groups(gram: Tensor, groups: Tensor, project: Project) -> tuple[float, Tensor]:
    """The agreement within groups after rotation, and the rotations of all heads in the order of groups."""
    parts = [_align_group(gram[group[:, None], group], project) for group in groups]
    return sum(agreement for agreement, _ in parts), torch.cat([rotations for _, rotations in parts])


def _align_group(gram: Tensor, project: Project) -> tuple[float, Tensor]:
    """Generalised Procrustes analysis: rotates one head after another towards the sum of the others.

    Starts from the better of the identity and a sequential alignment. No step lowers the agreement
    ``sum_ij <R_i Z_i, R_j Z_j>`` of heads Z.
    """

    def agree(rotations: Tensor) -> float:
        return float(torch.einsum("iab,ijbc,jac->", rotations, gram, rotations))

    def toward(rotations: Tensor, head: int, others: list[int]) -> Tensor:
        return project((rotations[others] @ gram[others, head]).sum(0))

    count, width = gram.shape[1:3]
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device).repeat(count, 1, 1)
    rotations = identity.clone()
    for head in range(1, count):
        rotations[head] = toward(rotations, head, list(range(head)))
    agreement, rotations = max([(agree(start), start) for start in (rotations, identity)], key=lambda start: start[0])
    for _ in range(MAX_SWEEPS):
        for head in range(count):
            rotations[head] = toward(rotations, head, [other for other in range(count) if other != head])
        before, agreement = agreement, agree(rotations)
        if agreement - before <= TOLERANCE * abs(agreement):
            break
    return agreement, rotations
