"""`InstanceMethod`: a callable in the place of a method, set on one module."""

import weakref
from typing import Any

from torch import nn


class InstanceMethod:
    """A callable that is set on one module and knows it, as a bound method does, without keeping it alive.

    A bound method in the module's own attributes would be a cycle, which only the garbage collector frees: a model that
    is deleted would keep its memory until then. So a forward that outlives its module cannot be called. Deep copies and
    pickles of the module have one of their own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module.

        Raises:
            ReferenceError: if it is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(
                f"{type(self).__name__}: the module must exist as long as its methods are called; it was deleted. Keep "
                "the module, not its method alone."
            )
        return module

    def is_of(self, module: nn.Module) -> bool:
        """Whether it was made for this module, and not for one that the module is a shallow copy of."""
        return self._module() is module

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])
