"""Decoder layers of transformers over few tokens, as many as follow one another in one call of the kernel, and the rule
for which are: those whose attention, MLP and norms would each be one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv import kernels
from qkv.cache import Keys
from qkv.integrations.transformers.attention_forwards import form_of as form_of_attention
from qkv.integrations.transformers.attention_step import Step, count, step_of
from qkv.integrations.transformers.cache_argument import former_names
from qkv.integrations.transformers.decoder_forward import DecoderForward
from qkv.integrations.transformers.decoder_forwards import Form, form_of, without_checkpointing
from qkv.integrations.transformers.output_capturing import is_idle
from qkv.integrations.transformers.rotated_forward import RotatedForward
from qkv.layers.gated_forward import GatedForward, mlp_of
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import NormedForward, norm_of
from qkv.layers.plain import are_called_plainly, is_called_plainly
from qkv.layers.step_call import Block, arguments, decoder_layer


class Layer(NamedTuple):
    """What the kernel needs of a decoder layer."""

    attention: nn.Module
    step: Step
    block: Block


def layer_of(module: nn.Module, x: Tensor, given: dict[str, Any]) -> Layer | None:
    """What the kernel needs to compute ``module(x, **given)``, of a decoder layer; None if the call is composed of its
    parts.

    What is watched, replaced or given back is called: hooks, patches, adapters, subclasses of modules.
    """
    if "hidden_states" in given or kernels.is_tracing():
        return None
    forward = type(module).forward
    form = form_of(forward)
    if not former_names(without_checkpointing(forward)).isdisjoint(given):
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
    step = step_of(attention, of_attention, {**given, "hidden_states": x})
    return None if isinstance(step, str) else Layer(attention, step, block)


def run(layers: Sequence[Layer], x: Tensor) -> tuple[int, Tensor]:
    """How many of the first layers are computed in one call of the kernel, counted for reports, and their output.

    Fewer than all where a cache or the kernel refuses the next one, of which nothing is changed.
    """
    x = x.contiguous()
    outs = [torch.empty_like(x) for _ in layers[:2]]  # a layer reads one and writes the other
    marks: list[tuple[Any, ...]] = []
    claimed: list[Keys] = []
    given: list[kernels.DecoderLayer] = []
    written = 0
    try:
        for index, (_, step, block) in enumerate(layers):
            marks.append(step.mark())
            keys = step.claim(x)
            if keys is None:
                marks.pop()
                break
            claimed.append(keys)
            read, out = outs[(index - 1) % 2] if index else x, outs[index % 2]
            given.append(decoder_layer(*arguments(read, out, keys=keys, **step.options()), block))
        written = kernels.decoder_layers(given) if given else 0
    finally:  # of all, if memory is lacking
        for (_, step, _), mark in reversed(list(zip(layers, marks, strict=False))[written:]):
            step.restore(mark)
    for (attention, step, _), keys in zip(layers[:written], claimed, strict=False):
        count(attention, x, step, keys)
    return written, outs[(written - 1) % 2] if written else x


def run_calls(calls: Sequence[tuple[nn.Module, dict[str, Any]]], x: Any) -> Any:
    """The output of layers, each called with that of the one before: decoder layers that follow one another in one call
    of the kernel, others as modules.
    """
    at = 0
    while at < len(calls):
        layers: list[Layer] = []
        for module, given in calls[at:]:
            layer = layer_of(module, x, given) if _is_decoder(module) else None
            if layer is None:
                break
            layers.append(layer)
        if layers:
            written, x = run(layers, x)
            at += written
        if at < len(calls):  # whose next layer is another, or was refused
            module, given = calls[at]
            x = module(x, **given)
            at += 1
    return x


def _is_decoder(module: nn.Module) -> bool:
    """Whether calling a module is calling a `DecoderForward` on it and nothing else."""
    own = module.__dict__.get("forward")
    is_ours = type(own) is DecoderForward and own.own is None and not own.is_taken_back and own.is_of(module)
    return is_ours and are_called_plainly((module,), DecoderForward, is_idle)


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
