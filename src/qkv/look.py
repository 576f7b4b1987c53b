"""What queries attend to, in numbers, by head and query: of texts whose weights would not fit in memory.

With weights ``p = exp(s - lse)``, most numbers are one more call of attention, with other values or another mask, in
memory linear in the length. Others need the weights, which are written out for a few rows at a time. Tensors of 16 bits
are computed with in fp32. No number has a gradient.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from qkv import backends
from qkv.arguments import require_count, require_int, require_probability
from qkv.backends.reference import weights_and_lse
from qkv.functional import Options
from qkv.masks import Mask
from qkv.partial import Partial, merge_stacked
from qkv.problem import Problem, make_problem, trim
from qkv.scores import Scores

__all__ = [
    "BlockMap",
    "Distance",
    "Overview",
    "SinkShare",
    "TopKeys",
    "WindowCut",
    "block_map",
    "distance",
    "keys_in_effect",
    "overview",
    "received",
    "sink_share",
    "top_keys",
    "window_cut",
]

WEIGHTS_AT_ONCE = 1 << 22
"""Number of weights that are written out at once: 16 MiB in fp32."""


class WindowCut(NamedTuple):
    """What windows hide from queries. Both are ``(windows, B, H, Lq)``."""

    mass: Tensor
    """the weight of the keys that a window hides"""
    change: Tensor
    """how far the output moves without them, ``norm(new - old) / norm(old)``"""


class Distance(NamedTuple):
    """How far keys lie before their query, by weight: negative for those after it. Both are ``(B, H, Lq)``."""

    mean: Tensor
    spread: Tensor
    """the standard deviation; what is below a 2000th of the number of keys is lost in fp32"""


class BlockMap(NamedTuple):
    """Weights between blocks of queries and blocks of keys. Both are ``(B, H, query blocks, key blocks)``."""

    mean: Tensor
    """the weight of a block of keys, in the mean over the queries of a block; a row sums to 1"""
    most: Tensor | None
    """the largest weight between both; None if it was not asked for"""


class SinkShare(NamedTuple):
    """What queries spend on sinks. Both are ``(B, H, Lq)``."""

    first: Tensor
    """the weight of the first keys"""
    learned: Tensor
    """the weight of the head's sink logit"""


class Overview(NamedTuple):
    """Numbers that one call of attention gives together."""

    distance: Distance
    sinks: SinkShare
    map: BlockMap


class TopKeys(NamedTuple):
    """The keys of largest weight of each query, in order."""

    keys: Tensor
    """(B, H, Lq, most); -1 after those that suffice"""
    weights: Tensor
    """(B, H, Lq, most); 0 after those that suffice"""
    covered: Tensor
    """(B, H, Lq), the sum of these weights"""


def window_cut(
    q: Tensor, k: Tensor, v: Tensor, windows: Sequence[int | Mask], *, sink_tokens: int = 0, **options: Unpack[Options]
) -> WindowCut:
    """What each query would lose by a window: the weight of the keys that it hides, and the change of the output.

    Both are found from the keys inside and those outside of the window apart, so that small losses are exact:
    ``mass = exp(lse_outside - lse)``, ``new - old = mass * (out_inside - out_outside)``. Keys between two windows are
    read once, so that any number of windows takes the time of one call.

    Args:
        q, k, v: as in `qkv.attention`.
        windows: each the number of keys that a query would see at most, its own and those before it, as `Mask.causal`
            counts them; or a mask.
        sink_tokens: number of first keys that a window given by its number shows as well.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect. ``mask`` is the one
            without the windows.

    Returns:
        `WindowCut`, whose numbers are ``(windows, B, H, Lq)``.

    Raises:
        TypeError, ValueError: as `qkv.attention`, and for windows that are neither counts nor masks.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q, k, v = torch.zeros(3, 1, 1, 4, 8)
        >>> look.window_cut(q, k, v, [2, 4], mask=Mask.causal()).mass[:, 0, 0]
        tensor([[0.0000, 0.0000, 0.3333, 0.5000],
                [0.0000, 0.0000, 0.0000, 0.0000]])

    Source: the merging of partial results, FlashAttention-2, section 3.1.
    """
    require_count("window_cut", "sink_tokens", sink_tokens, 0)
    if not isinstance(windows, Sequence):
        raise TypeError(f"window_cut: windows must be a sequence of counts and masks; got {type(windows).__name__}.")
    for window in windows:
        if not isinstance(window, Mask):
            require_count("window_cut", "each of windows", window, 1, ", or a mask")
    windows = [window if isinstance(window, Mask) else int(window) for window in windows]  # those of numpy too
    problem = _problem("window_cut", q, k, v, options)
    numbers = sorted({window for window in windows if isinstance(window, int)})
    found: dict[int | Mask, tuple[Tensor, Tensor]] = {}
    if numbers:
        _problem("window_cut", q, k, v, options, also=Mask.causal())
        found.update(zip(numbers, _cuts(problem, numbers, sink_tokens), strict=True))
    for window in windows:
        if isinstance(window, Mask):
            _problem("window_cut", q, k, v, options, also=window)
            found[window] = _cut(problem, window)
    mass, change = (
        torch.stack([found[window][n] for window in windows])
        if windows
        else problem.q.new_empty(0, *problem.q.shape[:3])
        for n in range(2)
    )
    return WindowCut(mass, change)


