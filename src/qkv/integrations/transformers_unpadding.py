"""`unpad`: models of transformers that do not compute the padding of a batch."""

import functools
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkv import kernels
from qkv.integrations import transformers as integration
from qkv.integrations.transformers_masks import MaskTensor
from qkv.masks import Mask

Model = TypeVar("Model", bound=nn.Module)

_HANDLES = "_qkv_unpadding"
"""Where the first of packed layers keeps the handles of all hooks, with which they are copied."""


def unpad(model: Model, *, enabled: bool = True) -> Model:
    """Lets the layers of a model compute real tokens only, not the padding of a batch.

    A batch of texts of different lengths is padded to its longest, and a model computes all of it. From here on, real
    tokens are packed into one row ``(1, T, width)`` before the layers, and spread out again behind them: whatever works
    on single tokens has as much less to do as there is padding, and attention sees each text by itself. Results at real
    tokens, and the gradients of a loss of them, stay the same, up to rounding. At padded places a model returns what it
    makes of 0, where it returned numbers of no meaning; nor should one read them, as a pooler of the first place does
    in texts padded on the left.

    A call runs as ever, padding and all, where

    - there is no padding, nothing else, or real tokens have padding between them;
    - the mask is not of padding alone, padding and causal, or padding and a window;
    - keys and values come from elsewhere: a cache (give a decoder ``use_cache=False``), an encoder;
    - ``output_hidden_states`` or ``output_attentions`` want to see each layer, or layerdrop may leave some out;
    - the program is compiled or exported, or another attention implementation has been set since;
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
            and norms are), take no ``attention_mask``, or take a bias of positions.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from qkv.integrations.transformers_unpadding import unpad
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        >>> model = unpad(BertModel(BertConfig(**sizes)))

    Source: the unpadding of ModernBERT (Warner et al. 2024, section 2.1.2), for whatever model it does not change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpad: model must be an nn.Module; got {_kind(model)}.")
    from transformers import PreTrainedModel

    integration.register()
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    stacks = {id(stack.layers[0]): stack for module in models for stack in _stacks(module, module)}
    if not stacks:
        names = ", ".join(type(module).__name__ for module in models) or f"{type(model).__name__}, which holds none"
        raise ValueError(
            "unpad: model must be one of transformers, or hold one, whose layers take an attention_mask and let tokens "
            f"meet in attention alone; got {names}."
        )
    for stack in stacks.values():
        stack.take_back()
        if enabled:
            stack.hook()
    if enabled:
        for module in models:
            if module.config._attn_implementation != integration.NAME:
                module.set_attn_implementation(integration.NAME)
    return model


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


@dataclass
class _Packing:
    """Where the tokens of a batch ``(B, L)`` lie in one row ``(1, T)``."""

    keep: Tensor
    """``(B, L)``: which tokens are real"""
    places: Tensor
    """``(T,)``: of each real token in ``B * L``"""
    texts: Tensor
    """``(1, T)``: the row of the batch that each comes from"""
    masks: dict[int, tuple[MaskTensor, MaskTensor]] = field(default_factory=dict)
    """What has become of a mask, by its id; with the mask itself, so that the id stays its own"""

    @staticmethod
    def of(keep: Tensor) -> "_Packing | None":
        """None where there is no real token, or some have padding between them, which distances would show."""
        begins = keep[:, 1:] & ~keep[:, :-1]
        if (begins.sum(dim=1) + keep[:, 0] > 1).any():
            return None
        places = keep.flatten().nonzero()[:, 0]
        if len(places) == 0:
            return None
        return _Packing(keep, places, (places // keep.shape[1])[None])

    def fits(self, name: str, value: Any) -> bool:
        """Whether an argument of a layer is known to belong to these tokens, or to none."""
        batch, length = self.keep.shape
        if isinstance(value, MaskTensor):
            return name == "attention_mask" and _is_square(value, length) and self._is_padding(value.mask)
        if isinstance(value, Tensor):
            by_token = value.dim() >= 2 and value.shape[0] in (1, batch) and value.shape[1] == length
            return name in ("position_ids", "position_embeddings") and by_token
        if isinstance(value, tuple):
            return all(self.fits(name, part) for part in value)
        return value is None or isinstance(value, bool | int | float | str)

    def _is_padding(self, mask: Mask) -> bool:
        """Whether a mask hides this padding, and beyond it only what an interval hides."""
        if mask.keep is None or mask != Mask.padding(mask.keep) & Mask.band(mask.left, mask.right):
            return False
        return mask.keep is self.keep or torch.equal(mask.keep.expand_as(self.keep), self.keep)

    def pack(self, value: Any) -> Any:
        """What belongs to all tokens, as it is for the real ones."""
        if isinstance(value, MaskTensor):
            if id(value) not in self.masks:
                length, interval = len(self.places), Mask.band(value.mask.left, value.mask.right)
                shape = (1, 1, length, length)
                packed = MaskTensor(Mask.documents(self.texts) & interval, 0, shape, value.dtype, value.device)
                self.masks[id(value)] = value, packed
            return self.masks[id(value)][1]
        if isinstance(value, Tensor):
            everywhere = value.expand(*self.keep.shape, *value.shape[2:])
            return everywhere.flatten(0, 1).index_select(0, self.places)[None]
        return tuple(map(self.pack, value)) if isinstance(value, tuple) else value

    def unpack(self, packed: Tensor) -> Tensor:
        """The rows of all tokens, 0 where there is padding."""
        spread = packed.new_zeros(self.keep.numel(), *packed.shape[2:])
        return spread.index_copy_(0, self.places, packed[0]).view(*self.keep.shape, *packed.shape[2:])


class _Call(threading.local):
    """What this thread is computing."""

    may_pack = True
    packing: _Packing | None = None


_call = _Call()


@dataclass
class _Stack:
    """Layers that follow each other, and the model that calls them."""

    model: nn.Module
    layers: list[nn.Module]

    def hook(self) -> None:
        """Lets the first layer's input be packed, all further arguments of all layers, and the last output unpacked."""
        first, last = self.layers[0], self.layers[-1]
        first.__dict__[_HANDLES] = [
            self.model.register_forward_pre_hook(_begin, with_kwargs=True),
            first.register_forward_pre_hook(_enter, with_kwargs=True),
            *(layer.register_forward_pre_hook(_pass, with_kwargs=True) for layer in self.layers),
            last.register_forward_hook(_leave),
        ]

    def take_back(self) -> None:
        """Undoes `hook`, if need be."""
        for handle in self.layers[0].__dict__.pop(_HANDLES, ()):
            handle.remove()


