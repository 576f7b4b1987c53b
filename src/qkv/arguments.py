"""Argument checks, one function per kind, shared by all public functions. Imports nothing from qkv."""

import functools
import importlib.metadata
import math
from numbers import Integral, Real

import torch
from torch import Tensor

NUMBERS = (float, int, Real, torch.SymFloat, torch.SymInt)
"""Types of numbers: Python's, NumPy's and symbolic ones of exported programs. No tensors, which may need a gradient."""

CATALOGUE = "reference/errors"
"""The page "Errors" of the documentation, with the cause and the remedy of each."""


def more(entry: str) -> str:
    """The end of a message whose remedy needs more words than it has: where the catalogue of errors has them.

    That is an address if the installed package names one for its documentation, else a page and an entry on it.

    Example:
        >>> more("offset")  # without an address: on the page Errors of the documentation of qkv
        ' More: ...offset...'
    """
    address = None if torch.compiler.is_compiling() else documentation()
    if address is None:
        return f' More: "{entry}" on the page Errors of the documentation of qkv'
    return f" More: {address}/{CATALOGUE}.html#{entry}"


@functools.cache
def documentation() -> str | None:
    """The address of the site that `project.urls` of pyproject.toml names; None without one."""
    try:
        urls = importlib.metadata.metadata("qkv").get_all("Project-URL", ())
    except importlib.metadata.PackageNotFoundError:  # imported from a folder of sources
        return None
    found = dict(each.split(", ", 1) for each in urls)
    return found.get("Documentation", "").removesuffix("/") or None


def require_int(caller: str, name: str, value: object, suffix: str = "") -> None:
    """Raises TypeError unless ``value`` is an int. ``suffix`` continues "must be an int" in the message."""
    if not isinstance(value, (int, Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int{suffix}; got {described(value)}.")


def require_count(caller: str, name: str, value: object, least: int = 1, suffix: str = "") -> None:
    """Raises unless ``value`` is an int of at least ``least``."""
    require_int(caller, name, value, suffix)
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be at least {least}{suffix}; got {value}.")


def require_flag(caller: str, name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be True or False; got {described(value)}.")


def require_finite(caller: str, name: str, value: object, suffix: str = "") -> None:
    """Raises unless ``value`` is a finite number."""
    _require_number(caller, name, value, f"a finite number{suffix}")
    if not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a finite number{suffix}; got {value!r}.")


def require_positive(caller: str, name: str, value: object, suffix: str = "") -> None:
    """Raises unless ``value`` is a positive, finite number."""
    _require_number(caller, name, value, f"a positive number{suffix}")
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a positive number{suffix}; got {value!r}.")


def require_probability(caller: str, name: str, value: object) -> None:
    """Raises unless ``value`` is a number in [0, 1)."""
    _require_number(caller, name, value, "a probability in [0, 1)")
    if not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{caller}: {name} must be a probability in [0, 1); got {value!r}.")


def require_tensors(caller: str, **tensors: object) -> None:
    """Raises TypeError unless each is a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor; got {type(tensor).__name__}.")


def require_strided(caller: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for sparse and other tensors without strides."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{caller}: {name} must be a strided tensor; got {tensor.layout}. Use {name}.to_dense().")


def broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the tensor broadcasts to exactly ``shape``."""
    missing = len(shape) - tensor.dim()
    return missing >= 0 and all(size in (1, goal) for size, goal in zip(tensor.shape, shape[missing:], strict=True))


def described(value: object) -> str:
    """The value in error messages: its ``repr``, or the shape of a tensor with dimensions."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)


def _require_number(caller: str, name: str, value: object, what: str) -> None:
    if not isinstance(value, NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be {what}; got {described(value)}.")
