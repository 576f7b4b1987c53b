"""Checks of arguments, one function a kind, shared by all public functions. Imports nothing of ours."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

NUMBERS = (float, int, Real, torch.SymFloat, torch.SymInt)
"""Python's and NumPy's, and the symbolic ones of exported programs. Not tensors, which may require a gradient."""


def require_int(caller: str, name: str, value: object, otherwise: str = "") -> None:
    """Raises unless it is an int."""
    if not isinstance(value, (int, Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int{otherwise}; got {shown(value)}.")


def require_count(caller: str, name: str, value: object, least: int = 1, otherwise: str = "") -> None:
    """Raises unless it is an int of at least ``least``."""
    require_int(caller, name, value, otherwise)
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be at least {least}{otherwise}; got {value}.")


def require_flag(caller: str, name: str, value: object) -> None:
    """Raises unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be True or False; got {shown(value)}.")


def require_finite(caller: str, name: str, value: object, otherwise: str = "") -> None:
    """Raises unless it is a finite number."""
    _require_number(caller, name, value, f"a finite number{otherwise}")
    if not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a finite number{otherwise}; got {value!r}.")


def require_positive(caller: str, name: str, value: object, otherwise: str = "") -> None:
    """Raises unless it is a positive, finite number."""
    _require_number(caller, name, value, f"a positive number{otherwise}")
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a positive number{otherwise}; got {value!r}.")


def require_probability(caller: str, name: str, value: object) -> None:
    """Raises unless it is a number in [0, 1)."""
    _require_number(caller, name, value, "a probability in [0, 1)")
    if not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a probability in [0, 1); got {value!r}.")


def require_tensors(caller: str, **tensors: object) -> None:
    """Raises unless each is a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor; got {type(tensor).__name__}.")


def require_strided(caller: str, name: str, tensor: Tensor) -> None:
    """Raises for sparse and other tensors without strides."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{caller}: {name} must be a strided tensor; got {tensor.layout}. Use {name}.to_dense().")


def broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the tensor broadcasts to ``shape`` without changing it."""
    missing = len(shape) - tensor.dim()
    return missing >= 0 and all(size in (1, goal) for size, goal in zip(tensor.shape, shape[missing:], strict=True))


def shown(value: object) -> str:
    """The value as messages show it: of a tensor with dimensions, its shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)


def _require_number(caller: str, name: str, value: object, what: str) -> None:
    if not isinstance(value, NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be {what}; got {shown(value)}.")
