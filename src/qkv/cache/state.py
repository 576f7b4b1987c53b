"""State dicts of caches: their tokens as tensors, for files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkv.arguments import require_tensors
from qkv.cache.buffer import AppendBuffer, compact_copy
from qkv.cache.rows import Rows

if TYPE_CHECKING:
    from qkv.cache.base import Cache

PADDING = "is_token"
"""boolean ``(B, columns)``, which columns are tokens; present if rows differ"""
DTYPE = "dtype"
"""without numbers, in the dtype in which tokens were given; present if they are stored in another"""


def state_of(cache: "Cache") -> dict[str, Tensor]:
    """The tokens of a cache as tensors, nothing for an empty one."""
    cache._settle()
    if not cache._batch:
        return {}
    tokens = {name: compact_copy(tokens) for name, tokens in cache._tokens().items()}
    padding = {} if cache._rows is None else {PADDING: cache._rows.all_columns().clone()}
    dtype = {DTYPE: torch.empty(0, dtype=cache._dtype)} if cache._format.dtype else {}
    return {**{name: x for name, x in tokens.items() if x is not None}, **padding, **dtype, **cache._more_state()}


def load_state(cache: "Cache", state: Mapping[str, Tensor]) -> None:
    """Replaces the tokens of a cache by a copy of those of a state, or changes nothing and raises."""
    caller = f"{type(cache).__name__}.load_state_dict"
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{caller}: state must be a dict of tensors, as state_dict returns; got {type(state).__name__}."
        )
    require_tensors(caller, **state)
    before = dict(vars(cache))
    try:
        cache.__dict__.update(vars(_emptied(cache)))
        if state:
            _check(cache, state)
            parts = cache._format.parts
            cache._dtype = state.get(DTYPE, state[parts[0]]).dtype
            cache._load_tokens({name: state[name].detach().clone() for name in parts})
            cache._rows = _rows(state)
            cache._load_more(state)
            _check_rows(cache)
    except BaseException:
        cache.__dict__.clear()
        cache.__dict__.update(before)
        raise


def _emptied(cache: "Cache") -> "Cache":
    """A cache like this one, without tokens."""
    twin = object.__new__(type(cache))
    twin.__dict__.update(vars(cache))
    twin._parts = tuple(AppendBuffer() for _ in cache._parts)
    twin.reset()
    return twin


def _rows(state: Mapping[str, Tensor]) -> Rows | None:
    is_token = state.get(PADDING)
    return None if is_token is None else Rows(is_token.sum(1), is_token.clone())


def _check(cache: "Cache", state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the state is of a cache of this class."""
    caller, names = type(cache).__name__, cache._format.parts
    want = {*names, *cache.STATE, *((DTYPE,) if cache._format.dtype else ())}
    if not want <= set(state) or not set(state) <= want | {PADDING, *cache.OPTIONAL_STATE}:
        raise ValueError(
            f"{caller}: the state must have {', '.join(sorted(want))}; got {', '.join(sorted(state))}. Load the state "
            f"of another {caller}."
        )
    parts = [state[name] for name in names]
    sizes = parts[0].shape[:3]
    if len(sizes) < 3 or any(part.shape[:3] != sizes or part.device != parts[0].device for part in parts):
        raise ValueError(
            f"{caller}: {', '.join(names)} of the state must be (B, heads, L, ...) on one device; got "
            f"{', '.join(f'{tuple(part.shape)} on {part.device}' for part in parts)}."
        )
    if names[:2] == ("keys", "values"):
        found = [part.dtype for part in parts]
        wanted = [dtype for _, dtype in cache._format.shapes(parts[0].shape, parts[1].shape, found[0])]
        if found != wanted:
            raise ValueError(
                f"{caller}: {', '.join(names)} of the state must be of {', '.join(map(str, wanted))}; got "
                f"{', '.join(map(str, found))}."
            )
    is_token = state.get(PADDING)
    if is_token is not None and (is_token.dtype is not torch.bool or is_token.shape[:1] != sizes[:1]):
        raise ValueError(
            f"{caller}: {PADDING} of the state must be boolean ({sizes[0]}, columns); got {is_token.dtype} "
            f"{tuple(is_token.shape)}."
        )


def _check_rows(cache: "Cache") -> None:
    """Raises ValueError unless the loaded rows have as many tokens as are stored."""
    if cache._rows is not None:
        stored = cache._rows.stored
        if stored.min() < 0 or stored.max() != cache._slots:
            raise ValueError(
                f"{type(cache).__name__}: {PADDING} of the state must count the tokens stored, up to "
                f"{cache._slots} in a row; got {stored.tolist()}."
            )
