"""`layer_step`: an `Attention` of few tokens as one call of the kernel, and the rule for which calls are."""

import functools
import math
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from qkv import functional, kernels
from qkv.cache import CrossKVCache, Int8KVCache, Keys, KVCache, PagedKVCache, SlidingKVCache
from qkv.kernels import Gain
from qkv.layers.arguments import INTEGERS
from qkv.layers.cached_call import CallOptions
from qkv.layers.constants import kept
from qkv.layers.head_norm import HeadNorm, is_rms_norm_torchs
from qkv.layers.normed_forward import Norm
from qkv.layers.plain import is_called_plainly, is_plain_linear, parameters_of
from qkv.layers.rotary import RotaryEmbedding, shapes_of_tokens
from qkv.layers.step_call import Computed, step_call
from qkv.masks import Mask
from qkv.rotation import Rotation
from qkv.torch_internals import function_modes

if TYPE_CHECKING:
    from qkv.layers.attention import Attention

_Module = TypeVar("_Module", bound=nn.Module)

MAX_TOKENS = 16
"""Tokens of a batch up to which one call is faster than its parts."""

REPLACED = (
    *("_inputs", "_self_inputs", "_cross_inputs", "_keys", "_split_heads"),
    *("_attend", "_scores", "_project_out"),
)
"""Methods of `Attention` that a step does the work of."""

CACHES = (KVCache, Int8KVCache, SlidingKVCache, PagedKVCache)

PROJECTIONS = {
    "q_proj": ("q_weight", "q_bias"),
    "k_proj": ("k_weight", "k_bias"),
    "v_proj": ("v_weight", "v_bias"),
    "gate_proj": ("gate_weight", "gate_bias"),
    "out_proj": ("out_weight", "out_bias"),
}
"""Where their parameters go in `StepTensors`."""

OF_CONTEXT = ("k_proj", "v_proj")
"""Those that are not called once a cache has the context."""


class Way(NamedTuple):
    """How a layer computes a call, as `Attention.explain` tells."""

    is_one_call: bool
    """whether the kernel computes the whole layer in one call"""
    reason: str
    """why not; empty if it does"""

    def __str__(self) -> str:
        return "one call of the kernel" if self.is_one_call else f"composed: {self.reason}"


class Weights(NamedTuple):
    """What a step reads of a layer, and its mask."""

    projections: dict[str, Any]
    """weights and biases, by their names in `StepTensors`"""
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    rotary: RotaryEmbedding | None
    mask: Mask
    """of the call; in self-attention with padding over all columns"""
    kv_heads: int
    """of keys; in tensor parallelism, those of one rank"""


