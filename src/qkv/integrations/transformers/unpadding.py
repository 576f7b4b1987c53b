"""`unpad`: makes the layers of transformers' models skip padding tokens."""

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import activation

from qkv import kernels
from qkv.integrations import calls
from qkv.integrations.transformers.attention import NAME, register
from qkv.integrations.transformers.cache_argument import CACHE_NAMES
from qkv.integrations.transformers.masks import MaskTensor
from qkv.integrations.transformers.output_capturing import MODULE, is_capturing
from qkv.layers.instance_forward import InstanceForward
from qkv.masks import Mask
from qkv.torch_internals import has_global_hooks

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_qkv_unpadding"
"""Attribute of a layer, or of a model with labels, with the handles of our hooks; copied and pickled with it."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes of ``nn.Module`` with hooks. A module without one of them counts as hooked."""


_LABELS = "labels"
"""The argument of models with the targets of their loss, (B, L) where there is one for each token."""

_CACHES = frozenset({*CACHE_NAMES, "past_key_value"})
"""Names of the cache in the code of layers."""

_NO_TARGET = -100
"""The label of tokens that a loss does not count."""


def unpad(model: Model, *, enabled: bool = True) -> Model:
    """Makes the layers of a model skip padding tokens.

    Each layer packs its real tokens into one row ``(1, T, width)`` and unpacks its output again: tokenwise modules
    compute only real tokens, and attention uses a documents mask. Between layers, the model and hooks see the padded
    batch. Padding is what the layers' mask hides; the mask must be the same for all layers of a call, as it is if the
    model creates it. Outputs at real tokens and gradients of a loss over them are unchanged up to rounding. At padding
    tokens, layers return 0 instead of arbitrary values, so nothing should read those, such as a pooler of the first
    position with left padding.

    A layer runs normally, with padding, if

    - the batch has no padding, consists of padding only, or has padding between real tokens;
    - the mask is not padding alone, padding and causal, or padding and a window;
    - keys of earlier tokens come from a cache, or keys from an encoder. The first call of an empty cache (ours in the
      model's dtype, or transformers' default) is packed, unless an attention module reads its cache by other means than
      ``update``;
    - it gets other arguments whose meaning is unknown;
    - the model is given labels that its loss predicts at padding tokens: labels there, or of the first token after
      left padding. With both -100, as after a prompt, it is packed. Call ``unpad`` on the model that takes the labels;
      a loss that you compute yourself must not read padding tokens;
    - ``output_hidden_states`` or ``output_attentions`` are requested;
    - it or a module in it has other hooks or patches, or is of an unknown class (an adapter, for example);
    - the model is traced, compiled or exported, or its attention implementation was changed after ``unpad``;
    - on a CPU, the compiled kernel is missing or does not support the dtype (fp64): torch's attention would need a
      dense mask over all tokens of the batch.

    `qkv.report` counts the calls of layers that had padding, packed and not, with the reasons.

    Args:
        model: a model of transformers, or a module that contains some, such as one of sentence-transformers. Modified
            in place, and set to ``attn_implementation="qkv"``. Copies and pickles keep the hooks.
        enabled: False undoes an earlier ``unpad(model)``, except for the attention implementation.

    Returns:
        the model.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        TypeError: for a model that is not an ``nn.Module``.
        ValueError: if no layer can be packed: because layers mix tokens outside of attention (in a convolution, for
            example), have parameters in modules not known to be tokenwise (linear layers and norms are), contain
            modules of neither torch nor transformers, take no ``attention_mask``, or take a position bias.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from qkv.integrations.transformers.unpadding import unpad
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        >>> model = unpad(BertModel(BertConfig(**sizes)))

    Source: the unpadding of ModernBERT (Warner et al. 2024, section 2.1.2), generalised to other models.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpad: model must be an nn.Module; got {_describe_type(model)}.")
    layers = packable_layers("unpad", model) if enabled else []
    for module in model.modules():
        remove_hooks(module)
    if enabled:
        from transformers import PreTrainedModel

        register()
        for layer in layers:
            pack_layer(layer)
        note_labels(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
                module.set_attn_implementation(NAME)
    return model


def packable_layers(caller: str, model: nn.Module) -> list[nn.Module]:
    """The layers of transformers' models in a module that `unpad` packs.

    Raises:
        ValueError: if there are none.
    """
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    layers = [layer for module in models for layer in _layers(module)]
    if not layers:
        names = ", ".join(type(module).__name__ for module in models) or f"{type(model).__name__}, which contains none"
        raise ValueError(
            f"{caller}: model must be or contain a model of transformers whose layers take an attention_mask and mix "
            f"tokens only in attention{'' if caller == 'unpad' else ', for unpad=True'}; got {names}."
        )
    return list(dict.fromkeys(layers))


def pack_layer(layer: nn.Module) -> bool:
    """Makes a layer skip padding tokens; whether that is a change, which `remove_hooks` takes back."""
    return _add_hooks(layer, _pack, _unpack)


def note_labels(model: nn.Module) -> list[nn.Module]:
    """Makes the models of transformers in a module tell their layers what labels they are given.

    Returns:
        the models that did not do so before, which `remove_hooks` takes back.
    """
    from transformers import PreTrainedModel

    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in found if _LABELS in _parameters(part) and _add_hooks(part, _note, _forget)]


def _add_hooks(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> bool:
    if _HANDLES in module.__dict__:
        return False
    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    module.__dict__[_HANDLES] = handle, module.register_forward_hook(after, always_call=True)
    return True


def remove_hooks(module: nn.Module) -> None:
    """Undoes `pack_layer`, or `note_labels`."""
    for handle in module.__dict__.pop(_HANDLES, ()):
        handle.remove()


def is_unpadded(model: nn.Module) -> bool:
    """Whether `unpad` is in effect for a module or a part of it."""
    return any(_HANDLES in module.__dict__ for module in model.modules())


def _describe_type(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of ``module`` that can be packed, except those of models inside it.

    All layers of a ``ModuleList`` or none: a layer that mixes tokens outside of attention (in a scan, for example)
    would read the outputs at padding.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in child):
            if all(map(_mixes_tokens_in_attention_only, child)):
                yield from child
        elif not isinstance(child, PreTrainedModel):
            yield from _layers(child)


_TOKENWISE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Tokenwise modules of torch; so are most activations."""

_NOT_TOKENWISE = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.PReLU)
"""Activations that are not tokenwise."""


def _mixes_tokens_in_attention_only(layer: nn.Module) -> bool:
    """Whether attention with an ``attention_mask`` is the only module of a layer that mixes tokens."""
    kind: Any = type(layer)
    parameters = _signature(kind).parameters
    if "attention_mask" not in parameters or "position_bias" in parameters:
        return False
    if any(hasattr(module, "indexer") for module in layer.modules()):  # selects keys before attention
        return False
    return all(map(_is_tokenwise, layer.modules()))


def _is_tokenwise(module: nn.Module) -> bool:
    """Whether a module is tokenwise, or a module of transformers without parameters of its own."""
    kind: Any = type(module)
    known = _is_tokenwise_class(kind)
    return next(module.parameters(recurse=False), None) is None if known is None else known


@functools.cache
def _is_tokenwise_class(kind: Any) -> bool | None:
    """Whether a class is tokenwise; None for classes of transformers where that depends on the submodules."""
    from transformers.pytorch_utils import Conv1D  # a linear layer

    package = str(kind.forward.__module__).partition(".")[0]
    if package == "torch":
        is_activation = kind.__module__ == activation.__name__ and not issubclass(kind, _NOT_TOKENWISE)
        return is_activation or issubclass(kind, _TOKENWISE)
    if package != "transformers":
        return False
    return True if issubclass(kind, Conv1D) or kind.__name__.endswith("RMSNorm") else None


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    """The signature of a class's ``forward``."""
    return inspect.signature(kind.forward)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    kind: Any = type(module)
    return _signature(kind).parameters


@dataclass
class _Packing:
    """The mapping between a padded batch ``(B, L)`` and a packed row ``(1, T)``."""

    batch: int
    length: int
    indices: Tensor
    """``(T,)``: indices of the real tokens in ``B * L``."""
    mask: MaskTensor
    """The mask of the packed row: documents, and the interval of the original mask."""

    @staticmethod
    def of(mask: MaskTensor) -> "_Packing | str":
        """The packing for a mask, or why there is none: it must be padding and an interval, real tokens contiguous in
        each row (else distances would change), and there must be any.
        """
        batch, _, rows, length = mask.shape
        keep, interval = mask.mask.keep, replace(mask.mask, keep=None)
        if mask.offset != 0 or rows != length:
            return "keys of earlier tokens, in a cache that is not empty"
        if keep is None or not interval.is_relative:
            return f"a mask that is not padding and an interval alone: {interval!r}"
        keep = keep.expand(batch, length)
        starts = keep[:, 1:] & ~keep[:, :-1]
        if (starts.sum(dim=1) + keep[:, 0] > 1).any():
            return "padding between real tokens"
        indices = keep.flatten().nonzero()[:, 0]
        if len(indices) == 0:
            return "no real token"
        if any(_reads_padding(labels, keep) for labels in _calls.labels.values()):
            return "labels at padding tokens, or of the first token after padding"
        texts, shape = (indices // length)[None], (1, 1, len(indices), len(indices))
        packed = MaskTensor(Mask.documents(texts) & interval, 0, shape, mask.dtype, mask.device)
        return _Packing(batch, length, indices, packed)

    def why_not(self, layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> str | None:
        """The first argument of a layer that is not known to be per token of this batch, or independent of tokens."""
        if hidden.dim() != 3 or hidden.shape[:2] != (self.batch, self.length):
            return f"hidden states of shape {tuple(hidden.shape)}"
        if self.batch == self.length:
            return "as many rows as tokens, so that the dimension of tokens is ambiguous"
        if getattr(layer, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward, which must divide the number of tokens"
        kind: Any = type(layer)
        names = _signature(kind).parameters
        for name, value in given.items():
            if isinstance(value, _cache_type()):
                reason = _why_not_cache(layer, name, value)
            else:
                reason = None if self._fits(name, value, is_named=name in names) else f"the argument {name}"
            if reason is not None:
                return reason
        return None

    def _fits(self, name: str, value: Any, *, is_named: bool) -> bool:
        """Whether one argument is per token, or independent of tokens. ``is_named``: whether the layer declares it."""
        if isinstance(value, MaskTensor):
            return name == "attention_mask"
        if isinstance(value, tuple):
            return all(self._fits(name, part, is_named=is_named) for part in value)
        if isinstance(value, Tensor) and value.dim() > 0:
            by_token = value.shape[0] in (1, self.batch) and value.shape[1:2] == (self.length,)
            return by_token and value.dim() == {"position_ids": 2, "position_embeddings": 3}.get(name)
        if isinstance(value, bool):
            return name != "output_attentions" or not value
        # Numbers for named parameters may depend on the arrangement of tokens; others are passed on to attention.
        return value is None or isinstance(value, str) or (isinstance(value, int | float | Tensor) and not is_named)

    def pack(self, value: Any) -> Any:
        """Selects the real tokens of an argument; other arguments are returned unchanged."""
        if isinstance(value, MaskTensor):
            return self.mask
        if isinstance(value, _cache_type()):
            return _PaddedRows(value, self)
        if isinstance(value, Tensor) and value.dim() > 0:
            expanded = value.expand(self.batch, self.length, *value.shape[2:])
            return expanded.flatten(0, 1).index_select(0, self.indices)[None]
        return tuple(map(self.pack, value)) if isinstance(value, tuple) else value

    def unpack(self, packed: Tensor) -> Tensor:
        """The padded batch, with 0 at padding."""
        padded = packed.new_zeros(self.batch * self.length, *packed.shape[2:])
        padded.index_copy_(0, self.indices, packed[0])
        return padded.view(self.batch, self.length, *packed.shape[2:])


class _PaddedRows:
    """An empty cache as a packed layer sees it, which does nothing with it but append.

    The cache gets padded rows, as if the layer had not been packed, with 0 at padding; the layer gets its own keys and
    values back, which are all that there are.
    """

    def __init__(self, cache: Any, packing: _Packing) -> None:
        self.cache, self.packing = cache, packing

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(1, heads, T, width)`` to the cache, and returns them."""
        rows = (self.packing.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (keys, values))
        self.cache.update(*rows, *args, **kwargs)
        return keys, values


class _Appended:
    """A cache to which a packed layer has appended, as the same layer sees it when it runs again with padding."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values, which are in the cache already."""
        return keys, values


def _why_not_cache(layer: nn.Module, name: str, cache: Any) -> str | None:
    """Why a layer cannot be packed with this cache, which is empty; None if it can."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from qkv.integrations.transformers.cache import AppendLayer, LatentLayer, QKVCache, SlidingLayer

    if name not in CACHE_NAMES or type(cache) not in (DynamicCache, QKVCache):
        return f"a cache of type {type(cache).__name__}, as {name}"
    # These return what an empty cache is given; an int8 layer rounds it, others have a state that padding enters.
    appending = (DynamicLayer, DynamicSlidingWindowLayer, AppendLayer, LatentLayer, SlidingLayer)
    for part in cache.layers:
        if type(part) not in appending:
            return f"a cache with layers of type {type(part).__name__}"
    kinds: list[Any] = [type(module) for module in layer.modules()]
    readers = [kind for kind in kinds if not _only_appends(kind)]
    return f"{readers[0].__name__} reads its cache itself" if readers else None


@functools.cache
def _only_appends(kind: Any) -> bool:
    """Whether the forward of a class does nothing with its cache but compare it with None, call its ``update`` and pass
    it on to its own modules.
    """
    if str(kind.__module__).partition(".")[0] == "torch":
        return True
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
    except (OSError, TypeError):
        return False
    if not any(name in source for name in _CACHES):
        return True
    forward = ast.parse(source).body[0]
    if not isinstance(forward, ast.FunctionDef):
        return False
    forward.decorator_list.clear()  # one of them replaces a former name of the cache
    above = {child: node for node in ast.walk(forward) for child in ast.iter_child_nodes(node)}
    names = [node for node in ast.walk(forward) if isinstance(node, ast.Name) and node.id in _CACHES]
    strings = [node for node in ast.walk(forward) if isinstance(node, ast.Constant) and node.value in _CACHES]
    return not strings and all(_is_passed_or_updated(name, above) for name in names)


def _is_passed_or_updated(name: ast.Name, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether one mention of the cache compares it with None, calls ``update`` or passes it to the caller's modules."""
    node = above[name]
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], (ast.Is, ast.IsNot))
    if isinstance(node, ast.Attribute):
        call = above[node]
        return node.attr == "update" and isinstance(call, ast.Call) and call.func is node
    call = above[node] if isinstance(node, ast.keyword) else node
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith("self.")


class _Calls(threading.local):
    """What is running in this thread: layers, with packing and original arguments, and models, with their labels."""

    def __init__(self) -> None:
        self.packed: dict[nn.Module, tuple[_Packing, Any, Any]] = {}
        self.labels: dict[nn.Module, Tensor] = {}


_calls = _Calls()


def _pack(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-forward hook: packs the arguments of a layer, if they and the layer allow it."""
    _calls.packed.pop(layer, None)
    if not any(isinstance(value, MaskTensor) and value.mask.keep is not None for value in (*args, *kwargs.values())):
        return None
    if kernels.is_tracing():
        return None
    hidden, given = _arguments(layer, args, kwargs)
    packing = _packing_of(layer, hidden, given)
    answer = f"with padding: {packing}" if isinstance(packing, str) else "without padding"
    calls.tally(layer, type(layer).__name__, answer, getattr(hidden, "shape", ()))
    if isinstance(packing, str):
        return None
    _calls.packed[layer] = packing, args, kwargs
    return (packing.pack(hidden),), {name: packing.pack(value) for name, value in given.items()}


def _packing_of(layer: nn.Module, hidden: Any, given: dict[str, Any]) -> _Packing | str:
    """The packing of a call of a layer, or why it runs with padding."""
    mask = given.get("attention_mask")
    if not isinstance(mask, MaskTensor) or type(hidden) is not Tensor:
        return "a mask or hidden states that are not transformers' own"
    if hidden.is_cpu and (kernels.absence() is not None or hidden.dtype is torch.float64):
        # torch's attention would need a dense mask over all tokens of the batch
        return kernels.absence() or "the kernel has no fp64"
    packing = _packing(mask)
    if isinstance(packing, str):
        return packing
    return packing.why_not(layer, hidden, given) or _why_modified(layer) or packing


def _unpack(layer: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook, also called after an exception: unpacks the output of a layer that was packed."""
    packing, *given = _calls.packed.pop(layer, (None,))
    if packing is None or output is None:
        return None
    hidden, *others = output if isinstance(output, tuple) else (output,)
    if (
        not isinstance(hidden, Tensor)
        or hidden.shape[:2] != (1, len(packing.indices))
        or any(other is not None for other in others)
    ):
        args, kwargs = given  # Unknown outputs: run again with padding.
        args = tuple(_Appended() if isinstance(value, _cache_type()) else value for value in args)
        kwargs = {name: _Appended() if isinstance(value, _cache_type()) else value for name, value in kwargs.items()}
        calls.tally(layer, type(layer).__name__, "again with padding: outputs that are not one per token")
        return layer.forward(*args, **kwargs)
    padded = packing.unpack(hidden)
    return (padded, *others) if isinstance(output, tuple) else padded


def _note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-forward hook: notes the labels of a model."""
    if kernels.is_tracing():
        return
    _calls.labels.pop(model, None)
    given = {**dict(zip(_parameters(model), (model, *args), strict=False)), **kwargs}
    if isinstance(given.get(_LABELS), Tensor):
        _calls.labels[model] = given[_LABELS]


def _forget(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, also called after an exception."""
    if not kernels.is_tracing():
        _calls.labels.pop(model, None)


def _reads_padding(labels: Tensor, keep: Tensor) -> bool:
    """Whether a loss with these labels reads predictions at tokens that are not kept ``(B, L)``: those of padding
    itself, and, where the labels are those of the next token, those of the token before.
    """
    if labels.shape != keep.shape:  # not one for each token
        return False
    counts = labels.to(keep.device) != _NO_TARGET
    return bool((counts & ~keep).any() or (counts[:, 1:] & ~keep[:, :-1]).any())


def _packing(mask: MaskTensor) -> _Packing | str:
    """The packing for a mask or why there is none, computed once for all layers of a call."""
    if "packing" not in mask.__dict__:
        mask.packing = _Packing.of(mask)
    packing: _Packing | str = mask.packing
    return packing


@functools.cache
def _cache_type() -> Any:
    """The base of transformers' caches."""
    from transformers.cache_utils import Cache

    return Cache


def _why_modified(layer: nn.Module) -> str | None:
    """What has been attached to or put in a layer and might mix tokens; None if nothing has."""
    if has_global_hooks():
        return "global hooks of modules"
    ignored = None if is_capturing() else MODULE
    for module in layer.modules():
        if not _is_tokenwise(module):
            return f"a module of type {type(module).__name__}"
        if _is_hooked(module, ignored):
            return f"hooks or another forward of a {type(module).__name__}"
    return None


def _is_hooked(module: nn.Module, ignored: str | None) -> bool:
    """Whether a module has a patched ``forward`` or hooks other than ours and those of the module ``ignored``."""
    forward = module.__dict__.get("forward")
    if "forward" in module.__dict__ and not (isinstance(forward, InstanceForward) and forward.own is None):
        return True
    for name in _HOOKS:
        for hook in getattr(module, name, {"unknown": None}).values():
            is_ignored = ignored is not None and getattr(hook, "__module__", "") == ignored
            if hook not in (_pack, _unpack, _note, _forget) and not is_ignored:
                return True
    return False


def _arguments(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The hidden states among the arguments of a layer, and all other arguments by name."""
    kind: Any = type(layer)
    signature = _signature(kind)
    given = signature.bind(layer, *args, **kwargs).arguments
    given.pop(next(iter(given)))  # self
    hidden = given.pop(next(iter(given)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return hidden, given
