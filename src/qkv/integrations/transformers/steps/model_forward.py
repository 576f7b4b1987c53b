"""`ModelForward`: the forward of a model of transformers, with all decoder layers in one call for few tokens."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from qkv.cache.handle import Handled
from qkv.integrations.transformers.steps.cached_layers import run_in_program
from qkv.integrations.transformers.steps.decoder_forward import DecoderForward
from qkv.integrations.transformers.steps.layer_loops import Call, code_of, with_layers_at_once
from qkv.layers.instance_forward import InstanceForward


class ModelForward(Handled, InstanceForward):
    """The forward of a model: that of its class, but that it hands on all calls of its layers at once."""

    def _enter(self) -> None:
        super()._enter()
        self.known = type(self.module).forward
        self.code = code_of(self.known)
        self.at_once = with_layers_at_once(self.known, _run)

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions, which a pickle cannot have."""
        return {**super().__getstate__(), "known": None, "code": None, "at_once": None}

    @property
    def _current(self) -> FunctionType | None:
        """The forward with layers at once; None where someone has replaced that of the class since, or of the model."""
        if self.own is not None or type(self.module).forward is not self.known:
            return None
        return self.at_once if code_of(self.known) is self.code else None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class, or of the instance."""
        forward = self._current
        return self.forward(*args, **kwargs) if forward is None else forward(self.module, *args, **kwargs)

    def in_program(self, *args: Any, **kwargs: Any) -> Any:
        """The same with one operator for the layers; exported programs have the layers themselves."""
        forward = self._current if torch.compiler.is_dynamo_compiling() else None
        if forward is None or torch.compiler.is_exporting():
            return super().in_program(*args, **kwargs)
        return forward(self.module, *args, **kwargs)


def replace_model(module: nn.Module) -> None:
    """Gives a model that calls its layers in a loop a `ModelForward`, if some of them have a `DecoderForward`."""
    layers = [layer for parts in module.children() if isinstance(parts, nn.ModuleList) for layer in parts]
    has_decoders = any(isinstance(vars(layer).get("forward"), DecoderForward) for layer in layers)
    if has_decoders and "forward" not in vars(module) and with_layers_at_once(type(module).forward, _run) is not None:
        ModelForward.set_on(module)


def _run(calls: Sequence[Call], x: Any, model: nn.Module) -> Any:
    if torch.compiler.is_compiling():
        return run_in_program(calls, x, model)
    from qkv.integrations.transformers.steps.decoder_step import run_calls  # which imports transformers

    return run_calls(calls, x, DecoderForward)
