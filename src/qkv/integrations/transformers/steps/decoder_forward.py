"""`DecoderForward`: the forward of a decoder layer of transformers, of few tokens by one call of the kernel."""

from typing import Any

from torch import Tensor, nn

from qkv.integrations.transformers.steps.attention_forms import form_of as form_of_attention
from qkv.integrations.transformers.steps.cached_module import CachedForward
from qkv.integrations.transformers.steps.decoder_forms import form_of
from qkv.integrations.transformers.steps.rotated_forward import RotatedForward
from qkv.layers.gated_forward import GatedForward
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import NormedForward


class DecoderForward(CachedForward):
    """The forward of a decoder layer: of few tokens in one call where `decoder_step` allows it."""

    positional = ("hidden_states",)

    @property
    def attention(self) -> Any:
        """The attention module of the layer."""
        return self.module._modules["self_attn"]

    def output_of(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The output of the layer."""
        return self(x, **given)  # type: ignore[no-any-return]

    def returned(self, out: Tensor) -> Tensor:
        """The output alone."""
        return out

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class, or of the instance."""
        if self.own is None and len(args) == 1:
            from qkv.integrations.transformers.steps.decoder_step import layer_of, run  # which import transformers

            layer = layer_of(self.module, args[0], kwargs)
            if layer is not None:
                written, out = run([layer], args[0])
                if written:
                    return out
        return self.forward(*args, **kwargs)


def replace_decoder(module: nn.Module) -> None:
    """Gives a decoder layer whose forward is a known one a `DecoderForward`, if its parts have forwards of ours."""
    if "forward" not in module.__dict__ and is_known(module) and has_known_parts(module):
        DecoderForward.set_on(module)


def is_known(module: nn.Module) -> bool:
    """Whether the forward of a module's class is a known one of decoder layers."""
    return form_of(type(module).forward) is not None


def has_known_parts(module: nn.Module) -> bool:
    """Whether the attention, the norms and the MLP of a known layer may each be one call of the kernel."""
    form, parts = form_of(type(module).forward), module._modules
    attention = parts.get("self_attn")
    if form is None or attention is None or form_of_attention(type(attention).forward) is None:
        return False
    forwards: dict[str, type[InstanceForward]] = {"self_attn": RotatedForward, "mlp": GatedForward}
    forwards |= dict.fromkeys(filter(None, form.norms), NormedForward)
    return all(name in parts and isinstance(vars(parts[name]).get("forward"), kind) for name, kind in forwards.items())
