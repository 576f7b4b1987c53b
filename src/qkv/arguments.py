"""What an argument must be, each kind said once, for all who are called. Imports nothing of ours."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

NUMBERS = (Real, torch.SymFloat, torch.SymInt)
"""Those of Python and NumPy, and what stands for one in an exported program. No tensor, which may want a gradient."""


def require_int(caller: str, name: str, value: object, otherwise: str = "") -> None:
    """Raises unless it is an int."""
    if not isinstance(value, (Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int{otherwise}; got {shown(value)}.")


def require_count(caller: str, name: str, value: object, least: int = 1) -> None:
    """Raises unless it is an int of at least ``least``."""
    require_int(caller, name, value)
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be at least {least}; got {value}.")


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


def shown(value: object) -> str:
    """A value for a message; of a tensor that has several, its shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)


def _require_number(caller: str, name: str, value: object, what: str) -> None:
    if not isinstance(value, NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be {what}; got {shown(value)}.")
