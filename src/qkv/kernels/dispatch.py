"""Whether a call may bypass the dispatcher of torch, which costs more than a short call of the kernel."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkv.kernels.binding import absence


def can_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Whether the kernel is loaded and may be called without torch's dispatcher.

    No tracer, functorch transform or autograd is active, and every argument is exactly a Tensor or Parameter, on any
    device, whose numbers are in its memory. Those of a lazy negation, such as ``z.conj().imag``, are not: the
    dispatcher negates them.
    """
    if (
        is_tracing()
        or absence() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    if not all(is_plain(tensor) and tensor.layout is torch.strided and not tensor.is_neg() for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def is_plain(tensor: object) -> bool:
    """Whether it is exactly a Tensor or a Parameter, rather than a subclass with behaviour of its own."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def is_tracing() -> bool:
    """Whether operators are being recorded, by a compiler, a tracer or a dispatch mode."""
    return bool(
        torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack() > 0
    )


def can_backward_bypass_dispatcher(d_out: Tensor) -> bool:
    """`can_bypass_dispatcher` for a backward pass. Gradients of gradients need the operator, which refuses them.

    Raises:
        NotImplementedError: for several gradients at once.
    """
    if torch._C._functorch.is_legacy_batchedtensor(d_out):
        raise NotImplementedError(
            "qkv's kernel has no batched gradients (is_grads_batched=True, vectorize=True): "
            "take them one by one, or give attention(..., backend='sdpa')."
        )
    recorded = torch.is_grad_enabled() or is_tracing() or torch._C._are_functorch_transforms_active()
    return not recorded and type(d_out) is Tensor
