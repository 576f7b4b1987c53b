"""`InstanceForward`: a forward that is set on one module, and can be taken back."""

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from qkv.layers.instance_method import InstanceMethod


class InstanceForward(InstanceMethod):
    """A forward in place of a module's own: that of the class as it is now, or one set on the instance before.

    The module keeps its type, parameters, state dict and hooks, which ``Module.__call__`` runs around any forward.
    Subclasses define `call`.
    """

    computes_the_same: ClassVar[bool] = False
    """whether results are those of the module's own forward, so that code may compute them without calling either"""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")
        self.is_taken_back = False
        self._enter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enter()

    def _enter(self) -> None:
        _made.setdefault(self.module, WeakSet()).add(self)

    @classmethod
    def set_on(cls, module: nn.Module) -> None:
        """Puts a forward of this class on the module."""
        module.__dict__["forward"] = cls(module)

    @classmethod
    def take_back(cls, module: nn.Module) -> None:
        """Undoes `set_on`; a module without one is left alone.

        Libraries put a forward of theirs over ours, and keep ours in an attribute of the module, to put it back later.
        There they find the module's own instead. One that they keep out of sight calls the module's own from now on.
        """
        for forward in _made.get(module, ()):
            forward.is_taken_back = forward.is_taken_back or isinstance(forward, cls)
        for name, value in list(vars(module).items()):
            if not isinstance(value, cls) or not (name == "forward" or value.is_of(module)):
                continue
            own = value.own
            while isinstance(own, cls):
                own = own.own
            if own is not None:
                vars(module)[name] = own
            elif name == "forward":
                del vars(module)[name]
            else:
                vars(module)[name] = value.of_class

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward."""
        return self.of_class if self.own is None else self.own

    @property
    def of_class(self) -> Callable[..., Any]:
        """The forward of the module's class, bound to it."""
        module = self.module
        kind = type(module)
        forward: Any = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
        return forward.__get__(module, kind)  # type: ignore[no-any-return]

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for inspect.signature
        return self.forward

    @property
    def __code__(self) -> Any:  # for torch.export, which reads the source
        return self.forward.__code__

    @property
    def __name__(self) -> str:
        return getattr(self.forward, "__name__", "forward")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What a call computes, outside of compilers."""
        raise NotImplementedError

    def in_program(self, *args: Any, **kwargs: Any) -> Any:
        """What a compiler takes a call for: the module's own forward."""
        # The compiler of torch 2.9 cannot call the bound method of `forward`.
        return self.own(*args, **kwargs) if self.own else type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.in_program(*args, **kwargs)
        return self.forward(*args, **kwargs) if self.is_taken_back else self.call(*args, **kwargs)


_made: "WeakKeyDictionary[nn.Module, WeakSet[InstanceForward]]" = WeakKeyDictionary()
"""The forwards of each module, wherever they are kept."""
