"""`restore_cache_on_error`: a call of a layer appends all of its tokens to a cache, or none."""

import functools
from collections.abc import Callable
from typing import Concatenate, Protocol, TypeVar

from torch import Tensor
from typing_extensions import ParamSpec

from qkv.cache import Cache, Caches, Owner

_Arguments = ParamSpec("_Arguments")


class _Owning(Protocol):
    _owner: Owner


_Layer = TypeVar("_Layer", bound=_Owning)


def restore_cache_on_error(
    call: Callable[Concatenate[_Layer, _Arguments], Tensor],
) -> Callable[Concatenate[_Layer, _Arguments], Tensor]:
    """Decorates a method so that an error or interrupt leaves its ``cache`` argument as it was before the call.

    Of `Caches`, the method gets that of its own layer.
    """

    @functools.wraps(call)
    def guarded(self: _Layer, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        given = kwargs.get("cache")
        cache = given.enter(self._owner) if isinstance(given, Caches) else given
        if not isinstance(cache, Cache):
            return call(self, *args, **kwargs)
        kwargs["cache"] = cache
        mark = cache.mark()
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            cache.restore(mark)
            if isinstance(given, Caches):
                given.fail(self._owner)
            raise

    return guarded
