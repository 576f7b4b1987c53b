"""`project`: a linear projection, at the cost of its arithmetic. The one place where we go past a module of torch's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What the layers call them."""


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``.

    A call of a module costs 2.7 us besides its arithmetic, four of which make a fifth of a short attention. Where all
    that torch would do is ``F.linear(x, weight, bias)`` with two parameters, a plain ``nn.Linear`` is spared them;
    whatever replaces, wraps or watches it, or holds its weights elsewhere, is called as ever.
    """
    if type(linear) is nn.Linear and not torch.compiler.is_compiling() and _is_plain(linear):
        parameters = linear._parameters
        weight = parameters["weight"]
        assert weight is not None
        return F.linear(x, weight, parameters["bias"])
    projected: Tensor = linear(x)
    return projected


def require_linear(caller: str, name: str, projection: nn.Module) -> None:
    """Raises unless what a projection computes is ``F.linear`` of its own weight and bias, which may be copied then."""
    if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
        raise TypeError(
            f"{caller}: {name} must be an nn.Linear, whose weights say all that it computes; got "
            f"{type(projection).__name__}. Merge adapters, or take wrappers off, first."
        )


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a call would find nothing of its own on the instance, on the class, or among the hooks of all modules."""
    own, parameters = linear.__dict__, linear._parameters
    return not (
        nn.Linear.forward is not _FORWARD
        or nn.Linear.__call__ is not _CALL
        or nn.Linear._call_impl is not _CALL_IMPL
        or linear._compiled_call_impl is not None
        or "forward" in own
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or _has_any_global_hook()
        # What is set on an instance is found before its parameters: pruning, MAML and DataParallel do that.
        or "weight" in own
        or "bias" in own
        or parameters.get("weight") is None
        or "bias" not in parameters
    )


def _of_torch(function: Callable[..., Any], module: Any) -> Callable[..., Any] | None:
    """The function, if it is the one that torch has written in ``module``: somebody may have replaced it before us."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_FORWARD = _of_torch(nn.Linear.forward, torch_linear)
_CALL = _of_torch(nn.Linear.__call__, torch_module)
_CALL_IMPL = _of_torch(nn.Linear._call_impl, torch_module)
_has_any_global_hook: Callable[[], object] = getattr(torch_module, "_has_any_global_hook", lambda: True)
