"""Whether operators are being recorded, so that no decision may depend on numbers in tensors."""

import torch
from torch import Tensor

from qkv.torch_internals import dispatch_modes, is_legacy_batched, tracing_state, transforms_are_active


def is_tracing() -> bool:
    """Whether a compiler, a tracer or a dispatch mode records operators."""
    return bool(torch.compiler.is_compiling() or tracing_state() or dispatch_modes() > 0)


def is_exact_tensor(tensor: object) -> bool:
    """Whether the type is Tensor or Parameter and not a subclass, which may change what operators do."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def can_read_values(*tensors: Tensor) -> bool:
    """Whether the numbers in the tensors can be read: not while tracing or batching, nor without memory."""
    return (
        all(map(is_exact_tensor, tensors))
        and not any(tensor.is_meta for tensor in tensors)
        and not is_tracing()
        and not transforms_are_active()
        and not any(map(is_legacy_batched, tensors))
    )
