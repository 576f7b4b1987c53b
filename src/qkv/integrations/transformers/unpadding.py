"""`unpad`: models of transformers that do not compute the padding of a batch."""

import functools
import importlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import activation

from qkv import kernels
from qkv.integrations.transformers.attention import NAME, register
from qkv.integrations.transformers.masks import MaskTensor
from qkv.masks import Mask

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_qkv_unpadding"
"""Where a layer keeps the handles of our hooks, with which they are copied."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where modules of torch keep hooks. One that did not would count as hooked."""

_has_any_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)

_CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks collect ``hidden_states`` and ``attentions``."""


def unpad(model: Model, *, enabled: bool = True) -> Model:
    """Lets the layers of a model compute real tokens only, not the padding of a batch.

    A batch of texts of different lengths is padded to its longest, and a model computes all of it. From here on, each
    layer packs the real tokens that it is given into one row ``(1, T, width)``, and spreads its results out again:
    whatever works on single tokens has as much less to do as there is padding, and attention sees each text by itself.
    Whoever stands between two layers, the model itself or a hook, sees the padded batch. Padding is what a layer's mask
    hides, which is to be the same for all layers of a call, as it is where a model makes their masks. Results at real
    tokens, and the gradients of a loss of them, stay the same, up to rounding. At padded places a layer returns 0,
    where it returned numbers of no meaning; nor should one read them, as a pooler of the first place does in texts
    padded on the left.

    A layer runs as ever, padding and all, where

    - there is no padding, nothing else, or real tokens have padding between them;
    - the mask is not of padding alone, padding and causal, or padding and a window;
    - keys and values come from elsewhere: a cache (give a decoder ``use_cache=False``), an encoder;
    - it is given anything else whose meaning is not known;
    - ``output_hidden_states`` or ``output_attentions`` want to see it;
    - somebody has hooked or patched it, or a module in it, or put a module of their own there (an adapter, say);
    - the program is traced, compiled or exported, or another attention implementation has been set since;
    - on a CPU, the compiled kernel is missing, or has not the dtype (fp64): torch's attention would write a mask out
      for all tokens of the batch.

    Args:
        model: a model of transformers, or a module with some in it, such as one of sentence-transformers. Changed in
            place, and set to run on ``attn_implementation="qkv"``. Copies and pickles compute no padding either.
        enabled: False takes an earlier ``unpad(model)`` back; the attention implementation stays.

    Returns:
        the model.

    Raises:
        ModuleNotFoundError: where transformers is not installed.
        TypeError: for a model that is not an ``nn.Module``.
        ValueError: for a model none of whose layers can be packed: those that let tokens meet elsewhere than in
            attention, in a convolution say, have parameters that are not known to work on single tokens (linear layers
            and norms are), have modules that are neither torch's nor transformers', take no ``attention_mask``, or take
            a bias of positions.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from qkv.integrations.transformers.unpadding import unpad
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        >>> model = unpad(BertModel(BertConfig(**sizes)))

    Source: the unpadding of ModernBERT (Warner et al. 2024, section 2.1.2), for whatever model it does not change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpad: model must be an nn.Module; got {_kind(model)}.")
    from transformers import PreTrainedModel

    register()
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    layers = [layer for module in models for layer in _layers(module)]
    if enabled and not layers:
        names = ", ".join(type(module).__name__ for module in models) or f"{type(model).__name__}, which holds none"
        raise ValueError(
            "unpad: model must be one of transformers, or hold one, whose layers take an attention_mask and let tokens "
            f"meet in attention alone; got {names}."
        )
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
    if enabled:
        for layer in dict.fromkeys(layers):
            before = layer.register_forward_pre_hook(_pack, with_kwargs=True)
            layer.__dict__[_HANDLES] = before, layer.register_forward_hook(_unpack, always_call=True)
        for module in models:
            if module.config._attn_implementation != NAME:
                module.set_attn_implementation(NAME)
    return model


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that can be packed, of those within ``module`` that do not belong to a model in it.

    All layers of a list, or none: where others let tokens meet, in a scan say, they may let them meet padding.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in child):
            if all(map(_meet_in_attention_alone, child)):
                yield from child
        elif not isinstance(child, PreTrainedModel):
            yield from _layers(child)


