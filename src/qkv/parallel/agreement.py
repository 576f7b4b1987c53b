"""``QKV_CHECK=1``: ranks that disagree about a call raise, where they would wait for each other."""

import ctypes
import hashlib
import os
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, distributed

from qkv.parallel.exchange import Route

_Made = TypeVar("_Made")


def agreed(caller: str, route: Route, make: Callable[[], _Made], describe: Callable[[_Made], dict[str, str]]) -> _Made:
    """``make()``; if the environment variable QKV_CHECK is 1, only where it describes the same call on all ranks.

    Raises:
        ValueError: if it does not, or if another rank raises.
        Exception: what ``make`` raises.
    """
    if os.environ.get("QKV_CHECK") != "1":
        return make()
    made, error = None, None
    try:
        made = make()
        mine: dict[str, str] | str = describe(made)
    except Exception as raised:
        error, mine = raised, f"{type(raised).__name__}: {raised}"
    found: list[dict[str, str] | str | None] = [None] * route.ranks
    distributed.all_gather_object(found, mine, group=route.group)
    if error is not None:
        raise error
    assert made is not None
    for rank, theirs in enumerate(found):
        if isinstance(theirs, str):
            raise ValueError(f"{caller}: all ranks must make the same call; rank {rank} raised {theirs}")
    for rank, theirs in enumerate(found):
        assert isinstance(theirs, dict)
        first = found[0]
        assert isinstance(first, dict)
        for name in first:
            if theirs[name] != first[name]:
                raise ValueError(
                    f"{caller}: all ranks must make the same call; got {name} {first[name]} on rank 0 and "
                    f"{theirs[name]} on rank {rank}."
                )
    return made


def number_of(described: dict[str, str]) -> int:
    """A number that calls have in common whose descriptions are the same, and others only by chance."""
    return int.from_bytes(hashlib.blake2b(repr(described).encode(), digest_size=7).digest(), "big")


def digest(tensor: Tensor) -> str:
    """Dtype, shape and a hash of the numbers of a tensor."""
    values = tensor.detach().cpu().contiguous()
    numbers = ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()) if values.numel() else b""
    found = hashlib.blake2b(numbers, digest_size=6).hexdigest()
    return f"<{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {found}>"