def _stacks(module: nn.Module, model: nn.Module) -> Iterator[_Stack]:
    """The stacks within ``module`` that ``model`` itself calls, not a model in it."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in child):
            if len(child) and all(map(_meet_in_attention_alone, child)):
                yield _Stack(model, list(child))
        elif not isinstance(child, PreTrainedModel):
            yield from _stacks(child, model)


def _meet_in_attention_alone(layer: nn.Module) -> bool:
    """Whether nothing but attention lets tokens meet, and a mask says which do."""
    from transformers.pytorch_utils import Conv1D

    kind: Any = type(layer)
    takes = _signature(kind).parameters
    if "attention_mask" not in takes or "position_bias" in takes:
        return False
    for module in layer.modules():
        if hasattr(module, "indexer"):  # which chooses keys before attention does
            return False
        known = isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | Conv1D)  # Conv1D is transformers' linear
        if not known and not type(module).__name__.endswith("RMSNorm") and [*module.parameters(recurse=False)]:
            return False
    return True


@functools.cache
def _signature(layer: Any) -> inspect.Signature:
    """Of the ``forward`` of a class."""
    return inspect.signature(layer.forward)


def _begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a model: whether each of its layers is to be seen, or not all of them run."""
    config: Any = model.config
    wanted = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
    seen = any(getattr(config, name, False) if value is None else value for name, value in wanted.items())
    some = model.training and bool(getattr(model, "layerdrop", 0))
    _call.may_pack = not seen and not some and not torch.compiler.is_compiling()
    _call.packing = None


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the first layer: whether this call can be packed, and if so, its hidden states are."""
    _call.packing = None
    if not _call.may_pack:
        return None
    hidden, given = _arguments(layer, args, kwargs)
    if hidden.is_cpu and (kernels.absence() is not None or hidden.dtype is torch.float64):
        return None  # torch's attention would write out which of all tokens meet: the square of the whole batch
    mask = given.get("attention_mask")
    if not isinstance(mask, MaskTensor) or mask.mask.keep is None or not _is_square(mask, hidden.shape[1]):
        return None
    packing = _Packing.of(mask.mask.keep.expand(hidden.shape[:2]))
    if packing is None or not all(packing.fits(*argument) for argument in given.items()):
        return None
    _call.packing = packing
    return (packing.pack(hidden),), given


def _pass(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before every layer: what it is given beside hidden states is packed; or these are unpacked if it cannot be."""
    packing = _call.packing
    if packing is None:
        return None
    hidden, given = _arguments(layer, args, kwargs)
    if all(packing.fits(*argument) for argument in given.items()):
        return (hidden,), {name: packing.pack(value) for name, value in given.items()}
    _call.packing = None
    return (packing.unpack(hidden),), given


def _leave(layer: nn.Module, args: Any, output: Any) -> Any:
    """Behind the last layer."""
    packing, _call.packing = _call.packing, None
    if packing is None:
        return None
    return packing.unpack(output) if isinstance(output, Tensor) else (packing.unpack(output[0]), *output[1:])


def _arguments(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states that a layer is given, and all else by its name."""
    kind: Any = type(layer)
    signature = _signature(kind)
    given = signature.bind(layer, *args, **kwargs).arguments
    given.pop(next(iter(given)))  # self
    hidden: Tensor = given.pop(next(iter(given)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return hidden, given


def _is_square(mask: MaskTensor, length: int) -> bool:
    """Whether queries are the keys."""
    return mask.offset == 0 and mask.shape[2:] == (length, length)
