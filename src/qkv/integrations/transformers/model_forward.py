"""`ModelForward`: the forward of a model of transformers, with all decoder layers in one call for few tokens."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from qkv.integrations.transformers.decoder_forward import DecoderForward
from qkv.integrations.transformers.layer_loops import Call, with_layers_at_once
from qkv.layers.instance_forward import InstanceForward


class ModelForward(InstanceForward):
    """The forward of a model: that of its class, but that it hands on all calls of its layers at once."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class; as it is where someone has replaced it since."""
        forward = None if self.own is not None else with_layers_at_once(type(self.module).forward, _run)
        return self.forward(*args, **kwargs) if forward is None else forward(self.module, *args, **kwargs)


def replace_model(module: nn.Module) -> None:
    """Gives a model that calls its layers in a loop a `ModelForward`, if some of them have a `DecoderForward`."""
    layers = [layer for parts in module.children() if isinstance(parts, nn.ModuleList) for layer in parts]
    has_decoders = any(isinstance(vars(layer).get("forward"), DecoderForward) for layer in layers)
    if has_decoders and "forward" not in vars(module) and with_layers_at_once(type(module).forward, _run) is not None:
        ModelForward.set_on(module)


def _run(calls: Sequence[Call], x: Any) -> Any:
    from qkv.integrations.transformers.decoder_step import run_calls  # which imports transformers

    return run_calls(calls, x)
