"""`project`: linear projections without the overhead of `Module.__call__`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import linear as torch_linear
from torch.nn.modules import module as torch_module

from qkv.layers.instance_forward import InstanceForward

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj")
"""Their names in `Attention`; gate_proj is None in layers without a gate."""


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``.

    `Module.__call__` costs 2.7 us, so four of them take a fifth of a short attention. An ``nn.Linear`` without hooks,
    patches or replaced parameters skips it; any other module is called normally.
    """
    if type(linear) is nn.Linear and not torch.compiler.is_compiling() and _is_unmodified(linear):
        return _product(linear, x)
    projected: Tensor = linear(x)
    return projected


class ProjectedForward(InstanceForward):
    """The forward of an ``nn.Linear`` in any model, which computes it as `project` does.

    ``Module.__call__`` has run what is attached to the module before it calls this, and runs the rest after.
    """

    def call(self, x: Tensor) -> Tensor:
        """``linear(x)`` without hooks, which are the caller's."""
        if type(self.module) is nn.Linear and self.own is None and _computes_its_parameters(self.module):
            return _product(self.module, x)
        projected: Tensor = self.forward(x)
        return projected


def reroute(model: nn.Module) -> None:
    """Gives each ``nn.Linear`` of a model, whatever its class, a `ProjectedForward`. Others are left alone: subclasses,
    and those with a forward of their own, which libraries set that move or quantise weights.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            ProjectedForward.set_on(module)


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """``x @ weight.mT + bias``."""
    weight = linear._parameters["weight"]
    assert weight is not None
    return F.linear(x, weight, linear._parameters["bias"])


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
    return _computes_its_parameters(linear) and not (
        nn.Linear.__call__ is not _CALL
        or nn.Linear._call_impl is not _CALL_IMPL
        or linear._compiled_call_impl is not None
        or ("forward" in linear.__dict__ and type(linear.__dict__["forward"]) is not ProjectedForward)
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or _has_any_global_hook()
    )


def _computes_its_parameters(linear: nn.Linear) -> bool:
    """Whether the forward of the class is the product with the parameters, and nothing hides those."""
    own, parameters = linear.__dict__, linear._parameters
    return not (
        nn.Linear.forward is not _FORWARD
        # Instance attributes hide parameters. Pruning, MAML and DataParallel set them.
        or "weight" in own
        or "bias" in own
        or parameters.get("weight") is None
        or "bias" not in parameters
    )


def _of_torch(function: Callable[..., Any], module: Any) -> Callable[..., Any] | None:
    """The function if torch defines it in ``module``; None if it was replaced before qkv was imported."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_FORWARD = _of_torch(nn.Linear.forward, torch_linear)
_CALL = _of_torch(nn.Linear.__call__, torch_module)
_CALL_IMPL = _of_torch(nn.Linear._call_impl, torch_module)
_has_any_global_hook: Callable[[], object] = getattr(torch_module, "_has_any_global_hook", lambda: True)