_ON_TOKENS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules of torch that work on single tokens; so do most of its activations."""

_ALONG_DIMENSIONS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.PReLU)
"""The activations that do not."""


def _meet_in_attention_alone(layer: nn.Module) -> bool:
    """Whether nothing but attention lets tokens meet, and a mask says which do."""
    kind: Any = type(layer)
    takes = _signature(kind).parameters
    if "attention_mask" not in takes or "position_bias" in takes:
        return False
    if any(hasattr(module, "indexer") for module in layer.modules()):  # which chooses keys before attention does
        return False
    return all(map(_works_on_tokens, layer.modules()))


def _works_on_tokens(module: nn.Module) -> bool:
    """Whether a module is known to work on single tokens, or is transformers' own and lets others do so."""
    kind: Any = type(module)
    known = _kind_works_on_tokens(kind)
    return next(module.parameters(recurse=False), None) is None if known is None else known


@functools.cache
def _kind_works_on_tokens(kind: Any) -> bool | None:
    """Whether modules of a class do; None for one of transformers' that may do its work by others."""
    from transformers.pytorch_utils import Conv1D  # a linear layer

    home = str(kind.forward.__module__).partition(".")[0]
    if home == "torch":
        single = kind.__module__ == activation.__name__ and not issubclass(kind, _ALONG_DIMENSIONS)
        return single or issubclass(kind, _ON_TOKENS)
    if home != "transformers":
        return False
    return True if issubclass(kind, Conv1D) or kind.__name__.endswith("RMSNorm") else None


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    """Of the ``forward`` of a class."""
    return inspect.signature(kind.forward)


