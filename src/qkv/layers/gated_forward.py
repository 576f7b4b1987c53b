"""Gated MLPs in any model by one call of the kernel: modules whose forward is one of those known here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv import kernels
from qkv.kernels import Projection
from qkv.layers.known_code import is_copy_of
from qkv.layers.operator_forward import OperatorForward, as_operator
from qkv.layers.plain import finds_parts_by_name, is_called_plainly, is_plain_linear, parameters_of


class GatedForward(OperatorForward):
    """The forward of a gated MLP, by the kernel for few rows where `mlp_of` reads it."""

    computes_the_same = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        form = _form_of(type(module), type(module).forward)  # type: ignore[arg-type]
        if form is not None:
            self.first_projection, *_, self.last_projection = form.projections
            self.is_operator = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP of the only argument."""
        if len(args) == 1 and not kwargs and self.own is None and kernels.gains_from_rows(args[0]):
            out = self._by_kernel(args[0])
            if out is not None:
                return out
        return self.forward(*args, **kwargs)

    def in_program(self, *args: Any, **kwargs: Any) -> Any:
        """An operator for few rows in 16 bits; in fp32, torch's products are as fast on one thread."""
        if len(args) == 1 and not kwargs and self.may_be_operator(args[0]):
            weight = self.module._modules[self.first_projection].weight  # type: ignore[union-attr]
            if weight.dtype is not torch.float32 and kernels.is_faster_in_programs(args[0], weight):  # type: ignore[arg-type]
                return as_operator(self, args[0])
        return super().in_program(*args, **kwargs)

    def _by_kernel(self, x: Tensor) -> Tensor | None:
        """The MLP of few rows; None where its parts are faster, and where they are to compute it."""
        mlp = mlp_of(self.module)
        if isinstance(mlp, str) or not kernels.gains_from_few_rows(x, mlp.gate[0]):
            return None
        return kernels.fast_gated_mlp(x, *mlp) if kernels.can_bypass_functions(x, *mlp.tensors) else None


def replace_mlp(module: nn.Module) -> None:
    """Gives a module that `mlp_of` reads a `GatedForward`."""
    if "forward" not in module.__dict__ and not isinstance(mlp_of(module), str):
        GatedForward.set_on(module)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether the class of a module has a known forward."""
    kind: Any = type(module)
    return _form_of(kind, kind.forward) is not None


class Mlp(NamedTuple):
    """What a gated MLP computes: `kernels.fast_gated_mlp` with these arguments."""

    gate: Projection
    up: Projection | None
    down: Projection
    activation: str

    @property
    def tensors(self) -> list[Tensor]:
        """Weights and biases."""
        given = (*self.gate, *(self.up or ()), *self.down)
        return [tensor for tensor in given if tensor is not None]


def mlp_of(module: nn.Module) -> Mlp | str:
    """What a module computes when its forward is called, read from it as it is now; or why it is composed of its parts.

    Parts that are watched or replaced are called: hooks, patches, adapters, quantised or sharded layers, subclasses.
    Hooks of the module itself are not asked for: whoever calls the forward runs them.
    """
    kind: Any = type(module)
    own, modules = module.__dict__, module._modules
    form = _form_of(kind, kind.forward)
    if form is None:
        return "its forward is not a known one"
    linears = [None if name in own else modules.get(name) for name in form.projections]
    parameters = parameters_of(linears)
    if parameters is None:
        name = next(name for name, linear in zip(form.projections, linears, strict=True) if not is_plain_linear(linear))
        return f"{name} is watched, or is not an nn.Linear alone"
    if form.activation is None:
        activation = "silu" if F.silu is _SILU else None
    else:
        activation = None if form.activation in own else _activation_of(modules.get(form.activation))
    if activation is None:
        return f"{form.activation or 'F.silu'} is watched, or is none of {', '.join(kernels.ACTIVATIONS)}"
    gate, *up, down = zip(parameters[::2], parameters[1::2], strict=True)
    return Mlp(gate, up[0] if up else None, down, activation)


def _activation_of(module: nn.Module | None) -> str | None:
    """The name of an activation that a module computes and nothing else."""
    if module is None or not is_called_plainly(module):
        return None
    kind: Any = type(module)
    how = _known_activation(kind, kind.forward)
    if how == "its own function":
        act: Any = module.__dict__.get("act")
        if act is _GELU:
            return "gelu"
        is_partial = type(act) is functools.partial and act.func is _GELU and not act.args
        return "gelu_tanh" if is_partial and act.keywords == {"approximate": "tanh"} else None
    if how == "gelu" and F.gelu is _GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.__dict__.get("approximate", ""))
    is_torchs = F.silu is _SILU if how == "silu" else F.relu is _RELU
    return how if how in ("silu", "relu") and is_torchs else None


@functools.lru_cache(maxsize=1024)
def _known_activation(kind: type[nn.Module], forward: Any) -> str | None:
    """What the forward of a class calls."""
    if kind in _OF_TORCH:
        name, of_torch = _OF_TORCH[kind]
        return name if forward is of_torch else None
    if is_copy_of(forward, _own_function):
        return "its own function"
    return "silu" if is_copy_of(forward, _silu) else None


class _Form(NamedTuple):
    """A known forward of a gated MLP, and the names of its parts."""

    forward: Callable[..., Any]
    projections: tuple[str, ...]
    """gate, up and down; or gate and up as one, and down"""
    activation: str | None
    """None if it calls ``F.silu``"""


@functools.lru_cache(maxsize=1024)
def _form_of(kind: type[nn.Module], forward: Any) -> _Form | None:
    """The form of a class with this forward."""
    for form in _FORMS:
        if is_copy_of(forward, form.forward):
            return form if finds_parts_by_name(kind, *form.projections, form.activation) else None
    return None


def _own_function(self: Any, input: Any) -> Any:  # noqa: A002  transformers' name
    return self.act(input)


def _silu(self: Any, input: Any) -> Any:  # noqa: A002
    return nn.functional.silu(input)


def _llama(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504  the bytecode of transformers' forward


def _qwen(self: Any, hidden_state: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))


def _lfm2(self: Any, x: Any) -> Any:
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _phi3(self: Any, hidden_states: Any) -> Any:
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)


def _granite(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.input_linear(hidden_states)
    chunked_hidden_states = hidden_states.chunk(2, dim=-1)
    hidden_states = self.activation(chunked_hidden_states[0]) * chunked_hidden_states[1]
    hidden_states = self.output_linear(hidden_states)
    return hidden_states  # noqa: RET504


_FORMS = [
    _Form(_llama, ("gate_proj", "up_proj", "down_proj"), "act_fn"),
    _Form(_qwen, ("gate_proj", "up_proj", "down_proj"), "act_fn"),
    _Form(_lfm2, ("w1", "w3", "w2"), None),
    _Form(_phi3, ("gate_up_proj", "down_proj"), "activation_fn"),
    _Form(_granite, ("input_linear", "output_linear"), "activation"),
]

_SILU, _RELU = F.silu, F.relu
_GELU: Any = torch._C._nn.gelu
_OF_TORCH: dict[Any, tuple[str, Any]] = {
    nn.SiLU: ("silu", nn.SiLU.forward),
    nn.ReLU: ("relu", nn.ReLU.forward),
    nn.GELU: ("gelu", nn.GELU.forward),
}
