"""`Handle`: an object as a number in a tensor, by which operators of compiled programs find it."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.torch_internals import transforms_are_active
from qkv.tracing import is_tracing

_OBJECTS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


class Handle:
    """The number of one object. A compiler takes the tensor for an input, so a program serves all objects of a kind.

    Whoever copies or unpickles the object makes a new one for the copy.
    """

    tensor: Tensor | None
    """int64, without dimensions; None for objects that were made while a program was recorded"""

    def __init__(self) -> None:
        self.tensor = None

    @classmethod
    def of(cls, thing: object) -> Self:
        """A new handle of an object, which it does not keep alive."""
        handle = cls()
        if not is_tracing() and not transforms_are_active():
            number = next(_NUMBERS)
            with torch.inference_mode(False):
                handle.tensor = torch.tensor(number, device="cpu")
            _OBJECTS[number] = thing
        return handle

    def __reduce__(self) -> tuple[type["Handle"], tuple[()]]:
        return type(self), ()


class Handled:
    """Base of objects that operators find; copies, shallow, deep or from a pickle, have handles of their own."""

    handle: Handle
    """by which compiled programs find the object"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handle = Handle.of(self)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the handle, which a file must not contain: ``torch.load`` allows few types."""
        inherited = getattr(super(), "__getstate__", self.__dict__.copy)  # object's, from Python 3.11 on
        return {name: value for name, value in inherited().items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited = getattr(super(), "__setstate__", self.__dict__.update)
        inherited(state)
        self.handle = Handle.of(self)


def find(handle: Tensor) -> Any:
    """The object of a handle's tensor. Raises KeyError if it is gone."""
    return _OBJECTS[int(handle)]


def require_readable(handle: Tensor | None = None) -> None:
    """Ends a compiled graph in which a layer has been called with a cache, whose state is known only after it has run.

    Args:
        handle: of the cache, where operators name each one that they write to; None for any.

    Raises:
        torch._dynamo.exc.Unsupported: with ``fullgraph=True``.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_end_graph)


def _end_graph(context: Any) -> None:
    """As `require_readable`, called by the compiler in its frame."""
    graph = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.graph
    handle = context.get_local("handle")
    if handle.is_python_constant():
        is_written = any(node.target in _names("cached_layer") for node in graph.nodes)
    else:
        read = handle.as_proxy().node
        is_written = any(_is_written(read, node) for node in graph.nodes)
    if is_written:
        context.graph_break(
            "qkv: the state of a cache must be read or changed in a graph of its own, after the calls of layers with "
            "it have run; got both in one graph. Do it outside of the compiled function, or compile without fullgraph."
        )


def _is_written(handle: Any, node: Any) -> bool:
    """Whether a node of a graph appends to the layer of a cache with a handle."""
    if node.target in _names("cached_module"):
        return handle in node.all_input_nodes
    if node.target not in _names("cached_layers"):
        return False
    layer, cache = (find(example_of(each)) for each in (handle, node.args[1]))
    return any(each is layer for each in cache.layers)


def example_of(node: Any) -> Any:
    """The value for which a compiler takes an input of a graph. Raises KeyError or AttributeError if nothing tells."""
    return node.meta["grapharg"].example


def _names(operator: str) -> tuple[Any, Any]:
    """What nodes of a graph call an operator."""
    packet = getattr(torch.ops.qkv, operator)
    return packet, packet.default
