"""Checks of the arguments of layers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkv.arguments import more
from qkv.backends import BACKENDS
from qkv.layers.constants import Numbers
from qkv.masks import FULL, Mask
from qkv.problem import DTYPES


def require_mask(caller: str, mask: object) -> Mask:
    """The mask, the full one for None. Raises TypeError unless it is a `Mask`."""
    if mask is None:
        return FULL
    if not isinstance(mask, Mask):
        remedy = "Mask.dense(allow)" if isinstance(mask, Tensor) else "Mask.causal(), Mask.padding(keep), ..."
        raise TypeError(
            f"{caller}: mask must be a qkv.Mask; got {type(mask).__name__}. Use {remedy}.{more('polarity')}"
        )
    return mask


def require_rotary(caller: str, rotary: object, head_dim: int, context_dim: int | None) -> None:
    """Raises unless ``rotary`` is a module with this head_dim, `RotaryEmbedding` or one like it, in self-attention."""
    if not isinstance(rotary, nn.Module) or not hasattr(rotary, "head_dim"):
        raise TypeError(
            f"{caller}: rotary must be a qkv.RotaryEmbedding, or a module with the same head_dim and forward; "
            f"got {rotary if isinstance(rotary, bool) else type(rotary).__name__}. Use RotaryEmbedding({head_dim})."
        )
    if rotary.head_dim != head_dim:
        raise ValueError(f"{caller}: rotary must be for head_dim={head_dim}; got {rotary.head_dim}.")
    if context_dim is not None:
        raise ValueError(f"{caller}: rotary has no meaning between two sequences; pass rotary or context_dim.")


def require_position_bias(caller: str, position_bias: object) -> None:
    """Raises TypeError unless ``position_bias`` is a module."""
    if not isinstance(position_bias, nn.Module):
        raise TypeError(
            f"{caller}: position_bias must be a module called as position_bias(lq, lk, offset); "
            f"got {position_bias if isinstance(position_bias, bool) else type(position_bias).__name__}."
        )


def require_backend(caller: str, backend: object) -> None:
    """Raises ValueError unless ``backend`` is ``auto`` or the name of a backend."""
    names = [candidate.NAME for candidate in BACKENDS]
    if backend != "auto" and backend not in names:
        known = ", ".join(map(repr, names))
        raise ValueError(f"{caller}: backend must be 'auto' or one of {known}; got {backend!r}.")


def require_dtype(caller: str, dtype: object) -> None:
    """Raises unless ``dtype`` is one in which attention is computed, or None."""
    known = ", ".join(map(str, DTYPES))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{caller}: dtype must be a torch.dtype or None; got {dtype!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{caller}: dtype must be one of {known}, or None; got {dtype}.")


def input_error(caller: str, name: str, value: object, layout: str) -> Exception:
    """The error for a layer's input ``name`` that is not a tensor of the shape ``layout``."""
    if not isinstance(value, Tensor):
        return TypeError(f"{caller}: {name} must be a tensor {layout}; got {type(value).__name__}.")
    return ValueError(f"{caller}: {name} must be {layout}; got shape {tuple(value.shape)}.")


def require_like_weights(caller: str, name: str, x: Tensor, linear: nn.Module, cause: Exception) -> None:
    """Raises ValueError, from ``cause``, if x and the weights of a projection differ in dtype or device."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        return
    if x.device != weight.device:
        raise ValueError(
            f"{caller}: {name} must be on the device of the layer's weights, {weight.device}; got {x.device}."
        ) from cause
    if x.dtype is not weight.dtype:
        lower = " (or torch.autocast enabled)" if x.dtype.is_floating_point else ""
        raise ValueError(
            f"{caller}: {name} must be {weight.dtype}, as the layer's weights are{lower}; got {x.dtype}."
        ) from cause


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require_integers(
    caller: str,
    name: str,
    value: object,
    shapes: Sequence[tuple[int, ...]],
    reference: Tensor,
    *,
    other: str = "",
    whose: str = "x",
) -> None:
    """Raises unless ``value`` is a tensor of integers, of one of the shapes, on the device of ``reference``.

    Args:
        other: what else is accepted, for error messages.
        whose: what ``reference`` is, for error messages.
    """
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: {name} must be {other}a tensor of integers; got {got}.")
    # Sizes are compared only with shapes of as many dimensions: each comparison binds a symbolic size in an export.
    if not any(len(shape) == value.dim() and shape == value.shape for shape in shapes):
        known = " or ".join(dict.fromkeys(map(str, shapes)))
        raise ValueError(f"{caller}: {name} must be {other}integers of shape {known}; got {tuple(value.shape)}.")
    if value.device != reference.device:
        raise ValueError(f"{caller}: {name} must be on the device of {whose}, {reference.device}; got {value.device}.")


def require_vector(caller: str, name: str, value: Any, count: int, what: str) -> Numbers:
    """A vector of ``count`` finite numbers, from a tensor or a sequence.

    Args:
        what: what each number belongs to, for error messages.

    Raises:
        TypeError: for values that are not numbers.
        ValueError: for another count, and for tensors that require a gradient or have no numbers (on ``meta``).
    """
    required = f"{name} must be floating-point of shape ({count},), {what}"
    dtype = torch.float32
    if isinstance(value, str):
        raise TypeError(f"{caller}: {required}; got {value!r}.")
    if isinstance(value, Tensor):
        if value.shape != (count,) or not value.dtype.is_floating_point:
            raise ValueError(f"{caller}: {required}; got {value.dtype} {tuple(value.shape)}.")
        if value.requires_grad:
            raise ValueError(
                f"{caller}: {name} must be constants; got a tensor that requires a gradient. "
                "Detach it, or pass a parameter to qkv.attention."
            )
        dtype = torch.promote_types(value.dtype, dtype)
        try:
            value = value.tolist()
        except (NotImplementedError, RuntimeError) as error:  # of meta and fake tensors
            raise ValueError(
                f"{caller}: {required}; got a tensor on {value.device} without numbers. Pass a list or a tensor "
                "created with device='cpu'."
            ) from error
    try:
        numbers = tuple(map(float, value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{caller}: {required}; got {value!r}.") from error
    if len(numbers) != count:
        raise ValueError(f"{caller}: {required}; got {value!r}.")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{caller}: {name} must be finite; got {numbers}.")
    return Numbers(numbers, dtype)
