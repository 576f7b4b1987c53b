"""``qkv::cached_layer``: a layer's call with a cache as one operator of a compiled program.

How long a cache is, whether its memory must grow and whose keys it has are matters of each call. A compiler that
followed them would compile again for each answer. So the program has one operator, which calls the layer on objects
that it finds by their `Handle`. What the operator must not hide are inputs of it: parameters, which a program
may have computed, and the handle of the cache, declared as written, for the order of calls.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.nn.utils import stateless

from qkv.cache import Cache, Caches
from qkv.cache.handle import Handle, find
from qkv.kernels import schema_of
from qkv.masks import FIELDS, FULL, Mask
from qkv.tracing import is_exact_tensor

_CALLS: dict[str, Callable[..., Tensor]] = {}
"""The methods that are operators, by name."""


class OperatorLayer(nn.Module):
    """Base of layers whose calls with a cache are operators of compiled programs."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = Handle.of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.handle = Handle.of(self)


def register(name: str, call: Callable[..., Tensor]) -> str:
    """Makes a method of layers known to the operator by a name, which it returns."""
    _CALLS[name] = call
    return name


def runs_as_operator(layer: object, x: object, cache: object) -> bool:
    """Whether a call is to be an operator: in a program of `torch.compile`, on a CPU, without gradients and autocast.

    Other calls are followed by the compiler, which sees all that they do: exported programs, graphs with gradients,
    programs that a GPU replays.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and isinstance(layer, OperatorLayer)
        and isinstance(cache, (Cache, Caches))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and isinstance(x, Tensor)
        and is_exact_tensor(x)
        and x.is_cpu
        and x.dim() == 3
        and x.shape[2] == layer.embed_dim
        and layer.handle.tensor is not None
        and cache.handle.tensor is not None
        and all(is_exact_tensor(parameter) for parameter in _parameters(layer))
    )


def run_as_operator(name: str, layer: Any, *given: Any, cache: Any, **options: Any) -> Tensor:
    """The call of a layer, with the arguments of its method, as an operator."""
    return _operator(name, layer, cache, *given, **options)


def _operator(
    name: str,
    layer: OperatorLayer,
    cache: Cache | Caches,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    of_mask = () if mask is None else mask.values()
    tensors = (list(_parameters(layer)), x, context, bias, positions)
    out: Tensor = torch.ops.qkv.cached_layer(name, layer.handle.tensor, cache.handle.tensor, *tensors, *of_mask)
    return out


def _parameters(module: nn.Module) -> list[Tensor]:
    """The parameters of a module and those within it. ``Module.parameters`` takes longer than a small layer."""
    found: list[Tensor] = [parameter for parameter in module._parameters.values() if parameter is not None]
    for part in module._modules.values():
        if part is not None:
            found += _parameters(part)
    return found


def _cached_layer(
    name: str,
    layer: Tensor,
    cache: Tensor,
    parameters: list[Tensor],
    x: Tensor,
    context: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    *mask: Any,
) -> Tensor:
    """``qkv::cached_layer``: runs a method of the layer. Of the mask it gets the fields up to the last unusual one."""
    module, call = find(layer), _CALLS[name]
    options: dict[str, Any] = {"cache": find(cache)}
    if mask:
        options["mask"] = Mask(*mask)
    if bias is not None:
        options["bias"] = bias
    if positions is not None:
        options["positions"] = positions
    if context is not None:
        options["context"] = context.detach()  # a tensor of this call alone, whose identity tells nothing
    own = _parameters(module)
    if all(map(_is_same, parameters, own)):
        return call(module, x, **options).contiguous()
    names = {id(parameter): path for path, parameter in module.named_parameters()}
    computed = {names[id(one)]: two for one, two in zip(own, parameters, strict=True)}
    with stateless._reparametrize_module(module, computed):
        return call(module, x, **options).contiguous()


def _is_same(one: Tensor, two: Tensor) -> bool:
    return one is two or one.data_ptr() == two.data_ptr()


def _like_x(name: str, layer: Tensor, cache: Tensor, parameters: list[Tensor], x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "cached_layer(str name, Tensor layer, Tensor(a!) cache, Tensor[] parameters, Tensor x, Tensor? context=None, "
    f"Tensor? bias=None, Tensor? positions=None, {schema_of(dict(zip(FIELDS, FULL.values(), strict=True)))}) -> Tensor"
)
_LIBRARY.impl("cached_layer", _cached_layer, "CPU")
library.register_fake("qkv::cached_layer", _like_x, lib=_LIBRARY)
