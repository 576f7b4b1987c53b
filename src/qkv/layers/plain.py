"""Whether calling a module computes what its class defines and nothing else, so that the call may be bypassed."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

from qkv.layers.instance_forward import InstanceForward


def is_called_plainly(module: nn.Module) -> bool:
    """Whether ``module(...)`` is ``type(module).forward(module, ...)``, without hooks, patches or a compiled call."""
    kind = type(module)
    return not (
        kind.__call__ is not _CALL
        or kind._call_impl is not _CALL_IMPL
        or module._compiled_call_impl is not None
        or not _computes_the_same(module.__dict__.get("forward"))
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _computes_the_same(forward: object) -> bool:
    """Whether the ``forward`` set on an instance, if any, computes what that of the class does."""
    if isinstance(forward, InstanceForward):
        return forward.computes_the_same and forward.own is None
    return forward is None


def finds_parts_by_name(kind: type[nn.Module], *names: str | None) -> bool:
    """Whether instances of a class look these names up as any module does, so that the class does not hide them."""
    return kind.__getattr__ is _GETATTR and not any(hasattr(kind, name) for name in names if name is not None)


def is_plain_linear(linear: object) -> TypeGuard[nn.Linear]:
    """Whether a call is ``F.linear`` of the parameters of an ``nn.Linear`` and nothing else."""
    return multiplies_its_parameters(linear) and is_called_plainly(linear)


def multiplies_its_parameters(linear: object) -> TypeGuard[nn.Linear]:
    """Whether the forward is ``F.linear`` of the parameters of an ``nn.Linear``, and nothing hides those."""
    if type(linear) is not nn.Linear:
        return False
    own, parameters = linear.__dict__, linear._parameters
    return not (
        nn.Linear.forward is not _FORWARD
        or F.linear is not _LINEAR
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
_GETATTR = _of_torch(nn.Module.__getattr__, torch_module)
_CALL = _of_torch(nn.Linear.__call__, torch_module)
_CALL_IMPL = _of_torch(nn.Linear._call_impl, torch_module)
_has_any_global_hook: Callable[[], object] = getattr(torch_module, "_has_any_global_hook", lambda: True)
