"""Whether calling a module computes what its class defines and nothing else, so that the call may be bypassed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

from qkv.layers.instance_forward import InstanceForward
from qkv.torch_internals import has_global_hooks


def is_called_plainly(module: nn.Module, forward: type[InstanceForward] | None = None) -> bool:
    """Whether ``module(...)`` is ``type(module).forward(module, ...)``, without hooks, patches or a compiled call.

    Args:
        forward: one of ours whose work the caller does, and which may be set on the module too.
    """
    return are_called_plainly((module,), forward)


def are_called_plainly(
    modules: Iterable[nn.Module],
    forward: type[InstanceForward] | None = None,
    is_idle: Callable[[Any], bool] = lambda hook: False,
) -> bool:
    """Whether each module satisfies `is_called_plainly`, in one loop: models ask it of all their parts in each step.

    Args:
        is_idle: whether a forward hook may be ignored.
    """
    if has_global_hooks():
        return False
    for module in modules:
        kind, own = type(module), module.__dict__
        if (
            kind.__call__ is not _CALL
            or kind._call_impl is not _CALL_IMPL
            or own.get("_compiled_call_impl") is not None
            or (own["_forward_hooks"] and not all(map(is_idle, own["_forward_hooks"].values())))
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return False
        its = own.get("forward")
        if its is None:
            continue
        # Set on the instance; one of ours computes what that of the class does, or is the one that is known.
        if not isinstance(its, InstanceForward) or its.own is not None:
            return False
        if not its.computes_the_same and type(its) is not forward:
            return False
    return True


def finds_parts_by_name(kind: type[nn.Module], *names: str | None) -> bool:
    """Whether instances of a class look these names up as any module does, so that the class does not hide them."""
    return kind.__getattr__ is _GETATTR and not any(hasattr(kind, name) for name in names if name is not None)


def is_plain_linear(linear: object) -> TypeGuard[nn.Linear]:
    """Whether a call is ``F.linear`` of the parameters of an ``nn.Linear`` and nothing else."""
    return parameters_of((linear,)) is not None


def parameters_of(linears: Sequence[object]) -> list[Any] | None:
    """The weight and bias of each module, one after the other; None unless each satisfies `is_plain_linear`."""
    found = _multiplied(linears)
    return None if found is None or not are_called_plainly(linears) else found  # type: ignore[arg-type]


def multiplies_its_parameters(linear: object) -> TypeGuard[nn.Linear]:
    """Whether the forward is ``F.linear`` of the parameters of an ``nn.Linear``, and nothing hides those."""
    return _multiplied((linear,)) is not None


def _multiplied(linears: Sequence[object]) -> list[Any] | None:
    """The weight and bias of each module; None unless each satisfies `multiplies_its_parameters`."""
    if nn.Linear.forward is not _FORWARD or F.linear is not _LINEAR:
        return None
    found: list[Any] = []
    for linear in linears:
        if type(linear) is not nn.Linear:
            return None
        own, parameters = linear.__dict__, linear._parameters
        weight = parameters.get("weight")
        # Instance attributes hide parameters. Pruning, MAML and DataParallel set them.
        if weight is None or "bias" not in parameters or "weight" in own or "bias" in own:
            return None
        found += weight, parameters["bias"]
    return found


def _of_torch(function: Callable[..., Any], module: Any) -> Callable[..., Any] | None:
    """The function if torch defines it in ``module``; None if it was replaced before qkv was imported."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_LINEAR: Any = getattr(torch._C._nn, "linear", None)
_FORWARD = _of_torch(nn.Linear.forward, torch_linear)
_GETATTR = _of_torch(nn.Module.__getattr__, torch_module)
_CALL = _of_torch(nn.Linear.__call__, torch_module)
_CALL_IMPL = _of_torch(nn.Linear._call_impl, torch_module)
