"""Constant tensors of a module, computed from its arguments when needed and not registered as buffers.

A buffer would be rounded when the module is cast, and left uninitialised by ``to_empty`` and by loading a checkpoint.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import kernels
from qkv.torch_internals import transforms_are_active, without_functions


class Numbers(NamedTuple):
    """A vector of Python numbers."""

    values: tuple[float, ...]
    dtype: torch.dtype

    def on(self, device: torch.device) -> Tensor:
        """The vector as a tensor, which must not be written to."""
        return constant(*self.formula(device))

    def formula(self, device: torch.device) -> tuple[Any, ...]:
        """What `constant` computes it from."""
        return _to_tensor, *self, device


def constant(compute: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    """``compute(*arguments)``, cached. The result must not be written to.

    Not cached while tracing or transforming: tensors made there are fake, and cached ones are unknown to the tracer.
    """
    if kernels.is_tracing() or transforms_are_active():
        return compute(*arguments)
    return kept(compute, *arguments)


@functools.lru_cache(maxsize=1024)
def kept(compute: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    """`constant`, for callers that know that nothing is traced or transformed."""
    with torch.inference_mode(False), without_functions():
        return compute(*arguments)


def _to_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
