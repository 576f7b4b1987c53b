"""`exchange`: rows of tensors from rank to rank by a `Plan`, in one collective, with gradients summed in fp32."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from qkv.parallel.plan import Buffer, Move, Plan
from qkv.torch_internals import tracing_state
from qkv.tracing import is_exact_tensor


class Route(NamedTuple):
    """A process group, the place of this process in it, and for what ranks exchange rows."""

    group: Any
    rank: int
    ranks: int
    caller: str = "qkv.parallel"
    """which error messages name"""
    call: int = 0
    """a number that ranks have in common which make the same call"""


class Exchanged(NamedTuple):
    """What arrived."""

    kinds: list[list[tuple[Tensor, ...]]]
    """of each kind, for each output of its buffer, the tensors"""
    link: Tensor
    """empty; for `depend`"""


def exchange(plan: Plan, route: Route, *kinds: Sequence[Tensor]) -> Exchanged:
    """Sends and receives rows of tensors ``(B, heads, rows, width)``.

    Args:
        plan: of this rank.
        route: whose ranks take part; all of them must call this alike, in the forward pass and in the backward pass.
        kinds: the tensors of each kind of the plan, which move together.

    Gradients travel back in the dtype of the tensors, and are summed in fp32 or higher, in the order of ranks.

    Raises:
        TypeError: for DTensors.
        ValueError: while a program is exported or traced, and for rows of another call.
    """
    if torch.compiler.is_compiling() or tracing_state():
        raise ValueError(
            f"{route.caller}: a call over ranks is no part of an exported or traced program, as each rank has its own; "
            "export the model without a layout."
        )
    kind_of = [kind for kind, tensors in enumerate(kinds) for _ in tensors]
    flat = [tensor for tensors in kinds for tensor in tensors]
    _require_local(route.caller, flat)
    link, *outputs = _Exchange.apply(plan, route, kind_of, *flat)  # type: ignore[no-untyped-call]
    found = iter(outputs)
    by_tensor = [[next(found) for _ in plan.buffers[kind].outputs] for kind in kind_of]
    results: list[list[tuple[Tensor, ...]]] = []
    for kind in range(len(kinds)):
        own = [each for each, of in zip(by_tensor, kind_of, strict=True) if of == kind]
        results.append(list(zip(*own, strict=True)))
    return Exchanged(results, link)


def _require_local(caller: str, tensors: Sequence[Tensor]) -> None:
    if all(map(is_exact_tensor, tensors)):
        return
    from torch.distributed.tensor import DTensor  # takes a second

    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise TypeError(
            f"{caller}: tensors must be plain ones, of the rows of this rank; got a DTensor. Pass x.to_local() of one "
            "that is sharded by the layout, or tokens.take(x.full_tensor())."
        )


def depend(out: Tensor, link: Tensor) -> Tensor:
    """``out``, whose backward pass reaches that of the exchange, used or not: a rank without rows must take part."""
    result: Tensor = _Depend.apply(out, link)  # type: ignore[no-untyped-call]
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, route: Route, kind_of: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.route, ctx.kind_of = plan, route, kind_of
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        targets = [_filled(tensor, plan.buffers[kind]) for tensor, kind in zip(tensors, kind_of, strict=True)]

        def write(index: int, move: Move, rows: Tensor) -> None:
            _part(targets[index], move).copy_(rows)

        sources = [
            _Source(index, kind, tensor, tensor.dtype)
            for index, (kind, tensor) in enumerate(zip(kind_of, tensors, strict=True))
        ]
        _send(plan.sends, plan.receives, plan.is_local, route, sources, write)
        outputs = [
            _rows(target, rows)
            for target, kind in zip(targets, kind_of, strict=True)
            for rows in plan.buffers[kind].outputs
        ]
        return torch.zeros(0, device=tensors[0].device), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        plan, given = ctx.plan, iter(gradients)
        sources: list[_Source] = []
        results: list[Tensor | None] = [None] * len(ctx.like)
        for index, (kind, (shape, dtype, device)) in enumerate(zip(ctx.kind_of, ctx.like, strict=True)):
            buffer = plan.buffers[kind]
            own = [next(given) for _ in buffer.outputs]
            if ctx.needs_input_grad[3 + index]:
                total = _summed(own, buffer, shape, dtype, device)
                sources.append(_Source(index, kind, total, dtype))
                results[index] = torch.zeros(shape, dtype=total.dtype, device=device)

        def add(index: int, move: Move, rows: Tensor) -> None:
            result = results[index]
            assert result is not None
            _part(result, move).add_(rows)

        _send(plan.receives, plan.sends, plan.is_local, ctx.route, sources, add)
        for source in sources:
            result = results[source.place]
            assert result is not None
            results[source.place] = result.to(source.dtype)
        return None, None, None, *results


class _Depend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, link: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _filled(like: Tensor, buffer: Buffer) -> Tensor:
    """Memory for what arrives, 0 where nothing does."""
    target = like.new_empty(like.shape[0], buffer.heads, buffer.rows, like.shape[3])
    for start, stop in buffer.holes:
        target[:, :, start:stop].zero_()
    return target


def _rows(target: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of the target: a view if they lie next to each other."""
    if len(intervals) == 1:
        return target[:, :, intervals[0][0] : intervals[0][1]]
    if not intervals:
        return target[:, :, :0]
    return torch.cat([target[:, :, start:stop] for start, stop in intervals], dim=2)


