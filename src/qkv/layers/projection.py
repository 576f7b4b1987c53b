"""`project`: linear projections without the overhead of `Module.__call__`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

from qkv import kernels

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj")
"""Their names in `Attention`; gate_proj is None in layers without a gate."""


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``.

    `Module.__call__` costs 2.7 us, so four of them take a fifth of a short attention. An ``nn.Linear`` without hooks,
    patches or replaced parameters skips it; any other module is called normally. Few rows without a gradient go to the
    kernel, where it is faster than torch.
    """
    if type(linear) is nn.Linear and not torch.compiler.is_compiling() and _is_unmodified(linear):
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None
        projected = _by_kernel(x, weight, bias)
        return F.linear(x, weight, bias) if projected is None else projected
    called: Tensor = linear(x)
    return called


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``F.linear`` by the kernel; None where torch is faster, or does more: for a gradient, a mode, autocast."""
    if torch._C._len_torch_function_stack() > 0 or not kernels.is_faster(x, weight) or torch.is_autocast_enabled("cpu"):
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return kernels.fast_linear(x, weight, bias) if kernels.can_bypass_dispatcher(*tensors) else None


def linear_projections(caller: str, layer: object) -> dict[str, nn.Linear]:
    """The projections of an `Attention` by name.

    Raises:
        TypeError: unless each is ``F.linear`` of its weight and bias, which can then be copied.
    """
    projections: dict[str, nn.Linear] = {}
    for name in PROJECTIONS:
        projection = getattr(layer, name)
        if projection is None:
            continue
        projections[name] = require_linear(caller, name, projection)
    return projections


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The weight if ``linear(x)`` is ``x @ weight.mT`` and nothing else, as for an ``nn.Linear`` without hooks or bias.

    For code that multiplies by the weight in another order.
    """
    if type(linear) is not nn.Linear or not _is_unmodified(linear):
        return None
    return linear.weight if linear.bias is None else None


def require_linear(caller: str, name: str, projection: nn.Module) -> nn.Linear:
    """The projection. Raises TypeError unless it is ``F.linear`` of its weight and bias, which can then be copied."""
    if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
        raise TypeError(
            f"{caller}: {name} must be an nn.Linear with the forward of nn.Linear; got {type(projection).__name__}. "
            "Merge adapters or remove wrappers first."
        )
    return projection


def _is_unmodified(linear: nn.Linear) -> bool:
    """Whether neither the instance, nor the class, nor global hooks change what a call computes."""
    own, parameters = linear.__dict__, linear._parameters
    return not (
        nn.Linear.forward is not _FORWARD
        or F.linear is not _LINEAR
        or nn.Linear.__call__ is not _CALL
        or nn.Linear._call_impl is not _CALL_IMPL
        or linear._compiled_call_impl is not None
        or "forward" in own
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or _has_any_global_hook()
        # Instance attributes hide parameters. Pruning, MAML and DataParallel set them.
        or "weight" in own
        or "bias" in own
        or parameters.get("weight") is None
        or "bias" not in parameters
    )


def _of_torch(function: Callable[..., Any], module: Any) -> Callable[..., Any] | None:
    """The function if torch defines it in ``module``; None if it was replaced before qkv was imported."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_LINEAR: Any = getattr(torch._C._nn, "linear", None)
_FORWARD = _of_torch(nn.Linear.forward, torch_linear)
_CALL = _of_torch(nn.Linear.__call__, torch_module)
_CALL_IMPL = _of_torch(nn.Linear._call_impl, torch_module)
_has_any_global_hook: Callable[[], object] = getattr(torch_module, "_has_any_global_hook", lambda: True)