def keys_in_effect(q: Tensor, k: Tensor, **options: Unpack[Options]) -> Tensor:
    """The number of keys that each query attends to, ``exp(-sum(p_j * log(p_j)))``: n for n keys of the same weight.

    Args:
        q, k: as in `qkv.attention`.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect. Sink logits neither:
            p sums to 1 over the keys.

    Returns:
        ``(B, H, Lq)``; 0 for a query that sees no key. Its logarithm may be off by a rounding of the largest score: the
        number by a thousandth, for scores in the thousands.

    Raises:
        TypeError, ValueError: as `qkv.attention`.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> look.keys_in_effect(q, q, mask=Mask.causal())
        tensor([[[1., 2., 3., 4.]]])

    Source: the perplexity of a distribution, Jelinek et al. 1977; of attention, Clark et al. 2019, section 3.3.
    """
    problem = _problem("keys_in_effect", q, k, k, options)
    problem = problem._replace(scores=problem.scores._replace(sink_logits=None))
    if not problem.scores.used():  # scores are products, and so is their mean
        out, lse = _solve(problem._replace(v=problem.k))
        entropy = lse - problem.scores.scale * (problem.q * out).sum(-1)
        return entropy.clamp(0, math.log(max(problem.lk, 1))).exp().masked_fill(lse == -torch.inf, 0)

    def of_rows(part: Problem) -> Tensor:
        weights, lse = weights_and_lse(part)
        entropy: Tensor = torch.special.entr(weights).sum(-1)
        return entropy.exp().masked_fill(lse == -torch.inf, 0)

    return torch.cat([of_rows(trim(part)) for part in _rows(problem)], dim=2)


def distance(q: Tensor, k: Tensor, **options: Unpack[Options]) -> Distance:
    """How far back each query attends, ``sum(p_j * (i + offset - j))``, and how widely.

    Args:
        q, k: as in `qkv.attention`.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect. Sink logits neither.

    Returns:
        `Distance`, mean and standard deviation, ``(B, H, Lq)`` each; NaN for a query that sees no key.

    Raises:
        TypeError, ValueError: as `qkv.attention`, which needs an offset for lengths that differ.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> look.distance(q, q, mask=Mask.causal()).mean
        tensor([[[0.0000, 0.5000, 1.0000, 1.5000]]])
    """
    problem = _problem("distance", q, k, k, options, also=Mask.causal())
    problem = problem._replace(scores=problem.scores._replace(sink_logits=None))
    return _distance_of(_solve(problem._replace(v=_as_values(_places(problem), problem))), problem)


