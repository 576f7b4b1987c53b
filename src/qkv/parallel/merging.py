"""`merge` over ranks: the result over all keys from those that ranks have over their own."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from qkv.arguments import require_tensors
from qkv.backends.result import accumulation_dtype
from qkv.parallel.agreement import agreed, number_of
from qkv.parallel.compiling import between_graphs
from qkv.parallel.exchange import Route, exchange
from qkv.parallel.plan import stacking
from qkv.partial import Partial, merge_stacked


@between_graphs
def merge(partial: Partial | tuple[Tensor, Tensor], group: DeviceMesh | Any) -> Partial:
    """`qkv.merge` over ranks: each has the result of the same queries over its own keys, and gets that over all keys.

    Partial results travel in fp32 or higher and are merged in the order of ranks, so all ranks get the same bits.

    Args:
        partial: ``(out, lse)`` of this rank, as `qkv.attention_with_lse` returns them. Sink logits must be passed on
            one rank only.
        group: a DeviceMesh of one dimension, or a process group; None for all processes.

    Returns:
        ``out`` in the dtype of this rank's, and the ``lse`` over all keys. Both are differentiable; gradients are
        those of the sum of all ranks' losses.

    Raises:
        TypeError: for anything but a pair of tensors, and a group of another type.
        ValueError: for other shapes than ``(B, H, Lq, Dv)`` and ``(B, H, Lq)``, and than those of other ranks, for
            integers, and a mesh of more dimensions.

    Example:
        >>> partial = qkv.attention_with_lse(q, k_of_rank, v_of_rank)  # doctest: +SKIP
        >>> out, lse = parallel.merge(partial, mesh)  # doctest: +SKIP

    Source: Tree attention (Shyam et al. 2024), with one exchange in place of three sums, whose order is a library's.
    """
    route = _route_of(group)._replace(caller=_CALLER)
    out, lse = agreed(_CALLER, route, lambda: _required(partial), _described)
    route = route._replace(call=number_of(_described((out, lse))))
    wide = accumulation_dtype(out.dtype)
    plan = stacking(out.shape[1], out.shape[2], route.ranks)
    parts = exchange(plan, route, [out.to(wide), lse.to(wide)[..., None]]).kinds[0]
    merged = merge_stacked(torch.stack([part[0] for part in parts]), torch.stack([part[1][..., 0] for part in parts]))
    return Partial(merged.out.to(out.dtype), merged.lse)


_CALLER = "parallel.merge"


def _required(partial: Any) -> tuple[Tensor, Tensor]:
    """A partial result of one rank."""
    if not isinstance(partial, (tuple, list)) or len(partial) != 2:
        raise TypeError(f"{_CALLER}: partial must be a pair of tensors (out, lse); got {type(partial).__name__}.")
    out, lse = partial
    require_tensors(_CALLER, out=out, lse=lse)
    if out.dim() != 4 or lse.shape != out.shape[:3]:
        raise ValueError(
            f"{_CALLER}: partial must be out (B, H, Lq, Dv) and lse (B, H, Lq); "
            f"got {tuple(out.shape)} and {tuple(lse.shape)}."
        )
    if not (out.is_floating_point() and lse.is_floating_point()):
        raise ValueError(f"{_CALLER}: out and lse must be floating-point; got {out.dtype} and {lse.dtype}.")
    return out, lse


def _described(partial: tuple[Tensor, Tensor]) -> dict[str, str]:
    """What all ranks must have in common."""
    return {"out": f"<{partial[0].dtype} {tuple(partial[0].shape)}>"}


def _route_of(group: Any) -> Route:
    if not (group is None or isinstance(group, (DeviceMesh, distributed.ProcessGroup))):
        raise TypeError(
            "parallel.merge: group must be a DeviceMesh, a process group, or None for all processes; "
            f"got {type(group).__name__}."
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"parallel.merge: group must have one dimension; got a mesh of {group.ndim}. Take one of them by its "
                "name: mesh['cp']."
            )
        return Route(group.get_group(), group.get_local_rank(), group.size())
    return Route(group, distributed.get_rank(group), distributed.get_world_size(group))
