"""Decoder layers of transformers over few tokens, as many as follow one another in one call of the kernel, and the rule
for which calls are: those whose attention, MLP and norms would each be one.
"""

import functools
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv import kernels
from qkv.cache import Keys
from qkv.integrations.transformers.cache_argument import former_names
from qkv.integrations.transformers.steps.attention_step import Step, count, step_of, step_with
from qkv.integrations.transformers.steps.decoder_forms import without_checkpointing
from qkv.integrations.transformers.steps.decoder_parts import Found, found_in, is_called_by, remember, remembered
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.step_call import arguments, decoder_layer
from qkv.layers.tree_state import ClassState


class Layer(NamedTuple):
    """What the kernel needs to take a call of a decoder layer."""

    module: nn.Module
    given: dict[str, Any]
    """the arguments of the call, and that of its first name"""
    found: Found
    step: Step

    @property
    def attention(self) -> nn.Module:
        """The attention module."""
        return self.module._modules["self_attn"]  # type: ignore[return-value]


def layer_of(
    module: nn.Module, x: Tensor, given: dict[str, Any], found: Found | None = None, like: Layer | None = None
) -> Layer | None:
    """What the kernel needs to compute ``module(x, **given)``, of a decoder layer; None if the call is composed of its
    parts.

    What is watched, replaced or given back is called: hooks, patches, adapters, subclasses of modules.

    Args:
        found: as `found_in` has it, if nothing has changed since.
        like: the layer before, in the same step.
    """
    if like is not None and found is not None and _asks_the_same(like, module, given, found):
        given, tables = like.given, like.step.tables
        step = step_with(module._modules["self_attn"], found.form, given, found.parts, tables)
    else:
        if "hidden_states" in given or kernels.is_tracing():
            return None
        if not former_names(without_checkpointing(type(module).forward)).isdisjoint(given):
            return None
        if not isinstance(x, Tensor) or not kernels.gains_from_rows(x):
            return None
        found = found or found_in(module)
        if found is None or not kernels.gains_from_few_rows(x, found.block.mlp.gate[0]):
            return None
        given = {**given, "hidden_states": x}
        step = step_of(module._modules["self_attn"], found.form, given, found.parts)
    if isinstance(step, str) or not kernels.can_bypass_functions(x, *found.block_tensors):
        return None
    return Layer(module, given, found, step)


def _asks_the_same(like: Layer, module: nn.Module, given: dict[str, Any], found: Found) -> bool:
    """Whether a call gets the answers that the one of another layer got, apart from its tensors and cache."""
    one, other = like.attention, module._modules["self_attn"]
    return (
        type(module) is type(like.module)
        and type(other) is type(one)
        and other.config is one.config
        and found.form.rotary != "use_rope"  # by an attribute of each module
        and found.parts.head_dim == like.found.parts.head_dim
        and found.block.mlp.gate[0].shape == like.found.block.mlp.gate[0].shape
        and len(given) == len(like.given) - 1
        and all(map(is_, given.values(), map(like.given.get, given, repeat(_MISSING))))
    )


_MISSING = object()


def run(layers: Sequence[Layer], x: Tensor) -> tuple[int, Tensor]:
    """How many of the first layers are computed in one call of the kernel, counted for reports, and their output.

    Fewer than all where a cache or the kernel refuses the next one, of which nothing is changed.
    """
    first = x.contiguous()
    outs = [torch.empty_like(first) for _ in layers[:2]]  # a layer reads one and writes the other
    marks: list[tuple[Any, ...]] = []
    claimed: list[Keys] = []
    given: list[kernels.DecoderLayer] = []
    written = 0
    try:
        for index, (_, _, found, step) in enumerate(layers):
            marks.append(step.mark())
            keys = step.claim(x)
            if keys is None:
                marks.pop()
                break
            claimed.append(keys)
            read, out = outs[(index - 1) % 2] if index else first, outs[index % 2]
            given.append(decoder_layer(*arguments(read, out, keys, step.computed), found.block))
        written = kernels.decoder_layers(given) if given else 0
    finally:  # of all, if memory is lacking
        for layer, mark in reversed(list(zip(layers, marks, strict=False))[written:]):
            layer.step.restore(mark)
    for layer, keys in zip(layers[:written], claimed, strict=False):
        count(layer.attention, x, layer.step, keys)
    return written, outs[(written - 1) % 2] if written else x


def run_calls(calls: Sequence[tuple[nn.Module, dict[str, Any]]], x: Any, forward: type[InstanceForward]) -> Any:
    """The output of layers, each called with that of the one before: decoder layers that follow one another in one call
    of the kernel, others as modules.

    Args:
        forward: of decoder layers, whose work is done here.
    """
    at, most = 0, len(calls)
    if not isinstance(x, Tensor) or not kernels.gains_from_rows(x):  # a prompt, whose layers need not be looked at
        for module, given in calls:
            x = module(x, **given)
        return x
    while at < len(calls):
        layers: list[Layer] = []
        caches: list[Any] = []
        is_current = functools.cache(ClassState.is_current)  # asked once for all layers
        for module, given in calls[at : at + most]:
            found = remembered(module, is_current)
            if found is None and is_called_by(module, forward):
                found = remember(module, found_in(module))
            like = layers[-1] if layers else None
            layer = None if found is None else layer_of(module, x, given, found, like)
            if layer is None or (layer.step.layer is not None and layer.step.layer in caches):
                break  # a cache that another layer has appended to is longer than it was when it was asked
            caches.append(layer.step.layer)
            layers.append(layer)
        written, x = run(layers, x) if layers else (0, x)
        at += written
        if written < len(layers):  # as those after it may be refused, which must not be asked each time
            most = 1
        elif written == most:
            most = 2 * most
            continue
        if at < len(calls):  # whose next layer is another, or was refused
            module, given = calls[at]
            x = module(x, **given)
            at += 1
    return x
