"""``qkv::cached_layer``: a layer's call with a cache as one operator of a compiled program.

How long a cache is, whether its memory must grow and whose keys it has are matters of each call. A compiler that
followed them would compile again for each answer. So the program has one operator, which calls the layer on objects
that it finds by their `Handle`. What the operator must not hide are inputs of it: parameters, which a program
may have computed, and the handle of the cache, declared as written, for the order of calls.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, library, nn

from qkv.cache import Cache, Caches
from qkv.cache.handle import Handled, find
from qkv.kernels import schema_of
from qkv.layers.operator_forward import call_with, may_be_operator, parameters_of
from qkv.masks import FIELDS, FULL, Mask, html_of

_CALLS: dict[str, Callable[..., Tensor]] = {}
"""The methods that are operators, by name."""


class OperatorLayer(Handled, nn.Module):
    """Base of layers whose calls with a cache are operators of compiled programs."""

    def _repr_html_(self) -> str:
        """The layer with a picture of its mask, for notebooks."""
        return html_of(cast(Mask, self.mask), repr(self))


def register(name: str, call: Callable[..., Tensor]) -> str:
    """Makes a method of layers known to the operator by a name, which it returns."""
    _CALLS[name] = call
    return name


def runs_as_operator(layer: object, x: object, cache: object) -> bool:
    """Whether a call is to be an operator: where `may_be_operator` admits it, with a cache that has a handle."""
    return (
        isinstance(layer, OperatorLayer)
        and isinstance(cache, (Cache, Caches))
        and may_be_operator(x, layer)
        and x.shape[2] == layer.embed_dim  # type: ignore[attr-defined]
        and layer.handle.tensor is not None
        and cache.handle.tensor is not None
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
    tensors = (parameters_of(layer), x, context, bias, positions)
    out: Tensor = torch.ops.qkv.cached_layer(name, layer.handle.tensor, cache.handle.tensor, *tensors, *of_mask)
    return out


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
    return call_with(parameters, module, lambda: call(module, x, **options))


def _like_x(name: str, layer: Tensor, cache: Tensor, parameters: list[Tensor], x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "cached_layer(str name, Tensor layer, Tensor(a!) cache, Tensor[] parameters, Tensor x, Tensor? context=None, "
    f"Tensor? bias=None, Tensor? positions=None, {schema_of(dict(zip(FIELDS, FULL.values(), strict=True)))}) -> Tensor"
)
_LIBRARY.impl("cached_layer", _cached_layer, "CPU")
library.register_fake("qkv::cached_layer", _like_x, lib=_LIBRARY)
