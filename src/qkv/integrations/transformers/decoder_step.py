"""`decoder_step`: a decoder layer of transformers over few tokens as one call of the kernel, and the rule for which
calls are: those whose attention, MLP and norms would each be one.
"""

from typing import Any

from torch import Tensor, nn

from qkv import kernels
from qkv.integrations.transformers.attention_forwards import form_of as form_of_attention
from qkv.integrations.transformers.attention_step import run_step, step_of
from qkv.integrations.transformers.cache_argument import former_names
from qkv.integrations.transformers.decoder_forwards import Form, form_of, without_checkpointing
from qkv.integrations.transformers.output_capturing import is_idle
from qkv.integrations.transformers.rotated_forward import RotatedForward
from qkv.layers.gated_forward import GatedForward, mlp_of
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import NormedForward, norm_of
from qkv.layers.plain import are_called_plainly, is_called_plainly
from qkv.layers.step_call import Block


def decoder_step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a decoder layer in one call of the kernel, its attention counted for reports; None, with nothing
    changed, if the call is composed of its parts.

    What is watched, replaced or given back is called: hooks, patches, adapters, subclasses of modules.
    """
    if len(args) != 1 or "hidden_states" in kwargs or kernels.is_tracing():
        return None
    forward = type(module).forward
    x, form = args[0], form_of(forward)
    if not former_names(without_checkpointing(forward)).isdisjoint(kwargs):
        return None
    if form is None or not isinstance(x, Tensor) or not kernels.has_few_rows(x):
        return None
    if module.training and (form.dropouts or getattr(module, "gradient_checkpointing", False)):
        return None
    block = _block_of(module, form, x)
    if block is None:
        return None
    attention: Any = module._modules["self_attn"]
    of_attention = form_of_attention(type(attention).forward)
    if of_attention is None:
        return None
    step = step_of(attention, of_attention, {**kwargs, "hidden_states": x})
    if isinstance(step, str):
        return None
    out = run_step(attention, x, step, block)
    return out if isinstance(out, Tensor) else None


def _block_of(module: nn.Module, form: Form, x: Tensor) -> Block | None:
    """What a layer computes around its attention; None if that is not one call of the kernel for each part."""
    parts = module._modules
    if not module.__dict__.keys().isdisjoint(form.names):
        return None
    modules = [None if name is None else parts.get(name) for name in form.norms]
    attention, gated = parts.get("self_attn"), parts.get("mlp")
    given = [module for module, name in zip(modules, form.norms, strict=True) if name is not None]
    if not _are_taken({RotatedForward: [attention], GatedForward: [gated], NormedForward: given}):
        return None
    for name in form.dropouts:  # none, unless it is training
        dropout = parts.get(name)
        if type(dropout) is not nn.Dropout or dropout.training or not is_called_plainly(dropout):
            return None
    mlp = mlp_of(gated)  # type: ignore[arg-type]
    if isinstance(mlp, str) or not kernels.gains_from_few_rows(x, mlp.gate[0]):
        return None
    norms = [None if norm is None else norm_of(norm) for norm in modules]
    found = [norm for norm in norms if norm is not None]
    tensors = [norm.gains for norm in found if norm.gains is not None]
    if len(tensors) != len(given) or any(norm[1:] != found[0][1:] for norm in found):  # eps, and what gains do
        return None
    return Block(tuple(norms), mlp) if kernels.can_bypass_functions(x, *tensors, *mlp.tensors) else None


def _are_taken(parts: dict[type[InstanceForward], list[nn.Module | None]]) -> bool:
    """Whether modules are called plainly, by forwards of ours that have not been taken back."""
    modules: list[nn.Module] = []
    for forward, each in parts.items():
        for module in each:
            own = None if module is None else module.__dict__.get("forward")
            if module is None or type(own) is not forward or own.is_taken_back or not own.is_of(module):
                return False
            modules.append(module)
    return are_called_plainly(modules, RotatedForward, is_idle)
