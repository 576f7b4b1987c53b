"""Calls of modules as operators of compiled programs: which calls may be, and `OperatorForward`, a forward that is one.

An operator finds its module by a `Handle` and calls it as eager code does. What it must not hide are inputs of it:
parameters, which a program may have computed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.nn.utils import stateless

from qkv.cache.handle import Handled, find
from qkv.layers.instance_forward import InstanceForward
from qkv.torch_internals import transforms_are_active
from qkv.tracing import is_exact_tensor


def may_be_operator(x: object, module: nn.Module) -> bool:
    """Whether a call of a module with x may be an operator."""
    return takes_operators(x) and all(is_exact_tensor(parameter) for parameter in parameters_of(module))


def takes_operators(x: object) -> bool:
    """Whether calls with x may be operators: in a program of `torch.compile`, on a CPU, without gradients and autocast.

    Other calls are followed by the compiler, which sees all that they do: exported programs, graphs with gradients,
    programs that a GPU replays.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not transforms_are_active()
        and isinstance(x, Tensor)
        and is_exact_tensor(x)
        and x.is_cpu
        and x.dim() == 3
    )


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a module and those within it. ``Module.parameters`` takes longer than a small layer."""
    found: list[Tensor] = [parameter for parameter in module._parameters.values() if parameter is not None]
    for part in module._modules.values():
        if part is not None:
            found += parameters_of(part)
    return found


def call_with(parameters: list[Tensor], module: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """A call with these tensors, which a program may have computed, as the `parameters_of` a module."""
    own = parameters_of(module)
    if all(map(_is_same, parameters, own)):
        return call().contiguous()
    names = {id(parameter): path for path, parameter in module.named_parameters()}
    computed: dict[str, Any] = {names[id(one)]: two for one, two in zip(own, parameters, strict=True)}
    with stateless._reparametrize_module(module, computed):
        return call().contiguous()


def _is_same(one: Tensor, two: Tensor) -> bool:
    return one is two or one.data_ptr() == two.data_ptr()


class OperatorForward(Handled, InstanceForward):
    """Base of forwards that may be operators of compiled programs, and return a tensor like their input."""

    last_projection: str | None = None
    """name of the linear layer that computes the result, which must be as wide as the input; None if any result is"""
    is_operator = False
    """whether the module is one that may be an operator"""

    def may_be_operator(self, x: object) -> bool:
        """Whether a call with x may be one."""
        return takes_operators(x) and self.is_ready(x.dtype, x.shape[-1])  # type: ignore[attr-defined]

    def is_ready(self, dtype: torch.dtype, width: int) -> bool:
        """Whether calls with x of this dtype and width may be. Parts must have no hooks, no buffers, and its dtype."""
        module = self.module
        if self.own is not None or self.is_taken_back or not self.is_operator or self.handle.tensor is None:
            return False
        if module.training or not _have_parameters_alone(module):
            return False
        if self.last_projection is not None:
            last = module._modules.get(self.last_projection)
            if type(last) is not nn.Linear or last.weight.shape[0] != width:
                return False
        return all(is_exact_tensor(each) and each.dtype is dtype for each in parameters_of(module))


def _have_parameters_alone(module: nn.Module) -> bool:
    """Whether the parts of a module have neither hooks nor buffers."""
    for part in module._modules.values():
        if part is None or part._forward_hooks or part._forward_pre_hooks or part._buffers:
            return False
        if not _have_parameters_alone(part):
            return False
    return True


def as_operator(forward: OperatorForward, x: Tensor) -> Tensor:
    """The call of a module with x alone, as an operator."""
    out: Tensor = torch.ops.qkv.module(forward.handle.tensor, parameters_of(forward.module), x)
    return out


def _module(forward: Tensor, parameters: list[Tensor], x: Tensor) -> Tensor:
    """``qkv::module``: what a forward computes of x."""
    found: OperatorForward = find(forward)
    return call_with(parameters, found.module, lambda: found.call(x))


def _like_x(forward: Tensor, parameters: list[Tensor], x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define("module(Tensor forward, Tensor[] parameters, Tensor x) -> Tensor")
_LIBRARY.impl("module", _module, "CPU")
library.register_fake("qkv::module", _like_x, lib=_LIBRARY)