def block_map(q: Tensor, k: Tensor, *, blocks: int = 64, maxima: bool = False, **options: Unpack[Options]) -> BlockMap:
    """The weights as a picture of at most ``blocks`` by ``blocks``: exact means, and maxima if asked for.

    Block (a, b) has the mean over its queries i of ``sum(p_ij for j in b)``, so that a row of blocks sums to 1.

    Args:
        q, k: as in `qkv.attention`.
        blocks: how many blocks of queries and of keys, fewer for fewer tokens. Token i of n is in block
            ``i * blocks // n``.
        maxima: whether the largest weight of each block is found too, for which all weights are written out, a few rows
            at a time.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect.

    Returns:
        `BlockMap`, whose numbers are ``(B, H, blocks, blocks)``.

    Raises:
        TypeError, ValueError: as `qkv.attention`.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> look.block_map(q, q, blocks=2, mask=Mask.causal()).mean[0, 0]
        tensor([[1.0000, 0.0000],
                [0.5833, 0.4167]])
    """
    require_count("block_map", "blocks", blocks)
    problem = _problem("block_map", q, k, k, options)
    of_queries, of_keys = (_blocks(n, blocks, problem.q.device) for n in (problem.lq, problem.lk))
    rows, _ = _solve(problem._replace(v=_as_values(_indicator(of_keys, problem.q.dtype), problem)))
    mean = _mean_of_blocks(rows, of_queries)
    if not maxima:
        return BlockMap(mean, None)
    most, start = torch.zeros_like(mean), 0
    edges = [*accumulate(of_keys.bincount(minlength=mean.shape[3]).tolist(), initial=0)]
    for part in _rows(problem):
        first, seen = _seen(part)
        weights, _ = weights_and_lse(seen)
        columns = weights.new_zeros(*weights.shape[:3], mean.shape[3])
        for block, (begin, end) in enumerate(pairwise(edges)):
            of_block = weights[..., max(begin - first, 0) : max(end - first, 0)]
            if of_block.shape[3]:
                columns[..., block] = of_block.amax(3)
        of_rows = of_queries[start : start + part.lq, None]
        most.scatter_reduce_(2, of_rows.expand_as(columns), columns, "amax")
        start += part.lq
    return BlockMap(mean, most)


def received(q: Tensor, k: Tensor, **options: Unpack[Options]) -> Tensor:
    """What each key receives, ``sum(p_j)`` over the queries of a head: 1 on average for as many queries as keys.

    Args:
        q, k: as in `qkv.attention`.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect.

    Returns:
        ``(B, H, Lk)``, by query head.

    Raises:
        TypeError, ValueError: as `qkv.attention`.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 3, 8)
        >>> look.received(q, q, mask=Mask.causal())
        tensor([[[1.8333, 0.8333, 0.3333]]])
    """
    problem = _problem("received", q, k, k, options)
    # The gradient by values of width 1, one for each query head.
    with torch.inference_mode(False), torch.enable_grad():
        problem = problem._replace(
            q=_saved(problem.q),
            k=_saved(problem.k).repeat_interleave(problem.group, dim=1),
            mask=Mask(*map(_saved, problem.mask.values())),
            offset=_saved(problem.offset),
            scores=Scores(*map(_saved, problem.scores)),
        )
        values = torch.zeros_like(problem.k[..., :1]).requires_grad_()
        out, _ = _solve(problem._replace(v=values))
        (found,) = torch.autograd.grad(out.sum(), values)
    return found[..., 0]


