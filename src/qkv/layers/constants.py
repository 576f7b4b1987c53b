"""Tensors that follow from a module's arguments alone: computed where they are needed, never state.

A buffer would be rounded with the module, left unset by ``to_empty`` and by every loader that fills what a checkpoint
holds, and cast by whoever walks over buffers.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from qkv import kernels


class Numbers(NamedTuple):
    """A vector of numbers, as Python has them."""

    values: tuple[float, ...]
    dtype: torch.dtype

    def on(self, device: torch.device) -> Tensor:
        """The vector as a tensor, not to be written to."""
        return constant(_listed, *self, device)


def constant(compute: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    """``compute(*arguments)``, the same tensor at each call, not to be written to.

    Computed anew where somebody records or transforms operators: what is made there may be no tensor but a stand-in,
    and what was made elsewhere is unknown to it.
    """
    if kernels.is_tracing() or torch._C._are_functorch_transforms_active():
        return compute(*arguments)
    return _kept(compute, *arguments)


@functools.lru_cache(maxsize=1024)
def _kept(compute: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        return compute(*arguments)


def _listed(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
