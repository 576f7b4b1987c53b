"""Whether a call may bypass torch's dispatcher, which costs more than a short call of the kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from qkv.kernels.binding import absence
from qkv.torch_internals import forward_mode_is_active, function_modes, is_legacy_batched, transforms_are_active
from qkv.tracing import is_tracing


def can_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Whether the kernel is loaded and may be called without torch's dispatcher.

    No tracer, functorch transform or autograd is active, and every argument is exactly a Tensor or Parameter, on any
    device, strided and not lazily negated. (Memory of a lazy negation, such as ``z.conj().imag``, has the wrong sign;
    the dispatcher would negate it.)
    """
    return dispatcher_is_idle() and are_plain(tensors)


def dispatcher_is_idle() -> bool:
    """The part of `can_bypass_dispatcher` that is about the call and not about its arguments."""
    return not is_tracing() and absence() is None and not transforms_are_active() and not forward_mode_is_active()


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """The part of `can_bypass_dispatcher` that is about the arguments."""
    records = torch.is_grad_enabled()
    for tensor in tensors:  # in a loop, and without `is_exact_tensor`: this is most of what a short call costs
        kind = type(tensor)
        if (kind is not Parameter and kind is not Tensor) or tensor.layout is not torch.strided or tensor.is_neg():
            return False
        if records and tensor.requires_grad:
            return False
    return True


def can_bypass_functions(*tensors: Tensor) -> bool:
    """`can_bypass_dispatcher` for what stands for functions of torch: modes that watch those, and autocast, are off."""
    return can_bypass_dispatcher(*tensors) and not function_modes() and not torch.is_autocast_enabled("cpu")


def can_backward_bypass_dispatcher(d_out: Tensor) -> bool:
    """`can_bypass_dispatcher` for a backward pass. Second derivatives go to the operator, which refuses them.

    Raises:
        NotImplementedError: for batched gradients.
    """
    if is_legacy_batched(d_out):
        raise NotImplementedError(
            "qkv's kernel has no batched gradients (is_grads_batched=True, vectorize=True): "
            "compute them one by one, or pass attention(..., backend='sdpa')."
        )
    recorded = torch.is_grad_enabled() or is_tracing() or transforms_are_active()
    return not recorded and type(d_out) is Tensor
