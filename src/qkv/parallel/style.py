"""`Context`: a style of ``parallelize_module`` for attention whose tokens are cut over ranks."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from qkv.parallel.context import Mark

_CALLS = "_qkv_calls_over_ranks"


class Context(ParallelStyle):
    """Marks an attention layer, so that its calls are those of one rank, whose layout `over` names.

    For models that cannot pass ``tokens=`` along: an attention module of transformers on ``attn_implementation="qkv"``,
    or a layer of qkv. Weights stay as they are; their gradients are those of the rank's tokens, to be summed over
    ranks. A marked layer that is called outside of `over`, or does not compute its attention by qkv, raises.

    Raises:
        TypeError: for modules of other kinds.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from qkv import parallel
        >>> parallelize_module(model, mesh, {"model.layers.*.self_attn": parallel.Context()})  # doctest: +SKIP

    Source: the style of torch's context parallelism, which has no layout and knows causal masks alone.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not hasattr(type(module), "_forward_over_ranks") and _implementation(module) is None:
            raise TypeError(
                "parallel.Context: the module must be an attention layer of qkv, or an attention module of "
                f"transformers with a config; got {type(module).__name__}."
            )
        if Mark.NAME not in vars(module):
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave)
        vars(module)[Mark.NAME] = Mark(device_mesh)
        return module


def _implementation(module: nn.Module) -> str | None:
    """The attention of a module of transformers; None for others."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _enter(module: nn.Module, arguments: Any) -> None:
    """Raises before a call that would leave out the tokens of other ranks."""
    implementation = _implementation(module)
    if implementation not in (None, "qkv"):
        raise ValueError(
            f'{type(module).__name__}: a module that parallel.Context() has marked must be on "qkv"; got '
            f'{implementation!r}, which knows the tokens of one rank alone. Use model.set_attn_implementation("qkv").'
        )
    vars(module)[_CALLS] = vars(module)[Mark.NAME].calls


def _leave(module: nn.Module, arguments: Any, result: Any) -> None:
    """Raises after a call in which attention knew the tokens of one rank alone."""
    if vars(module)[Mark.NAME].calls == vars(module).pop(_CALLS):
        raise ValueError(
            f"{type(module).__name__}: a module that parallel.Context() has marked must compute its attention by qkv; "
            "its forward did not call it."
        )