def sink_share(q: Tensor, k: Tensor, *, first: int = 1, **options: Unpack[Options]) -> SinkShare:
    """What each query spends on the first keys, ``sum(p_j for j < first)``, and on the sink logit of its head.

    Args:
        q, k: as in `qkv.attention`.
        first: how many first keys.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect.

    Returns:
        `SinkShare`, whose numbers are ``(B, H, Lq)``.

    Raises:
        TypeError, ValueError: as `qkv.attention`.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> look.sink_share(q, q, mask=Mask.causal()).first
        tensor([[[1.0000, 0.5000, 0.3333, 0.2500]]])

    Source: Xiao et al. 2023 (StreamingLLM), section 3.1; gpt-oss for sink logits.
    """
    require_count("sink_share", "first", first, 0)
    problem = _problem("sink_share", q, k, k, options)
    out, lse = _solve(problem._replace(v=_as_values(_is_first(problem, first), problem)))
    sink_logits = problem.scores.sink_logits
    if sink_logits is None:
        return SinkShare(out[..., 0], torch.zeros_like(lse))
    learned = (sink_logits[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0)
    return SinkShare(out[..., 0], learned.to(lse.dtype))


def overview(q: Tensor, k: Tensor, *, first: int = 1, blocks: int = 64, **options: Unpack[Options]) -> Overview:
    """`distance`, `sink_share` and the means of `block_map` by one call of attention instead of three.

    Args:
        q, k, **options: as in `distance`.
        first: as in `sink_share`.
        blocks: as in `block_map`.

    Returns:
        `Overview`, of numbers ``(B, H, Lq)`` and maps ``(B, H, blocks, blocks)``.

    Raises:
        TypeError, ValueError: as these.

    Example:
        >>> import torch
        >>> from qkv import Mask, look
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> found = look.overview(q, q, blocks=2, mask=Mask.causal())
        >>> found.distance.mean, found.map.mean[0, 0, 1]
        (tensor([[[0.0000, 0.5000, 1.0000, 1.5000]]]), tensor([0.5833, 0.4167]))
    """
    require_count("overview", "first", first, 0)
    require_count("overview", "blocks", blocks)
    problem = _problem("overview", q, k, k, options, also=Mask.causal())
    sink_logits = problem.scores.sink_logits
    problem = problem._replace(scores=problem.scores._replace(sink_logits=None))
    of_queries, of_keys = (_blocks(n, blocks, problem.q.device) for n in (problem.lq, problem.lk))
    columns = [_places(problem), _is_first(problem, first), _indicator(of_keys, problem.q.dtype)]
    out, lse = _solve(problem._replace(v=_as_values(torch.cat(columns, dim=1), problem)))
    places, share, rows = out.split([column.shape[1] for column in columns], dim=3)
    learned = torch.zeros_like(lse)
    if sink_logits is not None:  # the keys keep what it leaves them
        logit = sink_logits[:, None].to(lse.dtype)
        nothing = (lse == -torch.inf) & (logit == -torch.inf)
        kept, learned = (torch.sigmoid(more).masked_fill(nothing, 0) for more in (lse - logit, logit - lse))
        share, rows = share * kept[..., None], rows * kept[..., None]
    return Overview(
        _distance_of(Partial(places, lse), problem),
        SinkShare(share[..., 0], learned),
        BlockMap(_mean_of_blocks(rows, of_queries), None),
    )


def top_keys(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float = 0.9,
    most: int = 32,
    queries: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> TopKeys:
    """The fewest keys of each query whose weights sum to ``coverage``, but ``most`` at most.

    With weights in descending order, the first n of them, ``n = min(n : sum(p[:n]) >= coverage)``.

    Args:
        q, k: as in `qkv.attention`.
        coverage: the weight that suffices, less than 1.
        most: how many keys there are at most; fewer for fewer keys.
        queries: the places of some queries among all, whose keys alone are found, in this order; negative ones count
            from the last. None for all queries.
        **options: the keywords of `qkv.attention` except ``backend``; dropout has no effect.

    Returns:
        `TopKeys`, keys and weights ``(B, H, Lq, most)``.

    Raises:
        TypeError, ValueError: as `qkv.attention`, and for queries that are not there.

    Example:
        >>> import torch
        >>> from qkv import look
        >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0, 1.0, -9.0])[None, None, :, None]
        >>> found = look.top_keys(q, k, coverage=0.9, scale=1.0)
        >>> found.keys[0, 0, 0].tolist(), round(found.covered.item(), 3)
        ([1, 2, -1, -1], 0.958)
    """
    require_probability("top_keys", "coverage", coverage)
    require_count("top_keys", "most", most)
    problem = _problem("top_keys", q, k, k, options)
    parts = _rows(problem) if queries is None else _chosen(problem, queries)

    def of_rows(part: Problem) -> tuple[Tensor, Tensor]:
        first, seen = _seen(part)
        weights, keys = weights_and_lse(seen)[0].topk(min(most, seen.lk), dim=-1)
        before = weights.cumsum(-1) - weights
        spare = (before >= coverage) | (weights == 0)
        more = 0, min(most, part.lk) - keys.shape[-1]
        return F.pad((keys + first).masked_fill(spare, -1), more, value=-1), F.pad(weights.masked_fill(spare, 0), more)

    keys, weights = (torch.cat(parts, dim=2) for parts in zip(*map(of_rows, parts), strict=True))
    return TopKeys(keys, weights, weights.sum(-1))


def _problem(caller: str, q: Tensor, k: Tensor, v: Tensor, options: Options, *, also: Mask | None = None) -> Problem:
    """The problem of a call, in fp32 at least, without gradients, dropout, pages and int8.

    Args:
        also: a mask of the same queries and keys, which may need an offset where the one of the call does not.
    """
    if v is k:
        options = {**options, "v_scale": options.get("k_scale")}
    problem = make_problem(caller, q, k, v, wants_lse=True, **options).gathered().dequantized()
    if also is not None:
        with_other: Options = {**options, "mask": also}
        make_problem(caller, q, k, v, **with_other)
    wide = torch.promote_types(problem.q.dtype, torch.float32)
    q, k, v = (x.detach().to(wide) for x in (problem.q, problem.k, problem.v))
    bias, alibi, sink_logits = (None if x is None else x.detach() for x in problem.scores[2:5])
    scores = problem.scores._replace(bias=bias, alibi=alibi, sink_logits=sink_logits, dropout=0.0, draw=None)
    return problem._replace(q=q, k=k, v=v, scores=scores)


def _saved(value: Any) -> Any:
    """The value as a backward pass may save it: not as a tensor of inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _solve(problem: Problem) -> Partial:
    """Output and lse."""
    out, lse = backends.solve("look", problem, "auto")
    assert lse is not None
    return Partial(out, lse)


def _rows(problem: Problem) -> Iterator[Problem]:
    """The problem, a few queries at a time, with all keys."""
    count = max(1, WEIGHTS_AT_ONCE // max(1, problem.q.shape[0] * problem.q.shape[1] * problem.lk))
    for start in range(0, max(problem.lq, 1), count):
        yield _of_queries(problem, start, min(start + count, problem.lq))


def _of_queries(problem: Problem, start: int, stop: int) -> Problem:
    """The problem of some queries that follow each other, with all keys."""
    return problem._replace(
        q=problem.q[:, :, start:stop],
        mask=problem.mask.select_queries(start, stop),
        offset=problem.offset + start,
        scores=problem.scores.select_queries(start, stop),
    )


def _chosen(problem: Problem, queries: Sequence[int]) -> Iterator[Problem]:
    """The problem, one of some queries at a time, with all keys."""
    for at in queries:
        require_int("top_keys", "each of queries", at)
        if not -problem.lq <= at < problem.lq:
            raise ValueError(
                f"top_keys: each of queries must be from {-problem.lq} to {problem.lq - 1}, for {problem.lq} queries; "
                f"got {at}."
            )
    for at in queries:
        yield _of_queries(problem, at % problem.lq, at % problem.lq + 1)
    if not queries:
        yield _of_queries(problem, 0, 0)


def _seen(part: Problem) -> tuple[int, Problem]:
    """The problem without keys that none of its queries sees, and the number of those before the others."""
    seen = trim(part)
    if isinstance(part.offset, Tensor) or isinstance(seen.offset, Tensor):
        return 0, seen
    return part.offset - seen.offset, seen


def _cuts(problem: Problem, windows: list[int], sink_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """`window_cut` for windows in order, from the keys of the first one and those that each adds to the one before."""
    is_sink = torch.arange(problem.lk, device=problem.q.device) < sink_tokens
    others = Mask.padding(~is_sink[None]) if sink_tokens else Mask.full()
    beyond = [~Mask.band(window - 1, None) & others for window in windows]
    within = [Mask.band(window - 1, None) for window in windows[1:]]
    try:
        first = problem.mask & Mask.band(windows[0] - 1, None, sink_tokens)
        added = [problem.mask & a & b for a, b in zip(beyond, [*within, Mask.full()], strict=True)]
    except ValueError:  # not masks that we have
        return [_cut(problem, Mask.band(window - 1, None, sink_tokens)) for window in windows]
    kept, *bands = _solve(problem._replace(mask=first)), *(_solve_without_sinks(problem, mask) for mask in added)
    inside = [*accumulate(bands[:-1], _merged, initial=kept)]
    outside = [*accumulate(reversed(bands), _merged)][::-1]
    return [*map(_cut_of, inside, outside)]


def _cut(problem: Problem, window: Mask) -> tuple[Tensor, Tensor]:
    """`window_cut` for a mask."""
    try:
        inside, outside = problem.mask & window, problem.mask & ~window
    except ValueError:  # not masks that we have
        start, found = 0, []
        for part in _rows(problem):
            seen = part.mask.visible(part.lq, part.lk, part.offset, device=part.q.device)
            shown = window.select_queries(start, start + part.lq)
            kept = shown.visible(part.lq, part.lk, part.offset, device=part.q.device)
            inside, outside = Mask.dense(seen & kept), Mask.dense(seen & ~kept)
            found.append(_cut_of(_solve(part._replace(mask=inside)), _solve_without_sinks(part, outside)))
            start += part.lq
        mass, change = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
        return mass, change
    return _cut_of(_solve(problem._replace(mask=inside)), _solve_without_sinks(problem, outside))


def _solve_without_sinks(problem: Problem, mask: Mask) -> Partial:
    """Output and lse under another mask, without the sink logits, which count once."""
    return _solve(problem._replace(mask=mask, scores=problem.scores._replace(sink_logits=None)))


def _merged(one: Partial, two: Partial) -> Partial:
    return Partial(*merge_stacked(torch.stack([one.out, two.out]), torch.stack([one.lse, two.lse])))


def _cut_of(kept: Partial, lost: Partial) -> tuple[Tensor, Tensor]:
    """Mass and change, from the keys that stay, with the sink logits, and those that go."""
    lse = torch.logaddexp(kept.lse, lost.lse)
    mass = (lost.lse - lse).exp().masked_fill(lse == -torch.inf, 0)
    moved = mass[..., None] * (kept.out - lost.out)
    # In fp64, whose squares of fp32 neither overflow nor vanish.
    way, old = (x.norm(dim=-1, dtype=torch.float64) for x in (moved, kept.out - moved))
    return mass, (way / old).masked_fill(way == 0, 0).to(mass.dtype)


def _as_values(columns: Tensor, problem: Problem) -> Tensor:
    """Values ``(B, Hkv, Lk, n)`` that are the columns ``(Lk, n)``."""
    return columns.expand(*problem.k.shape[:2], *columns.shape)


def _places(problem: Problem) -> Tensor:
    """``(Lk, 2)``: where keys are, from -1 to 1, and the square of that."""
    key = torch.arange(problem.lk, device=problem.q.device, dtype=problem.q.dtype)
    place = (key - (problem.lk - 1) / 2) / max(problem.lk / 2, 1)
    return torch.stack([place, place.square()], dim=1)


def _distance_of(places: Partial, problem: Problem) -> Distance:
    """The distance from the means of `_places`."""
    mean, square = places.out.unbind(-1)
    middle, reach = (problem.lk - 1) / 2, max(problem.lk / 2, 1)
    offset = problem.offset[:, None, None] if isinstance(problem.offset, Tensor) else problem.offset
    position = torch.arange(problem.lq, device=mean.device) + offset
    empty = places.lse == -torch.inf
    return Distance(
        (position - (middle + reach * mean)).masked_fill(empty, torch.nan),
        (reach * (square - mean.square()).clamp(min=0).sqrt()).masked_fill(empty, torch.nan),
    )


def _is_first(problem: Problem, first: int) -> Tensor:
    """``(Lk, 1)``, 1 for the first keys."""
    return (torch.arange(problem.lk, device=problem.q.device) < first).to(problem.q.dtype)[:, None]


def _mean_of_blocks(rows: Tensor, of_queries: Tensor) -> Tensor:
    """The mean of rows ``(B, H, Lq, n)`` over blocks of queries."""
    sizes = of_queries.bincount()
    mean = rows.new_zeros(*rows.shape[:2], len(sizes), rows.shape[3]).index_add_(2, of_queries, rows)
    mean /= sizes[:, None]
    return mean


def _blocks(tokens: int, blocks: int, device: torch.device) -> Tensor:
    """The block of each token."""
    return torch.arange(tokens, device=device) * min(blocks, tokens) // max(tokens, 1)


def _indicator(block: Tensor, dtype: torch.dtype) -> Tensor:
    """``(tokens, blocks)``, 1 where a token is in a block."""
    count = int(block[-1]) + 1 if len(block) else 0
    return (block[:, None] == torch.arange(count, device=block.device)).to(dtype)
