"""`InstanceForward`: a forward that is set on one module, and can be taken back."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class InstanceForward:
    """A forward in place of a module's own: that of the class as it is now, or one set on the instance before.

    The module keeps its type, parameters, state dict and hooks, which ``Module.__call__`` runs around any forward.
    Deep copies and pickles of the module have their own. Subclasses define `call`.
    """

    computes_the_same: ClassVar[bool] = False
    """whether results are those of the module's own forward, so that code may compute them without calling either"""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")

    @classmethod
    def set_on(cls, module: nn.Module) -> None:
        """Puts a forward of this class on the module."""
        module.__dict__["forward"] = cls(module)

    @classmethod
    def take_back(cls, module: nn.Module) -> None:
        """Undoes `set_on`; a module without one, or with another one since, is left alone."""
        forward = module.__dict__.get("forward")
        if isinstance(forward, cls):
            if forward.own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward.own

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward."""
        if self.own is not None:
            return self.own
        kind = type(self.module)
        forward: Any = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
        return forward.__get__(self.module, kind)  # type: ignore[no-any-return]

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
        return self.in_program(*args, **kwargs) if torch.compiler.is_compiling() else self.call(*args, **kwargs)
