"""`copied` and `summed`: how tensors enter and leave what ranks compute of one layer together."""

from typing import Any

import torch
from torch import Tensor, distributed


def copied(x: Tensor, group: "distributed.ProcessGroup") -> Tensor:
    """A tensor that all ranks of the group have alike, each for its part of the work.

    Its gradient is the sum over ranks, in the same bits on each.
    """
    if not torch.is_grad_enabled() or not x.requires_grad:
        return x
    copy: Tensor = _Copied.apply(x, group)  # type: ignore[no-untyped-call]
    return copy


def summed(x: Tensor, group: "distributed.ProcessGroup") -> Tensor:
    """The sum over the ranks of the group, in the same bits on each. Its gradient, alike on all ranks, is that of x."""
    total: Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def of_first_rank(numbers: Tensor, group: "distributed.ProcessGroup", device: str) -> Tensor:
    """Integers of the first rank of the group, on the CPU; sent by way of a device of the group's mesh."""
    own = numbers if distributed.get_rank(group) == 0 else torch.zeros_like(numbers)
    return _sum(own.to(device), group).to(numbers.device)


def _sum(x: Tensor, group: "distributed.ProcessGroup") -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "distributed.ProcessGroup") -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_copy: Tensor) -> tuple[Tensor, None]:
        return _sum(d_copy, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "distributed.ProcessGroup") -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        return d_total, None
