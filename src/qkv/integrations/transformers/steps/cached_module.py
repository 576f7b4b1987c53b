"""``qkv::cached_module``: a call of an attention module of transformers with our cache, or of a decoder layer, as one
operator of a compiled program.

As ``qkv::cached_layer`` is for our own layers: the operator finds module and cache by their `Handle`, and calls the
module as eager code does. So a program does not depend on how long a cache is, and its steps are those of eager.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, library, nn

from qkv.cache.handle import find
from qkv.integrations.transformers.masks import MaskKind, kind_of, mask_of_kind
from qkv.integrations.transformers.steps.attention_forms import form_of
from qkv.layers.operator_forward import OperatorForward, call_with, parameters_of

_IGNORED = frozenset(("position_ids", "use_cache", "cache_position"))
"""Keywords that no known forward reads, and the attention function ignores."""


class CachedForward(OperatorForward):
    """Base of forwards, of modules with a cache, that are operators of compiled programs."""

    positional: ClassVar[tuple[str, ...]]
    """names of the arguments before the cache that an operator takes by position"""
    cache_name = "past_key_values"
    """of the argument with the cache"""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        form = form_of(type(self.attention).forward)
        if form is not None:
            self.is_operator, self.cache_name = True, form.cache

    def in_program(self, *args: Any, **kwargs: Any) -> Any:
        """One operator for calls with a `QKVCache` that may be one; others are followed."""
        names = (*self.positional, self.cache_name)
        if len(args) > len(names):
            return super().in_program(*args, **kwargs)
        given = {names[place]: args[place] for place in range(len(args))}  # zip(strict=False): not in torch 2.9
        given.update(kwargs)
        if self.layer_of(given) is None:
            return super().in_program(*args, **kwargs)
        return self.returned(as_operator(self, given))

    @property
    def attention(self) -> Any:
        """The attention module, which knows its layer of the cache and its window."""
        raise NotImplementedError

    def output_of(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The output of eager code with these arguments beside x."""
        raise NotImplementedError

    def returned(self, out: Tensor) -> Any:
        """What the forward returns with this output."""
        raise NotImplementedError

    @property
    def window(self) -> int | None:
        """Number of keys that a query sees; None for all."""
        module = self.attention
        window = getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None)
        return window if type(window) is int and window > 0 else None

    def layer_of(self, given: dict[str, Any]) -> Any:
        """The layer of the cache to which a call appends, if the call is to be an operator; else None."""
        if not is_usual(given, self.cache_name) or not self.may_be_operator(given.get("hidden_states")):
            return None
        return self.layer_in(given[self.cache_name])

    def layer_in(self, cache: Any) -> Any:
        """The layer of a `QKVCache` to which a call appends; None if it is not one of ours."""
        from qkv.integrations.transformers.cache import is_ours

        index = self.attention.layer_idx
        layer = cache.layers[index] if index < len(cache.layers) else None
        return layer if is_ours(layer) and layer.handle.tensor is not None else None  # type: ignore[union-attr]


def is_usual(given: dict[str, Any], cache_name: str) -> bool:
    """Whether a call, of whichever module, has a `QKVCache` and no arguments but those that operators take."""
    from qkv.integrations.transformers.cache import QKVCache

    cache, mask, tables = (given.get(name) for name in (cache_name, "attention_mask", "position_embeddings"))
    if type(cache) is not QKVCache or cache.offloading or cache.handle.tensor is None:
        return False
    read = ("hidden_states", "attention_mask", "position_embeddings", cache_name)
    for name in given:
        if name not in read and name not in _IGNORED and given[name] is not None and given[name] is not False:
            return False
    if not (tables is None or (type(tables) is tuple and len(tables) == 2)):
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)


def as_operator(forward: CachedForward, given: dict[str, Any]) -> Tensor:
    """The output of a forward that has a `layer_of` the cache, as an operator."""
    window, mask = forward.window, given.get("attention_mask")
    layer, cache = forward.layer_of(given), given[forward.cache_name]
    handles = forward.handle.tensor, cache.handle.tensor, layer.handle.tensor
    tables = given.get("position_embeddings") or ()
    masks = () if mask is None else with_kind(mask, window)
    parameters, x = parameters_of(forward.module), given["hidden_states"]
    out: Tensor = torch.ops.qkv.cached_module(*handles, parameters, x, tables, masks, window)
    return out


def with_kind(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A mask, its `MaskKind`, and the keys that padding leaves, as operators take them.

    The kind is found once for all modules with this window if `make_mask` made the mask.
    """
    found: dict[int | None, tuple[Tensor, Tensor]] = getattr(mask, "qkv_kinds", {})
    if window not in found:
        found[window] = torch.ops.qkv.kind_of_mask(mask, window)
    return mask, *found[window]


def mask_in(given: Sequence[Tensor], window: int | None) -> Tensor | None:
    """What eager code is to take for a mask that is given `with_kind`."""
    mask, kind, keep = given
    return mask_of_kind(mask, MaskKind(*kind.tolist()), keep, window)


def _cached_module(
    forward: Tensor,
    cache: Tensor,
    layer: Tensor,
    parameters: list[Tensor],
    x: Tensor,
    tables: list[Tensor],
    masks: list[Tensor],
    window: int | None,
) -> Tensor:
    """``qkv::cached_module``: the output of a module for tokens ``x (B, L, width)``, which are appended.

    Args:
        layer: of the cache, which is written to.
        parameters: of the module.
        tables: cos and sin, if there are any.
        masks: a mask `with_kind`, if there is one.
        window: number of keys that a query sees; None for all.
    """
    found: CachedForward = find(forward)
    given = {
        "attention_mask": mask_in(masks, window) if masks else None,
        "position_embeddings": tuple(tables) or None,
        found.cache_name: find(cache),
    }
    return call_with(parameters, found.module, lambda: found.output_of(x, given))


def _like_x(forward: Tensor, cache: Tensor, layer: Tensor, parameters: list[Tensor], x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _kind_of_mask(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """``qkv::kind_of_mask``: `masks.kind_of`, for all modules that a program calls with a mask."""
    kind, keep = kind_of(mask, window)
    return torch.tensor(kind, dtype=torch.int64), keep


def _kind_and_keys(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    return mask.new_empty(2, dtype=torch.int64), mask.new_empty((mask.shape[0], mask.shape[3]), dtype=torch.bool)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "cached_module(Tensor forward, Tensor cache, Tensor(a!) layer, Tensor[] parameters, Tensor x, Tensor[] tables, "
    "Tensor[] masks, int? window) -> Tensor"
)
_LIBRARY.define("kind_of_mask(Tensor mask, int? window) -> (Tensor, Tensor)")
_LIBRARY.impl("cached_module", _cached_module, "CPU")
_LIBRARY.impl("kind_of_mask", _kind_of_mask, "CPU")
library.register_fake("qkv::cached_module", _like_x, lib=_LIBRARY)
library.register_fake("qkv::kind_of_mask", _kind_and_keys, lib=_LIBRARY)
