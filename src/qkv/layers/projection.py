"""`project`: a linear projection, at the cost of its arithmetic."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``.

    A call of a module costs 2.7 us besides its arithmetic, four of which make a fifth of a short attention. A plain
    ``nn.Linear`` on which nothing hangs is spared them; whatever replaces or watches it is called as ever.
    """
    if type(linear) is not nn.Linear or torch.compiler.is_compiling() or _is_watched(linear):
        projected: Tensor = linear(x)
        return projected
    parameters = linear._parameters
    weight = parameters["weight"]
    assert weight is not None
    return F.linear(x, weight, parameters["bias"])


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )
