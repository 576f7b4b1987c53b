"""`over`: the layout of calls to layers that `Context` has marked, where a model stands between."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qkv.masks import Mask
from qkv.parallel.tokens import Tokens, Whole
from qkv.torch_internals import graph_task


class Over(NamedTuple):
    """The layouts of one call of a layer, and what its mask shows besides."""

    tokens: Tokens
    context_tokens: Tokens | Whole | None
    mask: Mask | None


_current: ContextVar[Over | None] = ContextVar("over", default=None)
_entered: list[tuple[int, Over]] = []
"""those of all threads, by thread, in the order in which they were entered"""


@contextmanager
def over(tokens: Tokens, *, context_tokens: Tokens | Whole | None = None, mask: Mask | None = None) -> Iterator[None]:
    """Context manager that names the layout for all layers that `Context` has marked, in this thread or task.

    Backward passes need it only where gradient checkpointing repeats a forward pass in them.

    Args:
        tokens: the layout of what the model reads.
        context_tokens: that of a second sequence, for cross-attention; ``WHOLE`` if each rank has all of it.
        mask: combined with the mask of each layer by ``&``, of all tokens as everywhere: padding or documents, which
            models of transformers could give only for the tokens of a rank.

    Raises:
        TypeError: for arguments of other types.

    Example:
        >>> from qkv import parallel
        >>> with parallel.over(tokens):  # doctest: +SKIP
        ...     logits = model(tokens.take(ids), position_ids=tokens.positions[None]).logits
    """
    if not isinstance(tokens, Tokens):
        raise TypeError(f"parallel.over: tokens must be a qkv.parallel.Tokens; got {type(tokens).__name__}.")
    if not (context_tokens is None or isinstance(context_tokens, (Tokens, Whole))):
        raise TypeError(
            "parallel.over: context_tokens must be a qkv.parallel.Tokens, parallel.WHOLE or None; "
            f"got {type(context_tokens).__name__}."
        )
    if not (mask is None or isinstance(mask, Mask)):
        raise TypeError(f"parallel.over: mask must be a qkv.Mask or None; got {type(mask).__name__}.")
    entered = threading.get_ident(), Over(tokens, context_tokens, mask)
    token = _current.set(entered[1])
    _entered.append(entered)
    try:
        yield
    finally:
        _current.reset(token)
        _entered[:] = [one for one in _entered if one is not entered]


def _of_backward() -> Over | None:
    """The layout of a forward pass that is repeated in a backward pass: on a GPU, torch does so in a thread of its own.

    None outside of backward passes, and where several threads have entered `over`.
    """
    in_backward = graph_task() != -1
    return _entered[-1][1] if in_backward and len({thread for thread, _ in _entered}) == 1 else None


class Mark:
    """What `Context` leaves on a module."""

    NAME = "_qkv_over_ranks"
    """attribute of the module"""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.calls = 0
        """of attention over ranks by the module"""

    def __deepcopy__(self, memo: object) -> "Mark":
        return Mark(self.mesh)  # process groups have no copies


def count_call(module: nn.Module) -> None:
    """Notes that a module, marked or not, computes attention over ranks."""
    mark: Any = vars(module).get(Mark.NAME)
    if mark is not None:
        mark.calls += 1


def layout_of(module: nn.Module) -> Over | None:
    """The layout of a call of the module; None if it is not marked.

    Raises:
        ValueError: for a marked module outside of `over`, and a layout of another mesh.
    """
    mark: Any = vars(module).get(Mark.NAME)
    if mark is None:
        return None
    found, caller = _current.get() or _of_backward(), type(module).__name__
    if found is None:
        raise ValueError(
            f"{caller}: a layer that parallel.Context() has marked has the tokens of one rank, so its calls must be "
            "within `with parallel.over(tokens):`; got a call outside. A backward pass that repeats forward passes "
            "(gradient checkpointing) must be within as well."
        )
    if found.tokens.mesh != mark.mesh:
        raise ValueError(
            f"{caller}: the layout of parallel.over must be of the mesh of parallel.Context(), {mark.mesh}; "
            f"got one of {found.tokens.mesh}."
        )
    return found
