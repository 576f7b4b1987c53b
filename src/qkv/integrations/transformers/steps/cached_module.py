"""``qkv::cached_modules``: a call of an attention module of transformers with our cache, or of decoder layers one after
another, as one operator of a compiled program.

As ``qkv::cached_layer`` is for our own layers: the operator finds modules and cache by their `Handle`, and calls them
as eager code does. So a program does not depend on how long a cache is, and its steps are those of eager.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, library, nn
from typing_extensions import Self

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
        given = dict(zip((*self.positional, self.cache_name), args, strict=False))
        given.update(kwargs)
        if len(args) > len(self.positional) + 1 or self.layer_of(given) is None:
            return super().in_program(*args, **kwargs)
        return self.returned(as_operator([(self, given)]))

    @property
    def attention(self) -> Any:
        """The attention module, which knows its layer of the cache and its window."""
        raise NotImplementedError

    @classmethod
    def output_of(cls, calls: list[tuple[Self, dict[str, Any]]], x: Tensor) -> Tensor:
        """The output of eager code for forwards of this kind one after another, with these arguments beside x."""
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
        from qkv.integrations.transformers.cache import QKVCache, is_ours

        cache, mask, tables = (given.get(name) for name in (self.cache_name, "attention_mask", "position_embeddings"))
        if type(cache) is not QKVCache or not self.may_be_operator(given.get("hidden_states")):
            return None
        if cache.offloading or cache.handle.tensor is None:
            return None
        read = ("hidden_states", "attention_mask", "position_embeddings", self.cache_name)
        for name in given:
            if name not in read and name not in _IGNORED and given[name] is not None and given[name] is not False:
                return None
        if not (tables is None or (type(tables) is tuple and len(tables) == 2)):
            return None
        if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            return None
        index = self.attention.layer_idx
        layer = cache.layers[index] if index < len(cache.layers) else None
        return layer if is_ours(layer) and layer.handle.tensor is not None else None  # type: ignore[union-attr]


def as_operator(calls: Sequence[tuple[CachedForward, dict[str, Any]]]) -> Tensor:
    """The output of the last of these forwards, each of which has a `layer_of` the cache and the same one, as an
    operator.
    """
    first, given = calls[0]
    layers: list[Tensor] = []
    parameters: list[Tensor] = []
    tables: list[Tensor | None] = []
    masks: list[Tensor | None] = []
    windows: list[int] = []
    for forward, each in calls:
        layers.append(forward.layer_of(each).handle.tensor)
        parameters += parameters_of(forward.module)
        tables += each.get("position_embeddings") or (None, None)
        mask, window = each.get("attention_mask"), forward.window
        masks += (None, None, None) if mask is None else (mask, *_kind_of(mask, window))
        windows.append(-1 if window is None else window)
    forwards, cache = [forward.handle.tensor for forward, _ in calls], given[first.cache_name].handle.tensor
    out: Tensor = torch.ops.qkv.cached_modules(
        forwards, cache, layers, parameters, given["hidden_states"], tables, masks, windows
    )
    return out


def _kind_of(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """The kind of a mask, found once for all modules with this window if `make_mask` made it."""
    found: dict[int | None, tuple[Tensor, Tensor]] = getattr(mask, "qkv_kinds", {})
    if window not in found:
        found[window] = torch.ops.qkv.kind_of_mask(mask, window)
    return found[window]


def _cached_modules(
    forwards: list[Tensor],
    cache: Tensor,
    layers: list[Tensor],
    parameters: list[Tensor],
    x: Tensor,
    tables: list[Tensor | None],
    masks: list[Tensor | None],
    windows: list[int],
) -> Tensor:
    """``qkv::cached_modules``: the output of modules for tokens ``x (B, L, width)``, which are appended.

    Args:
        layers: of the cache, which are written to.
        parameters: of all modules.
        tables: cos and sin of each, or None.
        masks: of each, with its `MaskKind` and the keys that padding leaves; or None.
        windows: of each; -1 for none.
    """
    found: list[CachedForward] = [find(forward) for forward in forwards]
    of, known = find(cache), {}
    calls = []
    for index, forward in enumerate(found):
        cos, sin = tables[2 * index : 2 * index + 2]
        mask, kind, keep = masks[3 * index : 3 * index + 3]
        if mask is not None and kind is not None and keep is not None:
            key = id(mask), windows[index]
            if key not in known:
                window = None if windows[index] < 0 else windows[index]
                known[key] = mask_of_kind(mask, MaskKind(*kind.tolist()), keep, window)
            mask = known[key]
        position_embeddings = None if cos is None else (cos, sin)
        given = {"attention_mask": mask, "position_embeddings": position_embeddings, forward.cache_name: of}
        calls.append((forward, given))
    return call_with(parameters, [forward.module for forward in found], lambda: type(found[0]).output_of(calls, x))


def _like_x(
    forwards: list[Tensor], cache: Tensor, layers: list[Tensor], parameters: list[Tensor], x: Tensor, *others: object
) -> Tensor:
    return x.new_empty(x.shape)


def _kind_of_mask(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """``qkv::kind_of_mask``: `masks.kind_of`, for all modules that a program calls with a mask."""
    kind, keep = kind_of(mask, window)
    return torch.tensor(kind, dtype=torch.int64), keep


def _kind_and_keys(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    return mask.new_empty(2, dtype=torch.int64), mask.new_empty((mask.shape[0], mask.shape[3]), dtype=torch.bool)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "cached_modules(Tensor[] forwards, Tensor cache, Tensor(a!)[] layers, Tensor[] parameters, Tensor x, "
    "Tensor?[] tables, Tensor?[] masks, int[] windows) -> Tensor"
)
_LIBRARY.define("kind_of_mask(Tensor mask, int? window) -> (Tensor, Tensor)")
_LIBRARY.impl("cached_modules", _cached_modules, "CPU")
_LIBRARY.impl("kind_of_mask", _kind_of_mask, "CPU")
library.register_fake("qkv::cached_modules", _like_x, lib=_LIBRARY)
library.register_fake("qkv::kind_of_mask", _kind_and_keys, lib=_LIBRARY)
