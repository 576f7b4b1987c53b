"""`Caches`: the caches of all layers of a model, as one object."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import Self

from qkv.arguments import require_count
from qkv.cache.base import Cache, Owner
from qkv.cache.cached_layers import find_layers, owner_of
from qkv.cache.handle import Handled
from qkv.cache.int8 import Dtype, format_of
from qkv.cache.model_call import ModelCall, quoted


class Caches(Handled):
    """The caches of all attention layers of a model, made by `for_model`, as one object.

    Passed to each layer as ``cache=``; a layer finds its own. Operations apply to all layers, or to none if one of them
    refuses. A layer must be called at most once in each call of the model, and all that are called must be called each
    time, so that they have the same tokens:

    - If a layer raises, the call of the model has failed: what earlier layers have appended does not count, and is
      removed by whatever is done next.
    - If anything else raises between layers, the next call is refused; ``crop(caches.length)`` removes what not all
      layers have. What raises after the last layer comes too late: the tokens have been appended.
    - Inside ``with caches.transaction()``, whatever raises undoes everything.

    ``caches["decoder.0.attention"]`` and ``caches[layer]`` are the cache of one layer. A deep copy of a model is known
    to caches that are copied with it. For a copy made alone, and after loading from a file, `bind` names the model.

    Example:
        >>> import torch, qkv
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.full = qkv.CausalAttention(16, 2)
        ...         self.window = qkv.SlidingWindowAttention(16, 2, window=4, causal=True)
        ...     def forward(self, x, cache=None):
        ...         x = x + self.full(x, cache=cache)
        ...         return x + self.window(x, cache=cache)
        >>> model = Model()
        >>> caches = qkv.Caches.for_model(model)
        >>> with torch.no_grad():
        ...     prompt = model(torch.randn(2, 5, 16), cache=caches)
        ...     step = model(torch.randn(2, 1, 16), cache=caches)
        >>> caches
        Caches: 2 layers, 6,144 bytes
          full: KVCache(): 2 rows of 6 tokens, 4,096 bytes
          window: SlidingKVCache(window=4): 2 rows of 6 tokens, 2,048 bytes
        >>> caches.crop(4)
        >>> caches.length, caches["window"].length
        (4, 4)
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        super().__init__()
        self._caches = dict(caches)
        for name, cache in self._caches.items():
            cache.name = name
        self._names: dict[Owner, str] = {}
        """of the layers that these caches belong to"""
        self._copied_names: WeakKeyDictionary[Owner, str] | None = None
        """of the layers that were copied together with these caches"""
        self._shared: frozenset[str] = frozenset()
        """layers that occur at several places of the model"""
        self._call = ModelCall(self._caches)
        self._in_transaction = False

    @classmethod
    def for_model(cls, model: nn.Module, capacity: int | None = None, dtype: Dtype = None) -> Self:
        """A cache for each attention layer in a module tree, as the layer makes it by ``make_cache``.

        For `Attention`, that is a `SlidingKVCache` if its mask has a window, a `CrossKVCache` if it has a context, and
        otherwise a `KVCache`, or an `Int8KVCache`. A layer that occurs several times, or in wrappers (compiled,
        DistributedDataParallel, FSDP, checkpointing), is found once. Layers that the model does not call with a cache,
        such as those of an encoder, stay empty.

        Args:
            model: a module that contains attention layers, or is one.
            capacity: of caches that grow, as in `KVCache`.
            dtype: None for that of the keys, or ``torch.int8`` or ``"int8"``. Contexts stay in that of the keys.

        Raises:
            TypeError: for a model that is not a module, and a capacity that is not an int.
            ValueError: for a model without attention layers, and another dtype.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Caches: model must be a module; got {type(model).__name__}.")
        if capacity is not None:
            require_count("Caches", "capacity", capacity, suffix=", or None to grow")
        kept = format_of("Caches", dtype).dtype
        layers, _ = find_layers(model)
        if not layers:
            raise ValueError(
                f"Caches: model must contain attention layers of qkv; got {type(model).__name__}. Modules with a "
                "make_cache method count."
            )
        caches = cls({name: layer.make_cache(capacity, kept) for name, layer in layers.items()})  # type: ignore[operator]
        caches.bind(model)
        return caches

    def bind(self, model: nn.Module) -> None:
        """Gives the caches to the layers of another model, by name: of a copy, or after loading from a file.

        Raises:
            ValueError: unless the layers have the same names.
        """
        layers, shared = find_layers(model)
        if set(layers) != set(self._caches):
            raise ValueError(
                f"Caches: the model must be one {_listed(self._caches)}; got one {_listed(layers)}. Make new caches by "
                "Caches.for_model."
            )
        self._call.settle()
        owners = [(owner_of(layer), name) for name, layer in layers.items()]
        self._names, self._copied_names = {owner: name for owner, name in owners if owner is not None}, None
        self._shared = frozenset(shared)
        for cache in self._caches.values():
            cache._own(None)

    def _name_of(self, owner: Owner) -> str | None:
        name = self._names.get(owner)
        return name if name is not None or self._copied_names is None else self._copied_names.get(owner)

    def __getitem__(self, key: str | nn.Module) -> Cache:
        """The cache of a layer, or of the layer of this name. Raises KeyError for others."""
        self._call.settle()
        owner = owner_of(key)
        name = key if owner is None else self._name_of(owner)
        if not isinstance(name, str) or name not in self._caches:
            raise KeyError(self._unknown(repr(key) if isinstance(key, str) else _kind(key)))
        return self._caches[name]

    def __contains__(self, key: object) -> bool:
        owner = owner_of(key)
        return key in self._caches if owner is None else self._name_of(owner) is not None

    def __iter__(self) -> Iterator[str]:
        """Names of the layers, in the order of the model."""
        return iter(self._caches)

    def __len__(self) -> int:
        return len(self._caches)

    def values(self) -> list[Cache]:
        """The caches, in the order of the layers in the model."""
        self._call.settle()
        return list(self._caches.values())

    def items(self) -> list[tuple[str, Cache]]:
        """Names of layers and their caches."""
        return list(zip(self._caches, self.values(), strict=True))

    def _of_text(self) -> list[Cache]:
        """The caches with tokens, contexts apart."""
        return [cache for cache in self.values() if not cache.of_context and cache.columns]

    @property
    def length(self) -> int:
        """Number of tokens that all layers have, unused ones apart; of the longest row, if rows differ."""
        return min((cache.length for cache in self._of_text()), default=0)

    @property
    def lengths(self) -> Tensor:
        """``(B,)``, number of tokens of each row; ``(0,)`` for empty caches."""
        shortest = min(self._of_text(), key=lambda cache: cache.columns, default=None)
        return torch.zeros(0, dtype=torch.int64) if shortest is None else shortest.lengths

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers."""
        return sum(cache.nbytes for cache in self.values())

    def crop(self, length: int | Tensor) -> None:
        """Removes all tokens after the first ``length`` of each row, as `Cache.crop`. Contexts stay as they are.

        Raises:
            TypeError, ValueError: as `Cache.crop` of any layer.
        """
        self._refuse_in_transaction("crop")
        caches = self._of_text() or [cache for cache in self.values() if not cache.of_context][:1]
        with _all_or_none(caches):
            for cache in caches:
                cache.crop(length)
        self._call.forget()

    def select(self, rows: Tensor) -> None:
        """Reorders the batch, as `Cache.select`: row i becomes the former row ``rows[i]``.

        Raises:
            ValueError: as `Cache.select`.
        """
        self._apply(lambda cache: cache.select(rows))

    def repeat(self, count: int) -> None:
        """Repeats each row ``count`` times in succession, as `Cache.repeat`, as for beams of one prompt.

        Raises:
            TypeError, ValueError: unless count is an int of at least 1.
        """
        self._apply(lambda cache: cache.repeat(count))

    def join(self, other: "Caches") -> None:
        """Adds the rows of the caches of the same model after the own ones, such as newly prefilled prompts.

        Raises:
            TypeError: for anything but `Caches`.
            ValueError: for caches of other layers, and as `Cache.join`.
        """
        others = self._of_same_layers("join", other)
        self._apply(lambda cache: cache.join(others[cache.name]))

    def replace(self, rows: Tensor, other: "Caches") -> None:
        """Replaces row ``rows[i]`` by row i of the caches of the same model, for a text that took its place.

        Raises:
            TypeError: for anything but `Caches`.
            ValueError: for caches of other layers, and as `Cache.replace`.
        """
        others = self._of_same_layers("replace", other)
        self._apply(
            lambda cache: cache.replace(rows, others[cache.name]) if cache._batch or others[cache.name]._batch else None
        )

    def reset(self) -> None:
        """Removes all tokens, for another batch."""
        self._refuse_in_transaction("reset")
        for cache in self._caches.values():
            cache.reset()
        self._call.forget()

    def mark(self) -> Any:
        """The state of all layers, to which `restore` returns."""
        self._settled()
        return {name: cache.mark() for name, cache in self._caches.items()}

    def restore(self, mark: Any) -> None:
        """Undoes all since ``mark``, unless tokens from before it were removed by `crop` or `reset`."""
        for name, cache in self._caches.items():
            cache.restore(mark[name])
        self._call.forget()

    @contextmanager
    def transaction(self) -> Iterator[Self]:
        """A block in which an error undoes everything that was appended, wherever it was raised.

        Tokens from before the block must stay until it ends, so `crop` and `reset` raise RuntimeError in it.

        Example:
            >>> import torch, qkv
            >>> layer = qkv.CausalAttention(16, 2)
            >>> caches = qkv.Caches.for_model(layer)
            >>> try:
            ...     with torch.no_grad(), caches.transaction():
            ...         out = layer(torch.randn(1, 3, 16), cache=caches)
            ...         raise RuntimeError("out of memory")
            ... except RuntimeError:
            ...     caches.length
            0
        """
        mark, outer = self.mark(), self._in_transaction
        self._in_transaction = True
        try:
            yield self
        except BaseException:
            self.restore(mark)
            raise
        finally:
            self._in_transaction = outer

    def state_dict(self) -> dict[str, Tensor]:
        """The tokens of all layers as tensors, by name of the layer, as `Cache.state_dict`.

        ``torch.save`` and ``safetensors.torch.save_file`` can store it.
        """
        self._settled()
        states = {f"{name}." if name else "": cache.state_dict() for name, cache in self._caches.items()}
        return {prefix + key: tensor for prefix, state in states.items() for key, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the tokens by a copy of those of a `state_dict`, of a model with the same names.

        Raises:
            TypeError, ValueError: for other names, and as `Cache.load_state_dict`. Nothing is changed then.
        """
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in self._caches}
        for key, tensor in state.items():
            name, _, part = key.rpartition(".")
            if name not in by_layer:
                raise ValueError(f"Caches: the state must be of a model {_listed(self._caches)}; got {key}.")
            by_layer[name][part] = tensor
        with _all_or_none(self._caches.values()):
            for name, cache in self._caches.items():
                cache.load_state_dict(by_layer[name])
            self._call.require_together()
        self._call.forget()

    def enter(self, owner: Owner) -> Cache:
        """The cache of a layer that is being called; used by layers.

        Raises:
            ValueError: for a layer of another model, one that is called again before the others, and one without the
                tokens that the others have.
        """
        cache = self.of(owner)
        name = self._name_of(owner)
        assert name is not None
        self._call.enter(name, self._shared)
        return cache

    def of(self, owner: Owner) -> Cache:
        """The cache of a layer.

        Raises:
            ValueError: for a layer of another model.
        """
        name = self._name_of(owner)
        if name is None:
            raise ValueError(self._unknown(owner.name))
        return self._caches[name]

    def fail(self, owner: Owner) -> None:
        """Notes that the call of a layer has failed, with its own cache restored; used by layers."""
        name = self._name_of(owner)
        assert name is not None
        self._call.fail(name)

    def _settled(self) -> None:
        """Removes what a failed call has left; raises ValueError if layers have other tokens nevertheless."""
        self._call.settle()
        self._call.require_together()

    def _apply(self, operation: Callable[[Cache], None]) -> None:
        """An operation on all layers, or on none if one of them raises."""
        self._settled()
        with _all_or_none(self._caches.values()):
            for cache in self._caches.values():
                operation(cache)
        self._call.forget()

    def _refuse_in_transaction(self, operation: str) -> None:
        if self._in_transaction:
            raise RuntimeError(
                f"Caches: {operation} must be called outside of transaction(), which could not undo it. End the block "
                "first."
            )

    def _of_same_layers(self, operation: str, other: object) -> dict[str, Cache]:
        """The caches of another object; raises unless they are of the same layers."""
        if not isinstance(other, Caches):
            raise TypeError(f"Caches: other of {operation} must be Caches of the same model; got {_kind(other)}.")
        if set(other._caches) != set(self._caches):
            raise ValueError(
                f"Caches: other of {operation} must be of a model {_listed(self._caches)}; got one "
                f"{_listed(other._caches)}."
            )
        other._settled()
        return other._caches

    def _unknown(self, got: str) -> str:
        return (
            f"Caches: the layer must be of the model that they are for, {_listed(self._caches)}; got {got}. For a copy "
            "of that model, or after loading from a file, call bind(model); for another one, Caches.for_model(model). "
            "A layer that reads another one's cache takes that, caches[layer]."
        )

    def __repr__(self) -> str:
        lines = [f"  {name or '(model)'}: {cache!r}" for name, cache in self.items()]
        return "\n".join([f"Caches: {_count(len(self), 'layer')}, {self.nbytes:,} bytes", *lines])

    def __copy__(self) -> Self:
        self._call.settle()
        twin = type(self)({name: copy(cache) for name, cache in self._caches.items()})
        twin._names, twin._copied_names, twin._shared = self._names, self._copied_names, self._shared
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._call.settle()
        twin = type(self)(deepcopy(self._caches, memo))
        memo[id(self)] = twin
        twin._names, twin._shared = self._names, self._shared
        # As `Cache.__deepcopy__`.
        names = {**self._names, **(self._copied_names or {})}
        copied = {deepcopy(owner, memo): name for owner, name in names.items()}
        twin._copied_names = WeakKeyDictionary({**(self._copied_names or {}), **copied})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self._call.settle()
        return {"caches": self._caches, "names": self._names, "shared": sorted(self._shared)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Caches.__init__(self, state["caches"])
        self._names, self._shared = state["names"], frozenset(state["shared"])


@contextmanager
def _all_or_none(caches: Iterable[Cache]) -> Iterator[None]:
    """A block in which an error leaves the caches as they were, unless it has appended to them."""
    before = [(one, dict(vars(one))) for cache in caches for one in (cache, *cache._parts)]
    try:
        yield
    except BaseException:
        for one, state in before:
            one.__dict__.clear()
            one.__dict__.update(state)
        raise


def _listed(names: Iterable[str]) -> str:
    """Layers in messages: the first and the last of many."""
    known = [quoted(name) for name in names]
    known = known if len(known) <= 4 else [*known[:2], "...", known[-1]]
    return f"with {', '.join(known)}" if known else "without layers"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _kind(thing: object) -> str:
    owner = owner_of(thing)
    return type(thing).__name__ if owner is None else owner.name
