"""Changes of attention layers in a model of transformers, while they are tried out: windows and fewer KV heads."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkv.analysis.words import counted
from qkv.convert.heads.pooling import ConversionMethod
from qkv.convert.plan import plan_conversion
from qkv.convert.state import convert_state_dict, specs_of
from qkv.integrations.transformers.attention import NAME, observed
from qkv.masks import Mask

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
"""What modules hold their hooks in."""


class Change(ABC):
    """What a layer would have; its ``str`` names that."""

    window: int | None = None
    sink_tokens: int = 0
    kv_heads: int | None = None

    def alters(self, mask: Mask) -> bool:
        """Whether it would change a layer with this mask."""
        return True

    @abstractmethod
    def of(self, layers: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """The context in which attention modules, given by name, are changed."""


class Window(Change):
    """A window in addition to the mask of each layer."""

    def __init__(self, window: int, sink_tokens: int) -> None:
        self.window, self.sink_tokens = window, sink_tokens
        self._mask = Mask.causal(window, sink_tokens=sink_tokens)

    def __str__(self) -> str:
        sinks = f" and {counted(self.sink_tokens, 'sink token')}" if self.sink_tokens else ""
        return f"a window of {self.window:,} tokens{sinks}"

    def alters(self, mask: Mask) -> bool:
        assert self.window is not None
        return mask.lookback is None or mask.lookback >= self.window

    @contextmanager
    def of(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        changed = {id(layer) for layer in layers.values()}

        def narrow(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Mask | None:
            return self.narrowed(q, k, options) if id(module) in changed else None

        with observed(narrow):
            yield

    def narrowed(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> Mask:
        """The mask of a call of attention, with the window."""
        mask, offset = options["mask"], options["offset"]
        try:
            return mask & self._mask  # type: ignore[no-any-return]
        except ValueError:  # not a mask that we have
            lengths = q.shape[2], k.shape[2]
            seen, shown = (each.visible(*lengths, offset, device=q.device) for each in (mask, self._mask))
            return Mask.dense(seen & shown)


class FewerHeads(Change):
    """Fewer KV heads: modules of the same class, with the weights that a conversion of the model would have."""

    def __init__(self, model: Any, kv_heads: int, how: ConversionMethod) -> None:
        check_kv_heads("price", model, kv_heads, how)
        self._model = model
        converted = convert_state_dict(model.state_dict(), model.config.to_dict(), kv_heads, how=how)
        self._weights = converted.state_dict
        with torch.device("meta"):
            self._pooled = type(model)(type(model.config)(**converted.config))
        self._pooled.eval()
        self._pooled.config._attn_implementation = NAME
        self.kv_heads, self._how = kv_heads, how

    def __str__(self) -> str:
        noun = "head" if self.kv_heads == 1 else "heads"
        return f"{self.kv_heads} KV {noun} by {self._how} pooling"

    @contextmanager
    def of(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        try:
            for name in layers:
                self._model.set_submodule(name, self._made(name))
            yield
        finally:
            for name, layer in layers.items():
                self._model.set_submodule(name, layer)

    def _made(self, name: str) -> nn.Module:
        """The module with the pooled weights."""
        made: nn.Module = self._pooled.get_submodule(name)
        made.load_state_dict({key: self._weights[f"{name}.{key}"] for key in made.state_dict()}, assign=True)
        for key, part in self._model.get_submodule(name).named_modules():
            if "forward" in vars(part):
                raise ValueError(
                    f"price: {name} must not have a forward of its own, as {key or 'it'} has. Those of qkv are taken "
                    "back by qkv.accelerate(model, enabled=False)."
                )
            vars(made.get_submodule(key)).update({hooks: vars(part)[hooks] for hooks in HOOKS})
        return made


def check_kv_heads(caller: str, model: Any, kv_heads: int, how: ConversionMethod) -> None:
    """Raises a CheckpointError or ValueError unless layers of a model can have so many KV heads.

    From names and shapes alone: the model may be on the meta device.
    """
    config = model.config.to_dict()
    now = model.config.get_text_config().num_key_value_heads if "num_key_value_heads" in config else None
    if kv_heads == now:
        raise ValueError(f"{caller}: kv_heads must be fewer than the model's {now}; got {kv_heads}.")
    becomes = plan_conversion(caller, config, specs_of(model.state_dict()), kv_heads, how=how).config["model_type"]
    if becomes != config["model_type"]:
        raise ValueError(
            f"{caller}: {config['model_type']} becomes {becomes} with fewer KV heads, whose layers do not fit into it. "
            "Convert it, and compare the whole: qkv convert --kv-heads."
        )
