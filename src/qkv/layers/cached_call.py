"""What layers with a cache have in common: which tokens of a call are new, and that all are appended or none."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from qkv.arguments import more
from qkv.cache import Cache, Caches, Keys, Owner
from qkv.layers.arguments import require_mask
from qkv.layers.cached_operator import register, run_as_operator, runs_as_operator
from qkv.masks import Mask
from qkv.parallel.context import Over
from qkv.torch_internals import graph_task

_Arguments = ParamSpec("_Arguments")


class _Owning(Protocol):
    _owner: Owner


class _Masked(Protocol):
    mask: Mask

    @property
    def rotary(self) -> Any: ...


_Layer = TypeVar("_Layer", bound=_Owning)


def restore_cache_on_error(
    call: Callable[Concatenate[_Layer, _Arguments], Tensor],
) -> Callable[Concatenate[_Layer, _Arguments], Tensor]:
    """Decorates a method so that an error or interrupt leaves its ``cache`` argument as it was before the call.

    Of `Caches`, the method gets that of its own layer. A call within a backward pass is refused with a RuntimeError.
    In a compiled program, ``forward`` is one operator.
    """

    @functools.wraps(call)
    def guarded(self: _Layer, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        given = kwargs.get("cache")
        alone = kwargs.get("tokens") is None
        if is_forward and alone and runs_as_operator(self, args[0] if args else kwargs.get("x"), given):
            return run_as_operator(name, self, *args, **kwargs)
        cache = given.enter(self._owner) if isinstance(given, Caches) else given
        if not isinstance(cache, Cache):
            return call(self, *args, **kwargs)
        _refuse_in_backward(type(self).__name__)
        kwargs["cache"] = cache
        mark = cache.mark()
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            cache.restore(mark)
            if isinstance(given, Caches):
                given.fail(self._owner)
            raise

    is_forward, name = call.__name__ == "forward", register(call.__qualname__, guarded)
    return guarded


def _refuse_in_backward(caller: str) -> None:
    """Raises RuntimeError where gradient checkpointing repeats a call, which would append its tokens once more."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and graph_task() != -1:
        raise RuntimeError(
            f"{caller}: a call with a cache must not run in a backward pass, where gradient checkpointing repeats it; "
            "the cache has its tokens already. Train without a cache, or call the layer outside of the checkpoint."
            f"{more('checkpointing')}"
        )


class CallOptions(NamedTuple):
    """The options of one call of a layer, made by `call_options`."""

    mask: Mask
    """that of the layer and of the call"""
    bias: Tensor | None
    positions: Tensor | None
    cache: Any
    """the layer checks its kind"""
    length: int | None = None
    """of the sequence, if others than x tell it"""


def call_options(
    layer: "_Masked", mask: Mask | None, bias: Tensor | None, positions: Tensor | None, cache: object
) -> CallOptions:
    """The validated options of a call of ``layer``.

    Raises:
        TypeError: for a mask of another type.
        ValueError: for positions without rotary, and a cache with the keys of one rank.
    """
    caller = type(layer).__name__
    if isinstance(cache, Cache) and cache.is_of_one_rank:
        raise ValueError(
            f"{caller}: cache must not be one that a call over ranks has filled, which has the keys of one rank; pass "
            "tokens= in this call as well, or another cache."
        )
    if positions is not None and layer.rotary is None:
        raise ValueError(f"{caller}: positions rotate queries and keys, so the layer needs a rotary; got None.")
    combined = layer.mask if mask is None else layer.mask & require_mask(caller, mask)
    return CallOptions(combined, bias, positions, cache)


class Inputs(NamedTuple):
    """The inputs of `qkv.attention` in a layer."""

    q: Tensor
    keys: Keys
    mask: Mask
    bias: Tensor | None
    layout: Over | None = None
    """of a call over ranks; then mask and bias are of all tokens"""


def cached_inputs(q: Tensor, keys: Keys, mask: Mask, bias: Tensor | None, cache: Cache) -> Inputs:
    """The inputs over keys that a cache returned, from a mask and a bias over all columns."""
    return Inputs(q, keys, cache.restrict(mask, keys, q.shape[2]), cache.restrict_bias(bias, keys))


class NewTokens(NamedTuple):
    """The tokens of a call, before they are appended to a cache."""

    mask: Mask
    """for `Cache.restrict`"""
    is_token: Tensor | None
    """for `Cache.append`"""
    where: dict[str, Any]
    """their positions, as arguments of rotary"""


def new_tokens(options: CallOptions, owner: Owner, x: Tensor, rotary: object) -> NewTokens:
    """Admits the tokens ``x (B, L, width)`` of a layer to its cache, and finds their positions.

    Raises:
        ValueError: as `Cache.admit` and `Cache.split_padding`.
    """
    mask, _, positions, cache, length = options
    offset: int | Tensor = 0
    is_token = None
    if cache is not None:
        cache.admit(owner, mask)
        mask, is_token = cache.split_padding(mask, *x.shape[:2])
        offset = cache.offset(is_token)
    where: dict[str, Any] = {"offset": offset} if positions is None else {"positions": positions}
    if cache is not None and is_token is not None and getattr(rotary, "depends_on_length", False):
        lengths: Tensor = cache.offset() + is_token.sum(1)  # padding does not count
        where["length"] = lengths[:, None].expand(is_token.shape)
    if length is not None:
        where["length"] = length
    return NewTokens(mask, is_token, where)
