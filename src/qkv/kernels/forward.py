"""The entry points of the compiled forward pass.

| entry point | when | overhead |
|---|---|---|
| `fast_forward` | q, k, v, pages, offsets, an interval, padding and a scale; no gradient, lse or tracer | 3 us |
| `forward` without gradients | any `Call` of exact tensors | 10 us |
| `forward` with gradients: `operators.Forward` | the same | 35 us |
| ``torch.ops.qkv.forward`` | operators are being recorded | 190 us |

The overhead is that of an entry point alone, with gradients in the last two, as benchmarks/overhead.py measures it:
with a function that does nothing in the place of the kernel's.
`qkv.backends.native` decides which calls take the first; `forward` chooses among the others. `qkv.kernels.sequences`
has the last three for several sequences in one call.
"""

import torch
from torch import Tensor

from qkv.kernels import operators
from qkv.kernels.binding import loaded
from qkv.kernels.structs import Call, bounded, pack
from qkv.pages import Pages
from qkv.tracing import is_tracing

KEY_PERIOD = 1440
"""Over keys from a multiple of it on, forward and dq have the same bits as over all, where the mask hides those before.

The kernel accumulates splits of KV_SPLIT keys, and gradients of BWD_BLOCK_N keys, each from the first key on; this is
their least common multiple (native/src/sizes.h)."""


def fast_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    pages: Pages | None,
    offsets: Tensor | None,
    keep: Tensor | None,
    lengths: Tensor | None,
    left: int | None,
    right: int | None,
    sink_tokens: int,
    offset: int,
    scale: float,
) -> Tensor | None:
    """Attention in one call of C, which reads tensors through DLPack. They must satisfy `can_bypass_dispatcher`.

    Returns:
        ``(B, H, Lq, Dv)``; None for tensors that do not fit together or are not supported. Shapes, dtypes and strides
        are checked in C (native/src/abi/fast_forward.cpp).
    """
    call = loaded().fast_forward
    if call is None:
        return None
    out = operators.new_out(q, v)
    table, length = (None, 0) if pages is None else pages
    tensors = (q, k, v, out, k_scale, v_scale, table, offsets, keep, lengths)
    interval = (bounded(left), bounded(right), bounded(sink_tokens))
    return None if call(*tensors, length, offset, *interval, scale, torch.get_num_threads()) else out


def forward(call: Call, *, wants_lse: bool, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Attention ``(B, H, Lq, Dv)`` and, if wanted, its lse ``(B, H, Lq)``, in fp32.

    Raises:
        ValueError: for offsets out of bounds, which only the kernel can check in compiled programs.
        MemoryError: if scratch memory cannot be allocated.
    """
    if is_tracing():
        out, lse = torch.ops.qkv.forward(*call)
    elif needs_grad:
        out, lse = operators.Forward.apply(*call)  # type: ignore[no-untyped-call]
    else:
        return operators.forward(call, wants_lse=wants_lse)
    return out, lse if wants_lse else None


def count_scores(call: Call) -> int:
    """Number of scores that the kernel computes for a call: the visible ones, and some at the edges of the mask."""
    problem, _alive = pack(call, call.q, None)
    return loaded().count_scores(problem)
