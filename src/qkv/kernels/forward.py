"""The ways into the compiled forward pass.

| way | when | costs beside the kernel |
|---|---|---|
| `fast_forward` | q, k, v, an interval, padding and a scale; no gradient, no lse, no tracer | FAST |
| `forward` without a gradient | any `Call` of plain tensors | PLAIN |
| `forward` with gradients: an autograd function | as before | GRAD |
| ``torch.ops.qkv.forward`` | operators are being recorded | OPS |

`qkv.backends.native` decides which calls may take the first; `forward` chooses among the others. Several sequences in
one call (`qkv.kernels.sequences`) have the last three ways as well.
"""

import torch
from torch import Tensor

from qkv.kernels import operators
from qkv.kernels.binding import loaded
from qkv.kernels.dispatch import is_tracing
from qkv.kernels.structs import Call, bounded, pack


def fast_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    keep: Tensor | None,
    lengths: Tensor | None,
    left: int | None,
    right: int | None,
    sink_tokens: int,
    offset: int,
    scale: float,
) -> Tensor | None:
    """Attention of tensors that `can_bypass_dispatcher`, which one call of C reads through DLPack's exchange functions.

    Returns:
        None for tensors that do not fit together or need another way: shapes, dtypes and strides are checked in C
        (native/src/abi/fast_forward.cpp).
    """
    call = loaded().fast_forward
    if call is None:
        return None
    out = operators.new_out(q, v)
    tensors = (q, k, v, out, k_scale, v_scale, keep, lengths)
    interval = (bounded(left), bounded(right), bounded(sink_tokens))
    return None if call(*tensors, offset, *interval, scale, torch.get_num_threads()) else out


def forward(call: Call, *, wants_lse: bool, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Attention ``(B, H, Lq, Dv)`` and, if wanted, its lse ``(B, H, Lq)``, in fp32.

    Raises:
        MemoryError: where the kernel's scratch memory cannot be allocated.
    """
    if is_tracing():
        out, lse = torch.ops.qkv.forward(*call)
    elif needs_grad:
        out, lse = operators.Recorded.apply(*call)  # type: ignore[no-untyped-call]
    else:
        return operators.forward(call, wants_lse=wants_lse)
    return out, lse if wants_lse else None


def count_scores(call: Call) -> int:
    """How many scores the kernel computes for a call: those that the mask shows, and a little around its edges."""
    problem, _kept = pack(call, call.q, None)
    return loaded().count_scores(problem)
