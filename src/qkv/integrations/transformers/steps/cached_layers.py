"""``qkv::cached_layers``: decoder layers of a model of transformers, one after another, as one operator of a compiled
program.

The operator finds model and cache by their `Handle`, and calls the layers that the model has then as eager code does:
what is changed in them since the program was compiled, it notices as eager code. So the program need not ask. What a
layer is, is found out while it is compiled (`_find`), from the modules themselves instead of by following the compiler
through them, which would guard each answer: 280 guards a layer, in each step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, library, nn

from qkv.cache.handle import Handled, example_of, find
from qkv.integrations.transformers.cache_argument import CACHE_NAMES
from qkv.integrations.transformers.steps.cached_module import is_usual, mask_in, with_kind
from qkv.integrations.transformers.steps.decoder_forward import DecoderForward
from qkv.integrations.transformers.steps.layer_loops import Call
from qkv.layers.operator_forward import parameters_of, takes_operators
from qkv.layers.plain import is_called_plainly
from qkv.tracing import is_exact_tensor


def run_in_program(calls: Sequence[Call], x: Any, model: nn.Module) -> Any:
    """The output of calls of layers as a compiler takes them: of those that may be, and follow one another, as one
    operator.

    Args:
        model: whose layers they are.
    """
    from torch._dynamo.comptime import comptime

    first = calls[0][1] if calls else {}
    cache_name = next((name for name in CACHE_NAMES if first.get(name) is not None), "")
    cache = first.get(cache_name)
    dtype, width = x.dtype, x.shape[-1]
    found: tuple[str, tuple[int, ...], tuple[int | None, ...]] = "", (), ()
    if takes_operators(x) and is_usual(first, cache_name):
        comptime(_find)
    layers, places, windows = found
    waiting: list[tuple[int, int | None, dict[str, Any]]] = []
    for index, (module, given) in enumerate(calls):
        is_known = index < len(places) and places[index] >= 0 and given.get(cache_name) is cache
        if is_known and is_usual(given, cache_name) and x.dtype is dtype and x.shape[-1] == width:
            waiting.append((places[index], windows[index], given))
            continue
        if waiting:
            x = _as_operator(model, layers, cache_name, x, waiting)
            waiting = []
        x = module(x, **given)
    return _as_operator(model, layers, cache_name, x, waiting) if waiting else x


def _as_operator(
    model: Any, layers: str, cache_name: str, x: Tensor, calls: list[tuple[int, int | None, dict[str, Any]]]
) -> Tensor:
    """The output of layers at these places, with these windows and arguments, as an operator."""
    tables: list[tuple[Tensor, Tensor]] = []
    masks: list[tuple[Tensor, int | None]] = []
    places, of_tables, of_masks = [], [], []
    for place, window, given in calls:
        places.append(place)
        of_tables.append(_place_in(tables, given.get("position_embeddings")))
        mask = given.get("attention_mask")
        of_masks.append(_place_in(masks, None if mask is None else (mask, window)))
    cache = calls[0][2][cache_name]
    out: Tensor = torch.ops.qkv.cached_layers(
        model.forward.handle.tensor,
        cache.handle.tensor,
        layers,
        cache_name,
        places,
        x,
        [each for pair in tables for each in pair],
        of_tables,
        [each for mask, window in masks for each in with_kind(mask, window)],
        [-1 if window is None else window for _, window in masks],
        of_masks,
        [],
    )
    return out


def _place_in(pairs: list[Any], pair: Any) -> int:
    """The place of a pair of objects in a list, in which it is put if it is not there; -1 for None."""
    if pair is None:
        return -1
    for place, (one, other) in enumerate(pairs):
        if one is pair[0] and other is pair[1]:
            return place
    pairs.append(pair)
    return len(pairs) - 1


def _find(context: Any) -> None:
    """Called by the compiler in the frame of `run_in_program`: sets ``found`` to the name of the list of layers, the
    place in it of each layer that may be part of an operator, -1 for others, and the windows of layers.

    A layer that the program has changed so far, or of whose parameters it has read one, is none: the operator would
    find it as it was before the program.
    """
    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    given, output = translator.symbolic_locals, translator.output
    try:
        from torch._dynamo.variables import ConstantVariable

        model, cache = (given[name].realize().value for name in ("model", "cache"))
        modules = [call.realize().items[0].realize().value for call in given["calls"].realize().items]
        dtype, width = (given[name].realize().as_python_constant() for name in ("dtype", "width"))
        tensors = [example_of(node) for node in output.graph.find_nodes(op="placeholder")]
        effects, finalizers = output.side_effects, output.register_finalizer_fns
        if output.current_tracer is not output.root_tracer:  # within a program of its own, which has other inputs
            return
        layers = next((name for name, part in model._modules.items() if _has(part, modules[0])), None)
        if layers is None or not _has_handle(model):
            return
        listed = model._modules[layers]
        if any(_is_changed(part, effects) for part in (model, listed)):
            return
        read = {_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
        places, windows = [], []
        for module in modules:
            place = next((place for place, part in enumerate(listed) if part is module), -1)
            forward: Any = vars(module).get("forward")
            is_ready = (
                type(forward) is DecoderForward
                and is_called_plainly(module, DecoderForward)
                and forward.is_ready(dtype, width)
                and forward.layer_in(cache) is not None
                and read.isdisjoint(map(_memory, parameters_of(module)))
                and not any(_is_changed(part, effects) for part in module.modules())
            )
            places.append(place if is_ready else -1)
            windows.append(forward.window if is_ready else None)
        if _add_read not in finalizers:
            finalizers.append(_add_read)
        given["found"] = ConstantVariable.create((layers, tuple(places), tuple(windows)))
    except (AttributeError, ImportError, KeyError, TypeError):  # another release: layers are operators one by one
        return


def _has(part: nn.Module | None, layer: nn.Module) -> bool:
    return type(part) is nn.ModuleList and any(each is layer for each in part)


def _has_handle(model: nn.Module) -> bool:
    forward = vars(model).get("forward")
    return isinstance(forward, Handled) and forward.handle.tensor is not None and forward.is_of(model)  # type: ignore[attr-defined]


def _is_changed(module: nn.Module, effects: Any) -> bool:
    """Whether a program has set attributes, parts, parameters or hooks of a module so far."""
    own = vars(module)
    for thing in (module, own, *(value for value in own.values() if isinstance(value, dict))):
        tracked = effects.id_to_variable.get(id(thing))
        if tracked is not None and effects.is_modified(tracked):
            return True
    return False


def _memory(tensor: Tensor) -> Any:
    """What tensors with the same memory have in common; what no other has, of one without."""
    return (is_exact_tensor(tensor) and tensor.untyped_storage().data_ptr()) or id(tensor)


def _add_read(program: fx.GraphModule) -> None:
    """Hands the inputs of a program that are parameters of layers to the operators that read them, whose layers are
    older: a compiler would write to them before the operator runs.
    """
    inputs = program.graph.find_nodes(op="placeholder")
    for node in program.graph.nodes:
        if node.target in _OPERATORS:
            model, _, layers, _, places = node.args[:5]
            listed = find(example_of(model)).module._modules[layers]
            own = {_memory(parameter) for place in places for parameter in parameters_of(listed[place])}
            read = [
                each for each in inputs if isinstance(example_of(each), Tensor) and _memory(example_of(each)) in own
            ]
            node.args = (*node.args[:-1], read)


def _cached_layers(
    model: Tensor,
    cache: Tensor,
    layers: str,
    cache_name: str,
    places: list[int],
    x: Tensor,
    tables: list[Tensor],
    of_tables: list[int],
    masks: list[Tensor],
    windows: list[int],
    of_masks: list[int],
    read: list[Tensor],
) -> Tensor:
    """``qkv::cached_layers``: the output of layers for tokens ``x (B, L, width)``, which are appended to the cache.

    Args:
        model: whose forward has the handle.
        cache: which is written to.
        layers: the name of a list of the model.
        cache_name: of the argument with the cache.
        places: of the layers in the list.
        tables: cos and sin, one after the other.
        of_tables: which of them each layer gets; -1 for none.
        masks: each `with_kind`.
        windows: of the layers with each; -1 for none.
        of_masks: which of them each layer gets; -1 for none.
        read: parameters of the layers that are inputs of the program.
    """
    from qkv.integrations.transformers.steps.decoder_step import run_calls  # which imports transformers

    listed = [*find(model).module._modules[layers]._modules.values()]
    pairs = [None, *zip(tables[::2], tables[1::2], strict=True)]
    triples = zip(masks[::3], masks[1::3], masks[2::3], strict=True)
    found = [None, *(mask_in(mask, None if each < 0 else each) for mask, each in zip(triples, windows, strict=True))]
    of, calls = find(cache), []
    known: dict[tuple[int, int], dict[str, Any]] = {}
    for place, table, mask in zip(places, of_tables, of_masks, strict=True):
        given = known.get((table, mask))
        if given is None:
            given = {"attention_mask": found[mask + 1], "position_embeddings": pairs[table + 1], cache_name: of}
            known[table, mask] = given
        calls.append((listed[place], given))
    out = run_calls(calls, x, DecoderForward)
    if type(out) is not Tensor or out.shape != x.shape or out.dtype is not x.dtype:
        got = f"{tuple(out.shape)} in {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise RuntimeError(
            f"qkv: layers of a compiled program must return tensors like their input, {tuple(x.shape)} in {x.dtype}, "
            f"as they did when it was compiled; got {got}. Compile again: torch.compiler.reset()."
        )
    return out.clone() if out.data_ptr() == x.data_ptr() else out.contiguous()


def _like_x(
    model: Tensor, cache: Tensor, layers: str, cache_name: str, places: list[int], x: Tensor, *_: object
) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "cached_layers(Tensor model, Tensor(a!) cache, str layers, str cache_name, int[] places, Tensor x, "
    "Tensor[] tables, int[] of_tables, Tensor[] masks, int[] windows, int[] of_masks, Tensor[] read) -> Tensor"
)
_LIBRARY.impl("cached_layers", _cached_layers, "CPU")
library.register_fake("qkv::cached_layers", _like_x, lib=_LIBRARY)
_OPERATORS = torch.ops.qkv.cached_layers, torch.ops.qkv.cached_layers.default
