"""The cache that models on ``attn_implementation="qkv"`` make where they are given none.

transformers makes its default in two places, both by ``DynamicCache(config=...)``: ``generate``, and the forward of
each model. So that one constructor is wrapped while qkv is registered; what it makes for a configuration that asks for
"qkv" becomes a `QKVCache`. Everything else that transformers decides before (no cache in training with checkpoints, a
static or offloaded one, one that the caller gave) stays decided.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import configuration_utils

from qkv import kernels
from qkv.integrations.transformers.cache import adopt, asks_for
from qkv.integrations.transformers.cache_argument import CACHE_NAMES

NAME = "qkv"
"""The attention implementation that asks for our cache, and the ``cache_implementation`` that does."""

Choice = bool | torch.dtype | Literal["int8"]
"""False for transformers' cache, True for ours, a dtype for ours in it."""

_PACKAGES = ("transformers", "transformers_modules")
"""Where models are, those with code of their own too. A cache that anyone else makes is one that a caller gives."""

_NAMES = "ALL_CACHE_IMPLEMENTATIONS"
"""The names that ``generate(cache_implementation=...)`` admits."""


_PREPARE = "_prepare_cache_for_generation"
"""The method of ``generate`` that makes a cache as its arguments ask; without it, configurations alone decide."""


class _Patch(NamedTuple):
    """A method of transformers that `install` replaced."""

    owner: type
    name: str
    before: Callable[..., Any]
    after: Callable[..., Any]

    @classmethod
    def put(cls, owner: type, name: str, after: Callable[..., Any]) -> "_Patch":
        """Replaces a method."""
        patch = cls(owner, name, getattr(owner, name), after)
        setattr(owner, name, after)
        return patch

    def take_back(self) -> None:
        """Puts the former value back, unless somebody has replaced ours since."""
        if getattr(self.owner, self.name) is self.after:
            setattr(self.owner, self.name, self.before)


_patches: list[_Patch] = []
"""Empty while qkv is not registered. Functions that others have wrapped stay, and do nothing then."""
_default: Choice = True
_requested: ContextVar[Choice | None] = ContextVar("requested", default=None)
"""What the call of ``generate`` that is making a cache asks for; None leaves it to the configuration."""


def install(choice: Choice | None) -> None:
    """Makes ours the default of models on "qkv", until `uninstall`.

    Args:
        choice: None for the one made before, at first True.
    """
    global _default
    if choice is not None:
        _default = choice
    if not _patches:
        _patches.append(_Patch.put(DynamicCache, "__init__", _adopting(DynamicCache.__init__)))
        prepare = getattr(GenerationMixin, _PREPARE, None)
        if prepare is not None:
            _patches.append(_Patch.put(GenerationMixin, _PREPARE, _requesting(prepare)))
        setattr(configuration_utils, _NAMES, (*getattr(configuration_utils, _NAMES, ()), NAME))


def uninstall() -> None:
    """Puts back what `install` replaced. What others have put over it since stays."""
    global _default
    if _patches:
        names = getattr(configuration_utils, _NAMES)
        setattr(configuration_utils, _NAMES, tuple(name for name in names if name != NAME))
    while _patches:
        _patches.pop().take_back()
    _default = True


def makes_caches(model: Any) -> bool:
    """Whether a model of transformers makes a cache where it is given none."""
    config, names = model.config, inspect.signature(model.forward).parameters
    if names.keys().isdisjoint(CACHE_NAMES):
        return False
    return bool(model.can_generate() or config.is_encoder_decoder or getattr(config, "is_decoder", True))


def why_not(model: Any) -> str | None:
    """Why the cache that a model makes is transformers'; None if it is ours, as far as its layers have equivalents."""
    requested = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if not _patches:
        return "qkv is not registered: qkv.register()"
    if model.can_generate() and not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return "it makes caches of its own"
    if requested not in (None, NAME):
        return f"cache_implementation={requested!r} in its generation_config"
    if requested is None and not asks_for(model.config, NAME):
        return f"its attention is not {NAME!r}"
    if requested is None and _default is False:
        return "register(cache=False)"
    return None


def layers_of(model: Any) -> list[Any]:
    """The layers of the cache that a model makes, where `why_not` is None."""
    cache = DynamicCache(config=model.config)
    adopt(cache, model.config, None if isinstance(_default, bool) else _default)
    layers: list[Any] = cache.layers
    return layers


def _adopting(init: Callable[..., None]) -> Callable[..., None]:
    """``DynamicCache.__init__`` whose caches may become ours."""

    @functools.wraps(init)
    def __init__(self: DynamicCache, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        config = kwargs.get("config")
        # Subclasses, data that other processes sent, and offloading are not ours to change; a tracer would have to
        # follow a change of class.
        others = (value for name, value in kwargs.items() if name != "config")
        is_plain = type(self) is DynamicCache and not (args or any(others))
        is_ours = _patches and is_plain and isinstance(config, PreTrainedConfig) and not kernels.is_tracing()
        if is_ours and _maker(self).partition(".")[0] in _PACKAGES:
            _adopt(self, config)

    return __init__


def _maker(cache: DynamicCache) -> str:
    """The module that calls the constructor. Others may have wrapped it too: their frames have the cache already."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and any(_is_or_starts_with(value, cache) for value in frame.f_locals.values()):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def _is_or_starts_with(value: object, cache: DynamicCache) -> bool:
    return value is cache or (type(value) is tuple and len(value) > 0 and value[0] is cache)


def _adopt(cache: DynamicCache, config: PreTrainedConfig) -> None:
    requested = _requested.get()
    choice = requested if requested is not None else asks_for(config, NAME) and _default
    if choice is not False:
        adopt(cache, config, None if choice is True else choice)


def _requesting(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``_prepare_cache_for_generation`` that notes which cache the call asks for."""

    @functools.wraps(prepare)
    def _prepare_cache_for_generation(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _patches:
            return prepare(self, generation_config, *args, **kwargs)
        token = _requested.set(_choice(generation_config))
        try:
            return prepare(self, generation_config, *args, **kwargs)
        finally:
            _requested.reset(token)

    return _prepare_cache_for_generation


def _choice(generation_config: Any) -> Choice | None:
    """What the arguments of ``generate`` ask for: ours by its name, transformers' by the name of theirs."""
    name = generation_config.cache_implementation
    if name is None:
        return None
    if name != NAME:
        return False
    options = dict(getattr(generation_config, "cache_config", None) or {})
    dtype = options.pop("dtype", None)
    if options:
        raise ValueError(
            f'generate: cache_config must be {{"dtype": ...}} with cache_implementation="{NAME}"; got also {options}.'
        )
    return True if dtype is None else dtype
