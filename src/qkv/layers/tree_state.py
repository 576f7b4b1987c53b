"""Whether a module, and those within it, are as they were: found out in microseconds, for a model that asks of all its
layers in each step.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any
from weakref import ref

import torch.nn.functional as F
from torch import Tensor, nn

from qkv.layers.instance_forward import InstanceForward


class TreeState:
    """What a module and those within it are: their attributes, parts and parameters, in order.

    Attributes are compared by identity or equality, parts and parameters by name and identity. What lies within is not
    compared: items of attributes, kinds and numbers of tensors. Classes are compared by a `ClassState`.

    It is kept beside a model, and keeps no memory: parameters and modules are referred to weakly, and of a module that
    is gone, nothing stays.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = [*_within(root)]
        owns = [*map(vars, modules)]
        self._attributes = attributes = [dict(own) for own in owns]

        def forget(_: object) -> None:
            attributes.clear()

        parameters, parts, *_ = zip(*map(_LIVE, owns), strict=True)
        tensors = [*_values(parameters)]
        self._references = [ref(module, forget) for module in modules]
        self._tensors = [ref(tensor, forget) for tensor in tensors if tensor is not None]
        self.kinds = [*map(type, modules)]
        """the class of each module"""
        self._places = _places(parameters, parts, tensors)
        self._forwards = [own["forward"] for own in owns if isinstance(own.get("forward"), InstanceForward)]

    def parameters(self) -> list[Tensor | None] | None:
        """The parameters, module by module, if nothing has changed; else None. A module with hooks has changed."""
        attributes = self._attributes
        if not attributes:
            return None
        try:
            modules = [module() for module in self._references]
            owns = [*map(vars, modules)]
            if owns != attributes or [*map(type, modules)] != self.kinds:
                return None
            parameters, parts, *hooks = zip(*map(_LIVE, owns), strict=True)
            if any(chain.from_iterable(hooks)) or any(map(_IS_TAKEN_BACK, self._forwards)):
                return None
            tensors = [*_values(parameters)]
            if _places(parameters, parts, tensors) != self._places:
                return None
        except Exception:  # of attributes that do not compare, such as tensors: they are others then
            return None
        return tensors


class ClassState:
    """What classes of modules are, all that they inherit included, and functions of torch that they call."""

    def __init__(self, kinds: Iterable[type]) -> None:
        self._kinds = [*kinds]
        self._bases = [*self._inherited()]
        self._attributes = [dict(vars(base)) for base in self._bases]
        self._functions = _functions()

    def _inherited(self) -> dict[type, None]:
        return dict.fromkeys(chain.from_iterable(kind.__mro__[:-1] for kind in self._kinds))

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        try:
            same = [*map(vars, self._bases)] == self._attributes
        except Exception:
            return False
        return same and [*self._inherited()] == self._bases and _functions() == self._functions


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those within it, as often as they occur."""
    yield module
    for part in module._modules.values():
        if part is not None:
            yield from _within(part)


def _values(dicts: Any) -> "chain[Any]":
    return chain.from_iterable(map(dict.values, dicts))


def _places(parameters: Any, parts: Any, tensors: list[Any]) -> tuple[list[str], list[int], list[int]]:
    """Names in dictionaries of parameters and parts, and which tensors and parts they have."""
    return [*chain.from_iterable(parameters + parts)], [*map(id, tensors)], [*map(id, _values(parts))]


def _functions() -> list[Any]:
    return [F.linear, F.silu, F.relu, F.gelu, F.rms_norm]


_LIVE = itemgetter(
    *("_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)
_IS_TAKEN_BACK = attrgetter("is_taken_back")
