"""Whether a call may bypass torch's dispatcher, which costs more than a short call of the kernel."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkv.kernels.binding import absence


def can_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Whether the kernel is loaded and may be called without torch's dispatcher.

    No tracer, functorch transform or autograd is active, and every argument is exactly a Tensor or Parameter, on any
    device, strided and not lazily negated. (Memory of a lazy negation, such as ``z.conj().imag``, has the wrong sign;
    the dispatcher would negate it.)
    """
    if (
        is_tracing()
        or absence() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    if not all(
        is_exact_tensor(tensor) and tensor.layout is torch.strided and not tensor.is_neg() for tensor in tensors
    ):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def is_exact_tensor(tensor: object) -> bool:
    """Whether the type is Tensor or Parameter and not a subclass, which may change what operators do."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def can_read_values(*tensors: Tensor) -> bool:
    """Whether the numbers in the tensors can be read: not while tracing or batching."""
    return (
        all(map(is_exact_tensor, tensors))
        and not is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def is_tracing() -> bool:
    """Whether a compiler, a tracer or a dispatch mode records operators."""
    return bool(
        torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack() > 0
    )


def can_backward_bypass_dispatcher(d_out: Tensor) -> bool:
    """`can_bypass_dispatcher` for a backward pass. Second derivatives go to the operator, which refuses them.

    Raises:
        NotImplementedError: for batched gradients.
    """
    if torch._C._functorch.is_legacy_batchedtensor(d_out):
        raise NotImplementedError(
            "qkv's kernel has no batched gradients (is_grads_batched=True, vectorize=True): "
            "compute them one by one, or pass attention(..., backend='sdpa')."
        )
    recorded = torch.is_grad_enabled() or is_tracing() or torch._C._are_functorch_transforms_active()
    return not recorded and type(d_out) is Tensor