def _summed(
    gradients: Sequence[Tensor | None], buffer: Buffer, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The gradient of a buffer, the sum of those of its outputs, in fp32 or higher."""
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(shape[0], buffer.heads, buffer.rows, shape[3], dtype=wide, device=device)
    for gradient, intervals in zip(gradients, buffer.outputs, strict=True):
        at = 0
        for start, stop in intervals if gradient is not None else ():
            assert gradient is not None
            total[:, :, start:stop] += gradient[:, :, at : at + stop - start]
            at += stop - start
    return total


class _Source(NamedTuple):
    """A tensor whose rows are sent."""

    place: int
    """among all tensors of the exchange"""
    kind: int
    tensor: Tensor
    dtype: torch.dtype
    """in which its rows travel"""

    def numbers(self, move: Move) -> int:
        """How many numbers a move takes."""
        return move.size() * self.tensor.shape[0] * self.tensor.shape[3]

    def shape(self, move: Move) -> tuple[int, ...]:
        (first, end), (start, stop) = move.heads, move.rows
        return self.tensor.shape[0], end - first, stop - start, self.tensor.shape[3]


def _send(
    outgoing: Sequence[Sequence[Move]],
    incoming: Sequence[Sequence[Move]],
    is_local: bool,
    route: Route,
    sources: Sequence[_Source],
    take: Callable[[int, Move, Tensor], None],
) -> None:
    """Sends parts of the sources, and calls ``take(place, move, rows)`` for each that arrives, in the order of ranks.

    Own rows come as they are, those of others as they travelled. Each dtype is a collective of its own.
    """
    for dtype in dict.fromkeys(source.dtype for source in sources):
        alike = [source for source in sources if source.dtype is dtype]
        arrived = iter([] if is_local else _all_to_all(outgoing, incoming, route, alike))
        for peer, moves in enumerate(incoming):
            if peer != route.rank:
                for source, move in _each(moves, alike):
                    take(source.place, move, next(arrived))
                continue
            for mine, theirs in zip(outgoing[peer], moves, strict=True):
                for source, _ in _each([mine], alike):
                    take(source.place, theirs, _part(source.tensor, mine))


def _each(moves: Sequence[Move], sources: Sequence[_Source]) -> list[tuple[_Source, Move]]:
    """Each move of each source, in the order in which they travel."""
    return [(source, move) for move in moves for source in sources if source.kind == move.kind]


def _part(tensor: Tensor, move: Move) -> Tensor:
    return tensor[:, slice(*move.heads), slice(*move.rows)]


def _all_to_all(
    outgoing: Sequence[Sequence[Move]], incoming: Sequence[Sequence[Move]], route: Route, sources: Sequence[_Source]
) -> list[Tensor]:
    """What arrives from other ranks, part by part.

    Raises:
        ValueError: on a CPU, if a rank sends what belongs to another call.
    """

    def others(moves: Sequence[Sequence[Move]]) -> list[list[tuple[_Source, Move]]]:
        return [[] if peer == route.rank else _each(of_peer, sources) for peer, of_peer in enumerate(moves)]

    leaving, arriving = others(outgoing), others(incoming)
    sent, expected = (
        [sum(source.numbers(move) for source, move in of_peer) for of_peer in moves] for moves in (leaving, arriving)
    )
    like = sources[0].tensor
    heading = HEADING // like.element_size() if like.is_cpu else 0
    sizes, expected_sizes = ([count + heading if count else 0 for count in each] for each in (sent, expected))
    packed, received = like.new_empty(sum(sizes)), like.new_zeros(sum(expected_sizes))
    for of_peer, count, message in zip(leaving, sent, packed.split(sizes), strict=True):
        if count and heading:
            message[:heading].view(torch.uint8).copy_(_heading(route, count, like))
        parts = [_part(source.tensor, move) for source, move in of_peer]
        for part, space in zip(parts, message[heading:].split([part.numel() for part in parts]), strict=True):
            space.view(part.shape).copy_(part)
    distributed.all_to_all_single(received, packed, expected_sizes, sizes, group=route.group)
    found: list[Tensor] = []
    for peer, (of_peer, count, message) in enumerate(
        zip(arriving, expected, received.split(expected_sizes), strict=True)
    ):
        if count and heading and not torch.equal(message[:heading].view(torch.uint8), _heading(route, count, like)):
            raise ValueError(
                f"{route.caller}: all ranks must make the same call; rank {peer} has made another than rank "
                f"{route.rank}. Set the environment variable QKV_CHECK=1: ranks then compare calls before anything is "
                "sent, and say in what they differ."
            )
        parts = list(message[heading:].split([source.numbers(move) for source, move in of_peer]))
        found += [part.view(source.shape(move)) for part, (source, move) in zip(parts, of_peer, strict=True)]
    return found


HEADING = 16
"""Bytes before the rows of a message on a CPU, where gloo takes messages that are too short without an error."""


def _heading(route: Route, count: int, like: Tensor) -> Tensor:
    """The bytes before so many numbers, in a message of the same call. On a GPU, they would have to be waited for."""
    numbers = torch.tensor([route.call, count * like.element_size()], dtype=torch.int64, device="cpu")
    return numbers.view(torch.uint8)
