"""`ModelCall`: which layers have appended in the current call of a model, so that all have the same tokens."""

from collections.abc import Collection, Mapping
from typing import Any

from qkv.cache.base import Cache


class ModelCall:
    """The layers called so far in a call of a model, and their states before. Contexts are not counted.

    A call ends without notice, so it is known by the next one, in which the same layer is the first. Layers without
    tokens are taken for ones that are never called with a cache, such as those of an encoder.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self._caches = caches
        self._marks: dict[str, Any] = {}
        """by name, in the order of the calls"""
        self._columns: int | None = None
        """of every layer before the call; None before the first one"""
        self._first = ""
        self._has_failed = False
        """whether a layer has raised, and none has been called since"""

    def enter(self, name: str, shared: Collection[str] = ()) -> None:
        """Notes that a layer is being called.

        Args:
            name: of the layer.
            shared: layers that occur at several places of the model.

        Raises:
            ValueError: for a layer that is called again before the others, or has other tokens than they had.
        """
        cache = self._caches[name]
        if name in self._marks:
            self.settle()
        if name in self._marks:
            self._end(name, cache, shared)
        if not cache.of_context:
            self._require_as_first(name, cache.columns)
        self._has_failed = False
        if name not in self._marks:
            self._marks[name] = cache.mark()

    def fail(self, name: str) -> None:
        """Notes that the layer called last has raised, after its own cache was restored."""
        self._marks.pop(name, None)
        if name == self._first:
            self._columns, self._first = None, ""
        self._has_failed = bool(self._marks)

    def settle(self) -> None:
        """Removes what was appended in a call in which a layer has raised."""
        if self._has_failed:
            for name, mark in self._marks.items():
                self._caches[name].restore(mark)
            self.forget()

    def forget(self) -> None:
        """Counts the call as finished."""
        self._marks, self._columns, self._first, self._has_failed = {}, None, "", False

    def require_together(self) -> None:
        """Raises ValueError unless all layers in use have the same tokens."""
        in_use = [cache for cache in self._caches.values() if not cache.of_context and cache.columns]
        for cache in in_use[1:]:
            self._require_columns(cache.name, cache.columns, in_use[0].name, in_use[0].columns)

    def _end(self, name: str, cache: Cache, shared: Collection[str]) -> None:
        """Ends the previous call, since one of its layers is called again."""
        if cache.of_context and not self._are_together():
            return  # a context is read twice in a call
        self.require_together()
        again = not cache.of_context and name != self._first
        of_text = {one for one in self._marks if not self._caches[one].of_context}
        if again or (name in shared and of_text <= set(shared)):
            raise ValueError(
                f"Caches: the model must call each layer once; got a second call of {quoted(name)}, "
                f"{f'before {quoted(self._first)}' if again else 'which occurs several times in the model'}. Pass each "
                "of these calls a cache of its own, such as KVCache(), and reset these."
            )
        self.forget()

    def _require_as_first(self, name: str, columns: int) -> None:
        """Raises ValueError unless a layer has the tokens that the first one had before the call."""
        if self._columns is None:
            self.require_together()
            self._columns, self._first = columns, name
        elif columns != self._columns:
            self._has_failed = not self._are_together()  # the layers before it are undone
            self._require_columns(name, columns, self._first, self._columns)

    def _are_together(self) -> bool:
        columns = {cache.columns for cache in self._caches.values() if not cache.of_context}
        return len(columns - {0}) <= 1

    def _require_columns(self, name: str, columns: int, other: str, others: int) -> None:
        if columns != others:
            least = min(columns, others)
            repair = f"crop({least}) removes them" if least else "reset() removes all"
            raise ValueError(
                f"Caches: all layers must have the same tokens; got {columns} of {quoted(name)} and {others} of "
                f"{quoted(other)}. A call of the model ended between them, which leaves tokens that do not count: "
                f"{repair}, and an error inside `with caches.transaction()` does not leave any. Layers that are not "
                "called each time need caches of their own."
            )


def quoted(name: str) -> str:
    """The name of a layer in messages."""
    return name or "the layer"
