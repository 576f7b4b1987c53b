"""What torch does not document, in one place: each name with what it tells, and what is used where a release lacks it.

Without these names there is no asking whether a call may go past torch's dispatcher. So what stands for a question that
can no longer be asked is the answer of caution: a transform is active, a mode watches, a tensor is batched. Calls are
torch's then, slower and as right. tests/repository/test_private_names.py lists all that this package reads of torch,
also attributes of modules, such as ``_parameters``, which have no other home than the module.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)

transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""whether a transform of torch.func, such as vmap or grad, is active"""

tracing_state: Callable[[], object] = getattr(torch._C, "_get_tracing_state", lambda: None)
"""what torch.jit.trace records, if it runs; None where there is no such tracer any more"""

dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
"""number of modes that see operators"""

function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
"""number of modes that see functions, such as ``torch.set_default_device``"""

graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
"""number of the backward pass that runs; -1 for none"""

is_legacy_batched: Callable[[Tensor], bool] = getattr(_FUNCTORCH, "is_legacy_batchedtensor", lambda tensor: False)
"""whether a tensor is one of ``is_grads_batched=True``; False where there are none any more"""

is_zero_tensor: Callable[[Tensor], bool] = getattr(torch, "_is_zerotensor", lambda tensor: True)
"""whether a tensor is zeros without memory, as of ``torch._efficientzerotensor``"""

without_functions: Callable[[], contextlib.AbstractContextManager[None]] = getattr(
    torch._C, "DisableTorchFunction", contextlib.nullcontext
)
"""a context in which no mode and no subclass sees functions"""

has_global_hooks: Callable[[], object] = getattr(torch_module, "_has_any_global_hook", lambda: True)
"""whether a hook of all modules is set"""

choice_of_kernel: Callable[..., int] = getattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 0)
"""which kernel scaled_dot_product_attention would take; 0 for the one that is not fused"""


def forward_mode_is_active() -> bool:
    """Whether derivatives are computed in forward mode."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap has batched a tensor, at any level of functorch; asked while a transform is active."""
    if _FUNCTORCH is None:
        return True
    while _FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        if _FUNCTORCH.is_batchedtensor(tensor):
            return True
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    return False