def weights_of(layer: "Attention", x: Tensor, context: Tensor | None, options: CallOptions) -> Weights | str:
    """What the kernel needs to take a call of the layer in one; or why the call is composed of its parts.

    What is watched or replaced is called: hooks, patches, adapters, subclasses of modules and methods, functions that
    the composed layer looks up in a public place.
    """
    if not kernels.dispatcher_is_idle() or function_modes():
        return kernels.absence() or "a compiler, a tracer, a transform or a mode of torch is active"
    mask, bias, positions, cache, _ = options
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or not 0 < x.shape[0] * x.shape[1] <= MAX_TOKENS:
        return f"x has not 1 to {MAX_TOKENS} tokens"
    if x.shape[2] != layer.embed_dim:
        return f"x has not width {layer.embed_dim}"
    if bias is not None:
        return "a bias is given"
    if type(mask) is not Mask or not (mask.document_ids is mask.is_global is mask.allow is None):
        return "the mask has documents, global tokens or a dense part"
    if positions is not None and not _are_of_tokens(positions, x):
        return "positions are not integers (L,) or (B, L)"
    of_context = layer.context_dim is not None
    reason = _why_not_context(layer, x, context, options) if of_context else _why_not_cache(x, context, cache)
    if reason:
        return reason
    if layer._share is not None:
        return "heads are over ranks, and outputs are summed over them"
    if functional.attention is not _ATTENTION:
        return "qkv.functional.attention is replaced"
    if layer.backend != "auto":
        return f"the backend is {layer.backend!r}"
    if layer.training and layer.dropout:
        return "weights are dropped"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast casts parts of it"
    if not _has_usual_numbers(layer):
        return "scale, softcap, sink_logits, head_dim or value_dim are not as the constructor takes them"
    modules: dict[str, Any] = layer._modules
    its = layer.__dict__.get  # None of these, or a callable in place of a module
    if not (its("rotary") is its("q_norm") is its("k_norm") is its("gate_proj") is its("position_bias") is None):
        return "a part of the layer is not a module"
    if modules.get("position_bias") is not None:
        return "the layer has a position bias"
    kind: Any = type(layer)
    if not _is_attention(kind) or not layer.__dict__.keys().isdisjoint(REPLACED):
        return "methods of the layer are not those of Attention"
    names, places = _projections(modules.get("gate_proj") is not None, of_context)
    linears = [*map(modules.get, names)]
    parameters = parameters_of(linears)
    if parameters is None:
        name = next(name for name, linear in zip(names, linears, strict=True) if not is_plain_linear(linear))
        return f"{name} is watched, or is not an nn.Linear alone"
    projections: dict[str, Any] = dict(zip(places, parameters, strict=True))
    heads = projections["q_weight"].shape[0] // layer.head_dim
    keys = projections.get("k_weight")
    kv_heads = cache.keys().k.shape[1] if keys is None else keys.shape[0] // layer.head_dim
    if heads != layer.num_heads and layer._why_all_heads(heads, kv_heads):
        return "projections return some of the heads, where all must be there"
    rotary, q_norm, k_norm = modules.get("rotary"), modules.get("q_norm"), modules.get("k_norm")
    if rotary is not None and (not _is_plain(rotary, RotaryEmbedding) or rotary.depends_on_length or rotary.sections):
        return "rotary is watched, or goes by more than a position"
    read = [x, *projections.values(), layer.sink_logits, positions, mask.keep, mask.lengths, mask.prefix_lengths]
    if of_context:
        read += cache.keys()[:2]
    if q_norm is not None or k_norm is not None:
        if not _is_plain(q_norm, HeadNorm) or not _is_plain(k_norm, HeadNorm):
            return "q_norm or k_norm is watched or replaced"
        if not is_rms_norm_torchs():
            return "torch.nn.functional.rms_norm is replaced"
        if q_norm.eps is None or q_norm.eps != k_norm.eps:
            return "q_norm and k_norm differ in eps"
        read += q_norm.weight, k_norm.weight
    if not kernels.are_plain([tensor for tensor in read if tensor is not None]):
        return "gradients or a subclass of Tensor are in use"
    if x.dtype is torch.float64 or not x.is_cpu:
        return f"the kernel has no {x.dtype} on {x.device.type}"
    if of_context:
        return Weights(projections, q_norm, None, None, mask, kv_heads)
    if cache is not None:
        mask, is_token = cache.split_padding(mask, *x.shape[:2])
        if is_token is not None:
            return "some of the new tokens are padding"
    return Weights(projections, q_norm, k_norm, rotary, mask, kv_heads)


@functools.cache
def _projections(is_gated: bool, of_context: bool) -> tuple[list[str], list[str]]:
    """The modules that a step multiplies by, and where their parameters go in `StepTensors`."""
    left_out = (*(() if is_gated else ("gate_proj",)), *(OF_CONTEXT if of_context else ()))
    names = [name for name in PROJECTIONS if name not in left_out]
    return names, [*chain.from_iterable(map(PROJECTIONS.__getitem__, names))]


def _are_of_tokens(positions: object, x: Tensor) -> bool:
    """Whether these are integers, one for each token or one for each column."""
    if type(positions) is not Tensor or positions.dtype not in INTEGERS or not positions.is_cpu:
        return False
    return tuple(positions.shape) in shapes_of_tokens(x[:, None])


def _why_not_cache(x: Tensor, context: object, cache: Any) -> str:
    """Why a step of self-attention does not append to a cache; empty if it does, or there is none."""
    if context is not None:
        return "a context is given"
    if cache is None:
        return ""
    if type(cache) not in CACHES:
        return f"the cache is a {type(cache).__name__}"
    if "append" in vars(cache) or type(cache).append is not _APPENDS[type(cache)]:
        return "append of the cache is replaced"
    if torch.is_grad_enabled():
        return "gradients are enabled, and appending to a cache concatenates then"
    if isinstance(cache, SlidingKVCache) and x.shape[1] > cache.window + 1:
        return f"tokens of several windows of {cache.window}"
    return ""


def _why_not_context(layer: "Attention", x: Tensor, context: object, options: CallOptions) -> str:
    """Why a step of cross-attention does not read the context that a cache has; empty if it does."""
    cache = options.cache
    if type(cache) is not CrossKVCache or not cache.length:
        return "no cache has the context yet"
    if context is not None and not (
        isinstance(context, Tensor)
        and context.dim() == 3
        and (context.shape[0], context.shape[2]) == (x.shape[0], layer.context_dim)
    ):
        return "the context has another shape than the cached one"
    if options.mask.is_positional or layer._slopes is not None:
        return "the mask or alibi depends on positions, which queries do not have among the keys of a context"
    return ""


_APPENDS: dict[type, Any] = {kind: kind.append for kind in CACHES}
_ATTENTION = functional.attention
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (HeadNorm, RotaryEmbedding)}
_NAMES: dict[type, Any] = {kind: frozenset(("weight", *vars(kind))) for kind in _FORWARDS}