@dataclass
class _Packing:
    """Where the tokens of a batch ``(B, L)`` lie in one row ``(1, T)``."""

    batch: int
    length: int
    places: Tensor
    """``(T,)``: of each real token in ``B * L``"""
    mask: MaskTensor
    """What a mask of padding, and an interval, is for that row."""

    @staticmethod
    def of(mask: MaskTensor) -> "_Packing | None":
        """None where a mask hides more than padding and what an interval does, where some tokens have padding between
        them, which distances would show, and where there are none.
        """
        batch, _, rows, length = mask.shape
        keep, interval = mask.mask.keep, Mask.band(mask.mask.left, mask.mask.right)
        if keep is None or mask.mask != Mask.padding(keep) & interval or mask.offset != 0 or rows != length:
            return None
        keep = keep.expand(batch, length)
        begins = keep[:, 1:] & ~keep[:, :-1]
        if (begins.sum(dim=1) + keep[:, 0] > 1).any():
            return None
        places = keep.flatten().nonzero()[:, 0]
        if len(places) == 0:
            return None
        texts, shape = (places // length)[None], (1, 1, len(places), len(places))
        packed = MaskTensor(Mask.documents(texts) & interval, 0, shape, mask.dtype, mask.device)
        return _Packing(batch, length, places, packed)

    def fits(self, layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> bool:
        """Whether all that a layer is given is known to belong to these tokens, or to none."""
        if hidden.dim() != 3 or hidden.shape[:2] != (self.batch, self.length) or self.batch == self.length:
            return False  # In a square batch, which dimension counts tokens would be a guess.
        if getattr(layer, "chunk_size_feed_forward", 0):
            return False  # which divides the length of a padded batch, not the number of its tokens
        kind: Any = type(layer)
        names = _signature(kind).parameters
        return all(self._fits(name, value, is_named=name in names) for name, value in given.items())

    def _fits(self, name: str, value: Any, *, is_named: bool) -> bool:
        if isinstance(value, MaskTensor):
            return name == "attention_mask"
        if isinstance(value, tuple):
            return all(self._fits(name, part, is_named=is_named) for part in value)
        if isinstance(value, Tensor) and value.dim() > 0:
            by_token = value.shape[0] in (1, self.batch) and value.shape[1:2] == (self.length,)
            return by_token and value.dim() == {"position_ids": 2, "position_embeddings": 3}.get(name)
        if isinstance(value, bool):
            return name != "output_attentions" or not value
        # A number that a layer has a name for may say how tokens are arranged. What it hands on to attention does not.
        return value is None or isinstance(value, str) or (isinstance(value, int | float | Tensor) and not is_named)

    def pack(self, value: Any) -> Any:
        """What belongs to all tokens, as it is for the real ones."""
        if isinstance(value, MaskTensor):
            return self.mask
        if isinstance(value, Tensor) and value.dim() > 0:
            everywhere = value.expand(self.batch, self.length, *value.shape[2:])
            return everywhere.flatten(0, 1).index_select(0, self.places)[None]
        return tuple(map(self.pack, value)) if isinstance(value, tuple) else value

    def unpack(self, packed: Tensor) -> Tensor:
        """The rows of all tokens, 0 where there is padding."""
        spread = packed.new_zeros(self.batch * self.length, *packed.shape[2:])
        spread.index_copy_(0, self.places, packed[0])
        return spread.view(self.batch, self.length, *packed.shape[2:])


class _Calls(threading.local):
    """What the layers that this thread is in are computing, and what they were given."""

    def __init__(self) -> None:
        self.packed: dict[nn.Module, tuple[_Packing, Any, Any]] = {}


_calls = _Calls()


def _pack(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a layer: packs what it is given, if all of that, and the layer as it is now, can be."""
    _calls.packed.pop(layer, None)
    if not any(isinstance(value, MaskTensor) and value.mask.keep is not None for value in (*args, *kwargs.values())):
        return None
    hidden, given = _arguments(layer, args, kwargs)
    mask = given.get("attention_mask")
    if not isinstance(mask, MaskTensor) or type(hidden) is not Tensor or kernels.is_tracing():
        return None
    if hidden.is_cpu and (kernels.absence() is not None or hidden.dtype is torch.float64):
        return None  # torch's attention would write out which of all tokens meet: the square of the whole batch
    packing = _packing(mask)
    if packing is None or not packing.fits(layer, hidden, given) or not _is_left_alone(layer):
        return None
    _calls.packed[layer] = packing, args, kwargs
    return (packing.pack(hidden),), {name: packing.pack(value) for name, value in given.items()}


def _unpack(layer: nn.Module, args: Any, output: Any) -> Any:
    """Behind a layer, and where it has failed: spreads out what it has made of packed tokens."""
    packing, *given = _calls.packed.pop(layer, (None,))
    if packing is None or output is None:
        return None
    hidden, *others = output if isinstance(output, tuple) else (output,)
    if (
        not isinstance(hidden, Tensor)
        or hidden.shape[:2] != (1, len(packing.places))
        or any(other is not None for other in others)
    ):
        args, kwargs = given
        return layer.forward(*args, **kwargs)  # It returns more than we know.
    spread = packing.unpack(hidden)
    return (spread, *others) if isinstance(output, tuple) else spread


def _packing(mask: MaskTensor) -> _Packing | None:
    """How layers that are given this mask pack their tokens, found once for all of them."""
    if "packing" not in mask.__dict__:
        mask.packing = _Packing.of(mask)
    found: _Packing | None = mask.packing
    return found


def _is_left_alone(layer: nn.Module) -> bool:
    """Whether nobody hooks or patches the layer or a module in it, or has put one there that we do not know."""
    if _has_any_global_hook():
        return False
    idle = _CAPTURING if _nothing_is_captured() else None
    return all(_works_on_tokens(module) and not _is_hooked(module, idle) for module in layer.modules())


def _is_hooked(module: nn.Module, idle: str | None) -> bool:
    """Whether somebody's function comes with the forward of a module, ours and those from the module ``idle`` apart."""
    if "forward" in module.__dict__:
        return True
    for name in _HOOKS:
        for hook in getattr(module, name, {"unknown": None}).values():
            if hook is not _pack and hook is not _unpack and (not idle or getattr(hook, "__module__", "") != idle):
                return True
    return False


def _nothing_is_captured() -> bool:
    """Whether transformers' own hooks, which stay once hidden states or weights were asked for, have nothing to do."""
    try:
        capturing = importlib.import_module(_CAPTURING)
        return not capturing._active_collector.get()
    except (ImportError, AttributeError):
        return False


def _arguments(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The hidden states that a layer is given, and all else by its name."""
    kind: Any = type(layer)
    signature = _signature(kind)
    given = signature.bind(layer, *args, **kwargs).arguments
    given.pop(next(iter(given)))  # self
    hidden = given.pop(next(iter(given)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return hidden, given
