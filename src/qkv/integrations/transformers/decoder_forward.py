"""`DecoderForward`: the forward of a decoder layer of transformers, of few tokens by one call of the kernel."""

from typing import Any

from torch import nn

from qkv.integrations.transformers.decoder_forwards import form_of
from qkv.layers.instance_forward import InstanceForward


class DecoderForward(InstanceForward):
    """The forward of a decoder layer: of few tokens in one call where `decoder_step` allows it."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class, or of the instance."""
        if self.own is None:
            from qkv.integrations.transformers.decoder_step import decoder_step  # which imports transformers

            out = decoder_step(self.module, args, kwargs)
            if out is not None:
                return out
        return self.forward(*args, **kwargs)


def replace_decoder(module: nn.Module) -> None:
    """Gives a decoder layer whose forward is a known one a `DecoderForward`."""
    if "forward" not in module.__dict__ and form_of(type(module).forward) is not None:
        DecoderForward.set_on(module)
