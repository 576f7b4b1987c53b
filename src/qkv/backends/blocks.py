"""Windows and chunks as attention of blocks of queries to the keys around each: linear in the length.

The queries are cut into blocks of equal size. All blocks away from the ends see keys in the same arrangement, so they
become the batch of one smaller problem, whose keys are overlapping views, or views of whole chunks. The ends are two
more small problems.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.backends.result import Result
from qkv.masks import Mask
from qkv.problem import Problem

MIN_BLOCK_SIZE = 64


class Plan(NamedTuple):
    """Size and position of the blocks."""

    left: int
    right: int
    size: int
    """queries in a block: half the window, which keeps both hidden scores and overlapping keys few, or whole chunks"""
    start: int
    stop: int
    """the query rows of the blocks: whole blocks, whose keys all exist and come after the sinks"""
    first_key: int
    """the first key of the first block, after the sinks"""

    @property
    def span(self) -> int:
        """Number of keys that a block sees, sinks apart."""
        return self.left + self.size + self.right


def plan(problem: Problem) -> Plan | None:
    """The blocks; None if they cannot be used, or compute at least half the scores of a dense mask."""
    mask, offset = problem.mask, problem.offset
    if mask.allow is not None or problem.scores.bias is not None or _has_far_keys(mask):
        return None
    if isinstance(offset, Tensor):
        return None  # Blocks of different rows would see keys in different arrangements.
    if problem.scores.alibi is not None and mask.sink_tokens:
        return None  # Blocks move the sinks next to the window, which changes their distance.
    if torch.compiler.is_exporting():
        return None  # The choice depends on lengths, which may be symbolic.
    if mask.chunk is not None:
        left = right = 0
        size = -(-MIN_BLOCK_SIZE // mask.chunk) * mask.chunk
        start = max(0, -offset)
        start += (mask.chunk_start - offset - start) % mask.chunk
    elif mask.left is not None and mask.right is not None and min(mask.left, mask.right) >= 0:
        left, right = mask.left, mask.right
        size = max(MIN_BLOCK_SIZE, (left + right + 1) // 2)
        start = max(0, mask.sink_tokens + left - offset)
    else:
        return None
    end = min(problem.lq, problem.lk - right - offset)
    stop = start + max(0, end - start) // size * size
    plan = Plan(left, right, size, start, stop, start + offset - left)
    pays = plan.stop - start >= 2 * size and problem.lk > 2 * (mask.sink_tokens + plan.span)
    return plan if pays else None


def _has_far_keys(mask: Mask) -> bool:
    """Whether keys other than sinks may be visible outside of the window."""
    return bool(mask.prefix_tokens) or mask.prefix_lengths is not None or mask.is_global is not None


def run(problem: Problem, plan: Plan, solve: Callable[[Problem], Result]) -> Result:
    """The result of ``problem``: its parts, each computed by ``solve``, concatenated."""
    parts: list[Result] = []
    if plan.start > 0:
        parts.append(solve(problem.select_queries(0, plan.start)))
    parts.append(_unstack(solve(_stack(problem, plan)), problem.q.shape[0]))
    if plan.stop < problem.lq:
        parts.append(solve(problem.select_queries(plan.stop, problem.lq)))
    lse = None
    if parts[0].lse is not None:
        lse = torch.cat([part.lse for part in parts if part.lse is not None], dim=2)
    return Result(torch.cat([part.out for part in parts], dim=2), lse)


def _stack(problem: Problem, plan: Plan) -> Problem:
    """The blocks as the batch of one problem."""
    mask, batch = problem.mask, problem.q.shape[0]
    count = (plan.stop - plan.start) // plan.size
    first_key = plan.first_key
    num_keys = (count - 1) * plan.size + plan.span

    def windows(tensor: Tensor, dim: int) -> Tensor:
        """The sinks and then the keys that each block sees, (B * blocks, ...)."""
        keys = tensor.narrow(dim, first_key, num_keys).unfold(dim, plan.span, plan.size)
        keys = keys.movedim(dim, 1).movedim(-1, dim + 1)
        if mask.sink_tokens:
            sinks = tensor.narrow(dim, 0, mask.sink_tokens).unsqueeze(1)
            keys = torch.cat([sinks.expand(-1, count, *sinks.shape[2:]), keys], dim=dim + 1)
        return keys.flatten(0, 1)

    keep = mask.keep_keys(problem.lk)
    positional = mask.positional_tensors()
    by_block: dict[str, Any] = {name: windows(x.expand(batch, -1), 1) for name, x in positional.items()}
    queries: Tensor = problem.q[:, :, plan.start : plan.stop].unflatten(2, (count, plan.size))
    return problem._replace(
        q=queries.movedim(2, 1).flatten(0, 1),
        k=windows(problem.k, 2),
        v=windows(problem.v, 2),
        mask=replace(
            mask,
            keep=None if keep is None else windows(keep.expand(batch, -1), 1),
            lengths=None,
            # Blocks are whole chunks.
            chunk=None if plan.size == mask.chunk else mask.chunk,
            chunk_start=0,
            **by_block,
        ),
        offset=mask.sink_tokens + plan.left,
    )


def _unstack(result: Result, batch: int) -> Result:
    """The result of all blocks as consecutive query rows, (B, H, rows, ...)."""

    def rows(tensor: Tensor) -> Tensor:
        blocks: Tensor = tensor.unflatten(0, (batch, -1))
        return blocks.movedim(1, 2).flatten(2, 3)

    return Result(rows(result.out), None if result.lse is None else rows(result.lse))
