"""A sliding window as attention of blocks of queries to the keys around each: linear in the length.

The queries are cut into blocks of equal size. All blocks away from the ends see keys in the same arrangement, so they
become the batch of one smaller problem, whose keys are overlapping views. The ends are smaller problems of their own.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qkv.backends.result import Result
from qkv.problem import Problem

SMALLEST_BLOCK = 64


def pays(problem: Problem) -> bool:
    """Whether blocks compute less than half of what a dense mask does."""
    mask = problem.mask
    if mask.left is None or mask.right is None or mask.allow is not None or problem.bias is not None:
        return False
    if problem.alibi is not None and mask.sink_tokens:
        return False  # Blocks move the sinks next to the window, which changes their distance.
    size = _block_size(problem)
    start, stop = _interior(problem)
    return stop - start >= 2 * size and problem.lk > 2 * (mask.sink_tokens + mask.left + size + mask.right)


def run(problem: Problem, solve: Callable[[Problem], Result]) -> Result:
    """The result of `problem`, from problems that `solve` solves."""
    start, stop = _interior(problem)
    parts: list[Result] = []
    if start > 0:
        parts.append(solve(problem.select_queries(0, start)))
    parts.append(_unstack(solve(_stack(problem, start, stop)), problem.q.shape[0]))
    if stop < problem.lq:
        parts.append(solve(problem.select_queries(stop, problem.lq)))
    lse = None
    if parts[0].lse is not None:
        lse = torch.cat([part.lse for part in parts if part.lse is not None], dim=2)
    return Result(torch.cat([part.out for part in parts], dim=2), lse)


def _block_size(problem: Problem) -> int:
    """Queries in a block: half the window keeps both the wasted scores and the overlap of the keys small."""
    mask = problem.mask
    assert mask.left is not None and mask.right is not None
    return max(SMALLEST_BLOCK, (mask.left + mask.right + 1) // 2)


def _interior(problem: Problem) -> tuple[int, int]:
    """The rows of the whole blocks whose every key exists and lies behind the sinks."""
    mask, offset = problem.mask, problem.offset
    assert mask.left is not None and mask.right is not None
    start = max(0, mask.sink_tokens + mask.left - offset)
    end = min(problem.lq, problem.lk - mask.right - offset)
    size = _block_size(problem)
    return start, start + max(0, end - start) // size * size


def _stack(problem: Problem, start: int, stop: int) -> Problem:
    """The blocks of rows ``start .. stop - 1`` as the batch of one problem."""
    mask = problem.mask
    assert mask.left is not None and mask.right is not None
    size = _block_size(problem)
    count = (stop - start) // size
    span = mask.left + size + mask.right
    first_key = start + problem.offset - mask.left
    last_key = first_key + (count - 1) * size + span

    def windows(tensor: Tensor, dim: int) -> Tensor:
        """The keys that each block sees, (B, blocks, ...), behind the sinks."""
        keys = tensor.narrow(dim, first_key, last_key - first_key).unfold(dim, span, size)
        keys = keys.movedim(dim, 1).movedim(-1, dim + 1)
        if mask.sink_tokens:
            sinks = tensor.narrow(dim, 0, mask.sink_tokens).unsqueeze(1)
            keys = torch.cat([sinks.expand(-1, count, *sinks.shape[2:]), keys], dim=dim + 1)
        return keys.flatten(0, 1)

    queries = problem.q[:, :, start:stop].unflatten(2, (count, size)).movedim(2, 1).flatten(0, 1)
    keep = mask.keep_keys(problem.lk)
    ids = mask.document_ids
    batch = problem.q.shape[0]
    stacked = replace(
        mask,
        keep=None if keep is None else windows(keep.expand(batch, -1), 1),
        lengths=None,
        document_ids=None if ids is None else windows(ids.expand(batch, -1), 1),
    )
    return problem._replace(
        q=queries,
        k=windows(problem.k, 2),
        v=windows(problem.v, 2),
        mask=stacked,
        offset=mask.sink_tokens + mask.left,
    )


def _unstack(result: Result, batch: int) -> Result:
    out, lse = (
        None if tensor is None else tensor.unflatten(0, (batch, -1)).movedim(1, 2).flatten(2, 3) for tensor in result
    )
    assert out is not None
    return Result(out, lse)
