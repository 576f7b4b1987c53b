"""RMSNorm in any model by one call of the kernel: modules whose forward is one of those known here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import normalization as torch_normalization

from qkv import kernels
from qkv.kernels import Gain
from qkv.layers.head_norm import is_rms_norm_torchs
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.known_code import is_copy_of
from qkv.layers.plain import finds_parts_by_name


class NormedForward(InstanceForward):
    """The forward of a norm, by the kernel where `norm_of` reads it."""

    computes_the_same = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of the only argument."""
        if len(args) == 1 and not kwargs and self.own is None:
            norm = norm_of(self.module)
            if norm is not None:
                out = normalised(args[0], norm)
                if out is not None:
                    return out
        return self.forward(*args, **kwargs)


def replace_norm(module: nn.Module) -> None:
    """Gives a module that `norm_of` reads a `NormedForward`."""
    if "forward" not in module.__dict__ and norm_of(module) is not None:
        NormedForward.set_on(module)


class Norm(NamedTuple):
    """What a norm computes: `kernels.fast_rms_norm` with these arguments."""

    gains: Tensor | None
    eps: float
    gain: Gain


def normalised(x: Tensor, norm: Norm) -> Tensor | None:
    """The norm by the kernel; None where torch is to compute it: for a gradient, a mode, autocast."""
    tensors = (x,) if norm.gains is None else (x, norm.gains)
    return kernels.fast_rms_norm(x, *norm) if kernels.can_bypass_functions(*tensors) else None


def norm_of(module: nn.Module) -> Norm | None:
    """What a module computes when its forward is called, read from it as it is now; None for what is not known.

    Hooks are not asked for: whoever calls the forward runs them.
    """
    kind: Any = type(module)
    own = module.__dict__
    form = _form_of(kind, kind.forward, getattr(kind, "_norm", None))
    if form is None or "_norm" in own or "weight" in own:
        return None
    if form.forward is _OF_TORCH and not is_rms_norm_torchs():
        return None
    eps = own.get(form.eps)
    if type(eps) is not float:
        return None
    if form.scale_flag is not None and own.get(form.scale_flag) is False:
        return Norm(None, eps, form.gain)
    gains = module._parameters.get("weight")
    if gains is None or (form.scale_flag is not None and own.get(form.scale_flag) is not True):
        return None
    return Norm(gains, eps, form.gain)


class _Form(NamedTuple):
    """A known forward of a norm, and where it finds what it needs."""

    forward: Callable[..., Any]
    norm: Callable[..., Any] | None
    """the method ``_norm`` that it calls"""
    eps: str
    gain: Gain
    scale_flag: str | None = None
    """attribute that tells whether there are gains"""


@functools.lru_cache(maxsize=1024)
def _form_of(kind: type[nn.Module], forward: Any, norm: Any) -> _Form | None:
    """The form of a class with these methods."""
    if forward is _OF_TORCH and kind is nn.RMSNorm:
        return _Form(forward, None, "eps", Gain.WIDENED)
    for form in _FORMS:
        if is_copy_of(forward, form.forward) and (form.norm is None or is_copy_of(norm, form.norm)):
            return form if finds_parts_by_name(kind, "weight", form.eps, form.scale_flag) else None
    return None


def _llama(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _olmo(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _nemotron(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)


def _t5(self: Any, hidden_states: Any) -> Any:
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


def _rsqrt_norm(self: Any, x: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _pow_norm(self: Any, hidden_states: Any) -> Any:
    mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
    return hidden_states * torch.pow(mean_squared, -0.5)


def _gemma(self: Any, x: Any) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma3n(self: Any, hidden_states: Any) -> Any:
    normed_output = self._norm(hidden_states.float())
    if self.with_scale:
        normed_output = normed_output * self.weight.float()
    return normed_output.type_as(hidden_states)


def _moshi(self: Any, x: Any) -> Any:
    output = self._norm(x.float())
    output = output * self.weight.float()
    return output.type_as(x)


def _llama4(self: Any, x: Any) -> Any:
    output = self._norm(x.float()).type_as(x)
    return output * self.weight


_FORMS = [
    _Form(_llama, None, "variance_epsilon", Gain.ROUNDED),
    _Form(_t5, None, "variance_epsilon", Gain.ROUNDED),
    _Form(_olmo, None, "variance_epsilon", Gain.WIDENED),
    _Form(_nemotron, None, "variance_epsilon", Gain.WIDENED),
    _Form(_gemma, _rsqrt_norm, "eps", Gain.ONE_MORE),
    _Form(_gemma3n, _pow_norm, "eps", Gain.WIDENED, "with_scale"),
    _Form(_moshi, _rsqrt_norm, "eps", Gain.WIDENED),
    _Form(_llama4, _rsqrt_norm, "eps", Gain.ROUNDED),
]

_OF_TORCH: Any = nn.RMSNorm.forward if nn.RMSNorm.forward.__globals__ is vars(torch_normalization) else None