def _is_plain(module: object, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether a module is of this very class, and nothing changes its calls or hides its parameters."""
    return (
        type(module) is kind
        and is_called_plainly(module)
        and kind.forward is _FORWARDS[kind]
        and module.__dict__.keys().isdisjoint(_NAMES[kind])
    )


def _has_usual_numbers(layer: "Attention") -> bool:
    """Whether numbers are as the constructor takes them. Others may have been set since: the composed layer checks."""
    scale, softcap, sinks = layer.scale, layer.softcap, layer.sink_logits
    return (
        (scale is None or (type(scale) in (float, int) and -math.inf < scale < math.inf))
        and (softcap is None or (type(softcap) in (float, int) and 0 < softcap < math.inf))
        and (sinks is None or sinks.is_floating_point())
        and (type(layer.head_dim) is type(layer.value_dim) is int)
        and layer.head_dim > 0
        and layer.value_dim > 0
    )


def layer_step(layer: "Attention", x: Tensor, context: Tensor | None, options: CallOptions) -> Tensor | None:
    """`Attention.forward` in one call of the kernel; None, with nothing changed, for calls that it does not take."""
    weights = weights_of(layer, x, context, options)
    if isinstance(weights, str):
        return None
    positions, cache, mask = options.positions, options.cache, weights.mask
    if positions is not None:
        positions = positions.view(-1, x.shape[1])
    if cache is None:
        k, v = _shapes(layer, weights, x)
        return _run(layer, weights, x, Keys(x.new_empty(k), x.new_empty(v), 0), mask, positions)
    cache.admit(layer._owner, options.mask)
    if layer.context_dim is not None:
        if context is not None:
            cache.require(context)
        mask, _ = cache.split_padding(mask, x.shape[0], 0)
        keys = cache.keys()
        return _run(layer, weights, x, keys, cache.restrict(mask, keys, x.shape[1]), 0)
    position, mark = cache.offset() if positions is None else positions, cache.mark()
    keys = cache.claim(*_shapes(layer, weights, x), x)
    if keys is None:
        return None
    out = _run(layer, weights, x, keys, cache.restrict(mask, keys, x.shape[1]), position)
    if out is None:
        cache.restore(mark)
    return out


def _run(
    layer: "Attention", weights: Weights, x: Tensor, keys: Keys, mask: Mask, position: int | Tensor | None
) -> Tensor | None:
    """The step over keys whose last slots are new; None, with nothing written, if the kernel refuses it.

    Tokens are rotated from ``position`` on, an int or integers ``(B,)``; or by integers ``(B or 1, L)``.
    """
    slopes = layer._slopes
    computed = Computed(
        weights.projections,
        mask,
        scale=layer.head_dim**-0.5 if layer.scale is None else layer.scale,
        q_norm=_norm(weights.q_norm, x.dtype),
        k_norm=_norm(weights.k_norm, x.dtype),
        rotation=None if weights.rotary is None else _rotation(weights.rotary, x, position),
        softcap=layer.softcap or 0.0,
        alibi=None if slopes is None else kept(*slopes.formula(x.device)),
        sink_logits=layer.sink_logits,
    )
    return step_call(x, keys, computed)


def _norm(norm: HeadNorm | None, dtype: torch.dtype) -> Norm | None:
    return None if norm is None else Norm(norm.weight.to(dtype), norm.eps or 0.0, Gain.WIDENED)


def _rotation(rotary: RotaryEmbedding, x: Tensor, position: int | Tensor | None) -> Rotation:
    """By a position of all rows, one of each, or one of each token."""
    by_token = isinstance(position, Tensor) and position.dim() == 2
    return Rotation(
        positions=position if by_token else None,  # type: ignore[arg-type]
        offset=0 if isinstance(position, Tensor) else position or 0,
        offsets=position if isinstance(position, Tensor) and not by_token else None,
        frequencies=kept(*rotary.frequency_formula(x.device)),
        position_scale=rotary.position_scale,
        attention_factor=rotary.attention_factor,
        interleaved=rotary.interleaved,
    )


def _shapes(layer: "Attention", weights: Weights, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of the keys and values of x."""
    batch, tokens, _ = x.shape
    return [(batch, weights.kv_heads, tokens, width) for width in (layer.head_dim, layer.value_dim)]


@functools.cache
def _is_attention(kind: type) -> bool:
    """Whether a class has the methods of `Attention` that a step does the work of."""
    base = next(
        each for each in kind.__mro__ if f"{each.__module__}.{each.__qualname__}" == "qkv.layers.attention.Attention"
    )
    return all(getattr(kind, name) is getattr(base, name) for name in REPLACED)
