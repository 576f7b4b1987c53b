"""`project`: linear projections without the overhead of `Module.__call__`, and few rows by the kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv import kernels
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.plain import is_plain_linear, multiplies_its_parameters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj")
"""Their names in `Attention`; gate_proj is None in layers without a gate."""


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``, as a projection of an `Attention`.

    `Module.__call__` costs 2.7 us, so four of them take a fifth of a short attention. An ``nn.Linear`` without hooks,
    patches or replaced parameters skips it; any other module is called normally. Few rows without a gradient go to the
    kernel, as in a layer's step, and then have the bits of one.
    """
    if torch.compiler.is_compiling() or not is_plain_linear(linear):
        called: Tensor = linear(x)
        return called
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.mT + bias`` as a projection of an `Attention` computes it: few rows by the kernel."""
    return _product(x, weight, bias, by_kernel=kernels.has_few_rows(x))


class ProjectedForward(InstanceForward):
    """The forward of an ``nn.Linear`` in any model, by the kernel where it is faster than torch.

    ``Module.__call__`` has run what is attached to the module before it calls this, and runs the rest after.
    """

    computes_the_same = True

    def call(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear names it
        """``linear(input)`` without hooks, which are the caller's."""
        linear = self.module
        if self.own is not None or not multiplies_its_parameters(linear):
            called: Tensor = self.forward(input)
            return called
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None
        return _product(input, weight, bias, by_kernel=kernels.is_faster(input, weight))

    def in_program(self, input: Tensor) -> Tensor:  # noqa: A002
        """The operator ``qkv::linear`` without gradients, where it may be faster; else the module's forward.

        In fp32 it gains with large weights alone.
        """
        linear = self.module
        is_decoding = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
        if is_decoding and not torch.compiler.is_exporting():
            takes = self.own is None and multiplies_its_parameters(linear)
            if takes and kernels.is_faster_in_programs(input, linear.weight):  # type: ignore[arg-type]
                product: Tensor = torch.ops.qkv.linear(input, linear.weight, linear.bias)
                return product
        called: Tensor = super().in_program(input)
        return called


def reroute(model: nn.Module) -> None:
    """Gives each ``nn.Linear`` of a model, whatever its class, a `ProjectedForward`. Others are left alone: subclasses,
    and those with a forward of their own, which libraries set that move or quantise weights.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            ProjectedForward.set_on(module)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, by_kernel: bool) -> Tensor:
    """``x @ weight.mT + bias``. Torch does it where there is more to do: for a gradient, a mode, autocast."""
    if by_kernel and kernels.can_bypass_functions(*((x, weight) if bias is None else (x, weight, bias))):
        out = kernels.fast_linear(x, weight, bias)
        if out is not None:
            return out
    return F.linear(x, weight, bias)


def linear_projections(caller: str, layer: object) -> dict[str, nn.Linear]:
    """The projections of an `Attention` by name.

    Raises:
        TypeError: unless each is ``F.linear`` of its weight and bias, which can then be copied.
        ValueError: for a layer whose heads are over ranks.
    """
    if getattr(layer, "_share", None) is not None:
        raise ValueError(
            f"{caller}: the layer must have all of its heads; got one whose heads are over ranks by parallel.Heads. "
            "Call it on the whole layer, before."
        )
    projections: dict[str, nn.Linear] = {}
    for name in PROJECTIONS:
        projection = getattr(layer, name)
        if projection is None:  # gate_proj, or keys of another layer
            continue
        projections[name] = require_linear(caller, name, projection)
    return projections


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The weight if ``linear(x)`` is ``x @ weight.mT`` and nothing else, as for an ``nn.Linear`` without hooks or bias.

    For code that multiplies by the weight in another order.
    """
    if not is_plain_linear(linear):
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
