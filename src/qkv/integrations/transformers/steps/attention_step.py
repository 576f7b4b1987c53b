"""`attention_step`: an attention module of transformers over few tokens as one call of the kernel, and the rule for
which calls are: projections, norms, rotation, the cache, attention and the output projection, as `qkv.layers.step` is
for our own layer.
"""

import inspect
import math
import sys
from collections.abc import Sequence
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkv import kernels
from qkv.cache import Keys
from qkv.integrations import calls
from qkv.integrations.transformers.attention import attend, compute_attention
from qkv.integrations.transformers.cache import AppendLayer, Int8Layer, Int8SlidingLayer, QKVCache, SlidingLayer
from qkv.integrations.transformers.cache_argument import former_names, wrapped
from qkv.integrations.transformers.masks import MaskTensor
from qkv.integrations.transformers.steps.attention_forms import Form, form_of
from qkv.integrations.transformers.steps.rotary import is_usual
from qkv.layers.normed_forward import Norm, norm_of
from qkv.layers.plain import is_called_plainly, is_plain_linear, parameters_of
from qkv.layers.step_call import Computed, step_call
from qkv.masks import FULL, Mask
from qkv.rotation import Rotation
from qkv.torch_internals import function_modes

MAX_TOKENS = 16
"""Tokens of a batch up to which one call is faster than its parts."""

_READ = frozenset(list(inspect.signature(compute_attention).parameters)[5:-1])
"""Keywords that the attention function reads, beside queries, keys, values and the mask."""

_POSITIONAL = ("hidden_states", "position_embeddings", "attention_mask")
"""Parameters of all forms of the forward; the cache, whose name differs, comes after them."""

_PARTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "sinks")
"""Modules and parameters that are read; an attribute of an instance would hide them."""

CacheLayer = AppendLayer | SlidingLayer | Int8Layer | Int8SlidingLayer

_UPDATES: list[tuple[Any, Any]] = [
    (kind, kind.update) for kind in (QKVCache, DynamicCache, AppendLayer, SlidingLayer, Int8Layer, Int8SlidingLayer)
]
"""Methods that a step does the work of; others may have been put in their place since."""


class Parts(NamedTuple):
    """What the kernel needs of an attention module."""

    weights: dict[str, Any]
    """of the projections, by their names in `StepTensors`"""
    norms: tuple[Norm, Norm] | None
    sinks: Tensor | None
    head_dim: int
    scale: float
    softcap: float


class Step(NamedTuple):
    """What the kernel needs to take a call of an attention module in one."""

    parts: Parts
    tables: tuple[Tensor, Tensor] | None
    """cos and sin"""
    layer: CacheLayer | None
    """of the cache; None without one"""
    mask: Mask

    def mark(self) -> tuple[Any, ...]:
        """The state of the cache, to which `restore` returns after `claim`."""
        return () if self.layer is None else self.layer.mark()

    def restore(self, mark: tuple[Any, ...]) -> None:
        """Undoes what `claim` has done since."""
        if self.layer is not None:
            self.layer.restore(mark)

    def claim(self, x: Tensor) -> Keys | None:
        """The keys and values with those of tokens ``x (B, L, width)``, which the kernel writes; None, with nothing
        changed, if the cache refuses them.
        """
        batch, tokens, _ = x.shape
        head_dim = self.parts.head_dim
        shape = (batch, self.parts.weights["k_weight"].shape[0] // head_dim, tokens, head_dim)
        if self.layer is None:
            return Keys(x.new_empty(shape), x.new_empty(shape), 0)
        return self.layer.claim(shape, shape, x)

    @property
    def computed(self) -> Computed:
        """What is computed of tokens and keys."""
        weights, norms, sinks, _, scale, softcap = self.parts
        q_norm, k_norm = norms or (None, None)
        rotation = None if self.tables is None else Rotation(cos=self.tables[0], sin=self.tables[1], halves=True)
        return Computed(weights, self.mask, scale, q_norm, k_norm, rotation, softcap, None, sinks)


def attention_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | str:
    """The output of an attention module in one call of the kernel, counted for reports; or why the call is composed of
    its parts, with nothing changed.
    """
    forward = type(module).forward
    form = form_of(forward)
    if form is None:
        return "the forward is not one that qkv knows"
    if not former_names(forward).isdisjoint(kwargs):
        return "an argument is given by its former name"
    if len(args) > len(_POSITIONAL) + 1:
        return "arguments are not those of the forward"
    given = dict(zip((*_POSITIONAL, form.cache), args, strict=False)) | kwargs if args else kwargs
    step = step_of(module, form, given)
    return step if isinstance(step, str) else run_step(module, given["hidden_states"], step)


def step_of(module: Any, form: Form, given: dict[str, Any], parts: Parts | None = None) -> Step | str:
    """What the kernel needs to take a call in one; or why the call is composed of its parts.

    What is watched or replaced is called: hooks, patches, adapters, subclasses of modules, attention functions.

    Args:
        parts: as `parts_of` found them, if they have not changed since.
    """
    if kernels.is_tracing():
        return "a compiler or tracer is active"
    x = given.get("hidden_states")
    forward: Any = wrapped(type(module).forward)
    if function_modes():
        return "a mode of torch is active"
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or not 0 < x.shape[0] * x.shape[1] <= MAX_TOKENS:
        return f"hidden_states has not 1 to {MAX_TOKENS} tokens"
    if x.dtype is torch.float64 or not x.is_cpu:
        return f"the kernel has no {x.dtype} on {x.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast casts parts of it"
    for name in given.keys() - _POSITIONAL - {form.cache}:
        if name in form.keywords or (name in _READ and given[name] is not None and given[name] is not False):
            return f"{name} is given"
    if not _reaches(forward, module.config._attn_implementation):
        return "the attention function is not qkv's"
    cache = given.get(form.cache)
    if cache is not None and isinstance(layer := _layer_of(cache, module.layer_idx), str):  # as in every prompt
        return layer
    if parts is None:
        found = parts_of(module, form)
        if isinstance(found, str):
            return found
        parts = found
    tables = _tables_of(module, form, forward, parts.head_dim, given.get("position_embeddings"))
    if isinstance(tables, str):
        return tables
    if tables is not None and not x.dtype is tables[0].dtype is tables[1].dtype:
        return "cos and sin have another dtype"
    return step_with(module, form, given, parts, tables)


def step_with(
    module: Any, form: Form, given: dict[str, Any], parts: Parts, tables: tuple[Tensor, Tensor] | None
) -> Step | str:
    """As `step_of`, of a module with the class, configuration and arguments of one for which `step_of` found these cos
    and sin.
    """
    x, cache = given["hidden_states"], given.get(form.cache)
    gains = [norm.gains for norm in parts.norms or ()]
    read = [x, *parts.weights.values(), parts.sinks, *(tables or ()), *gains]
    if not kernels.can_bypass_dispatcher(*[tensor for tensor in read if tensor is not None]):
        return kernels.absence() or "gradients, a transform or a subclass of Tensor are in use"
    layer = None if cache is None else _layer_of(cache, module.layer_idx)
    if isinstance(layer, str):
        return layer
    mask = _mask_of(given.get("attention_mask"), x, layer)
    if isinstance(mask, str):
        return mask
    return Step(parts, tables, layer, mask)


def parts_of(module: Any, form: Form) -> Parts | str:
    """What the kernel needs of a module; or why a call is composed of its parts."""
    if not module.__dict__.keys().isdisjoint(_PARTS):
        return "a part of the module is hidden by an attribute"
    numbers = numbers_of(module, form)
    if isinstance(numbers, str):
        return numbers
    head_dim, scale, softcap = numbers
    sinks = None if form.sinks is None else module._parameters.get(form.sinks)
    if form.sinks is not None and (sinks is None or not sinks.is_floating_point()):
        return "the sink logits are not a parameter of floating-point numbers"
    weights = _weights_of(module, form, head_dim)
    if isinstance(weights, str):
        return weights
    norms = _norms_of(module, form)
    if isinstance(norms, str):
        return norms
    return Parts(weights, norms, sinks, head_dim, scale, softcap)


def _reaches(forward: FunctionType, implementation: object) -> bool:
    """Whether the names of a forward's file lead to `attend`."""
    interface: Any = forward.__globals__.get("ALL_ATTENTION_FUNCTIONS")
    if type(interface) is not type(ALL_ATTENTION_FUNCTIONS) or implementation not in interface:
        return False
    return interface[implementation] is attend and type(interface).get_interface is _GET_INTERFACE


_GET_INTERFACE: Any = type(ALL_ATTENTION_FUNCTIONS).get_interface


def numbers_of(module: Any, form: Form) -> tuple[int, float, float] | str:
    """The width of heads, the scale and the softcap, 0 for none."""
    if module.training and module.attention_dropout:
        return "weights are dropped"
    head_dim, scale = module.head_dim, module.scaling
    softcap = None if form.softcap is None else getattr(module, form.softcap)
    if type(head_dim) is not int or head_dim < 1 or type(scale) is not float or not -math.inf < scale < math.inf:
        return "head_dim or scaling are not numbers"
    if softcap is not None and not (type(softcap) in (float, int) and 0 < softcap < math.inf):
        return "the softcap is not a positive number"
    return head_dim, scale, softcap or 0.0


def _weights_of(module: Any, form: Form, head_dim: int) -> dict[str, Any] | str:
    """Weights and biases of the projections, by their names in `StepTensors`."""
    names = projections_of(form)
    modules = module._modules
    linears = [modules.get(name) for name in names]
    parameters = parameters_of(linears)
    if parameters is None:
        name = next(name for name, linear in zip(names, linears, strict=True) if not is_plain_linear(linear))
        return f"{name} is watched, or is not an nn.Linear alone"
    weights = weights_in(module, form, head_dim, parameters)
    return "qkv_proj is not as wide as its heads" if weights is None else weights


def projections_of(form: Form) -> tuple[str, ...]:
    """Names of the linear layers."""
    return ("qkv_proj", "o_proj") if form.is_packed else ("q_proj", "k_proj", "v_proj", "o_proj")


def weights_in(module: Any, form: Form, head_dim: int, parameters: Sequence[Any]) -> dict[str, Any] | None:
    """Weights and biases by their names in `StepTensors`, among the parameters of `projections_of` the form; None for
    packed ones that are not as wide as the heads.
    """
    if form.is_packed:
        kv = module.num_key_value_heads * head_dim
        widths = (module.config.num_attention_heads * head_dim, kv, kv)
        weight, bias, *out = parameters
        if weight is None or sum(widths) != weight.shape[0]:
            return None
        weights = weight.split(widths)
        biases = (None, None, None) if bias is None else bias.split(widths)
        parameters = [*(each for pair in zip(weights, biases, strict=True) for each in pair), *out]
    return dict(zip(_WEIGHTS, parameters, strict=True))


_WEIGHTS = [f"{name}_{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")]


def _norms_of(module: Any, form: Form) -> tuple[Norm, Norm] | str | None:
    if not form.has_norms:
        return None
    norms = [_norm_of(module._modules.get(name)) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = norms
    if q_norm is None or k_norm is None:
        return "q_norm or k_norm is watched, or is not a norm that qkv knows"
    if q_norm.eps != k_norm.eps or q_norm.gain is not k_norm.gain:
        return "q_norm and k_norm differ in more than their gains"
    return q_norm, k_norm


def _norm_of(module: nn.Module | None) -> Norm | None:
    norm = None if module is None or not is_called_plainly(module) else norm_of(module)
    return None if norm is None or norm.gains is None else norm


def _tables_of(
    module: Any, form: Form, forward: FunctionType, head_dim: int, given: Any
) -> tuple[Tensor, Tensor] | str | None:
    """Cos and sin of the tokens; None for modules that do not rotate."""
    if (form.rotary == "use_rope" and not module.use_rope) or (form.rotary == "given" and given is None):
        return None
    if type(given) not in (tuple, list) or len(given) != 2 or not all(map(kernels.is_exact_tensor, given)):
        return "position_embeddings are not cos and sin"
    cos, sin = given
    theirs = forward.__globals__.get("apply_rotary_pos_emb")
    width = cos.shape[-1] if cos.dim() == 3 and cos.shape == sin.shape else 0
    if not 0 < width <= head_dim:
        return "cos and sin are not (B or 1, L, columns)"
    if theirs is None or not is_usual(theirs, 8) or (width < head_dim and not is_usual(theirs, 4)):
        return "the rotation is not the usual one"
    return cos, sin


_REFUSED = "the cache is empty, or moves its window"


def _layer_of(cache: Any, index: Any) -> CacheLayer | str:
    """The layer of a cache to which the kernel may append."""
    if type(cache) is not QKVCache:
        return f"the cache is a {type(cache).__name__}"
    if torch.is_grad_enabled():
        return "gradients are enabled, and appending to a cache concatenates then"
    layer = cache.layers[index] if type(index) is int and 0 <= index < len(cache.layers) else None
    if type(layer) not in (AppendLayer, SlidingLayer, Int8Layer, Int8SlidingLayer):
        return f"the layer of the cache is a {type(layer).__name__}"
    if not layer.is_initialized:  # type: ignore[union-attr]
        return _REFUSED
    if cache.offloading:
        return "the cache is offloaded"
    if any(kind.update is not update for kind, update in _UPDATES) or "update" in {*vars(cache), *vars(layer)}:
        return "updates of the cache are watched or replaced"
    return layer  # type: ignore[return-value]


def _mask_of(attention_mask: Any, x: Tensor, layer: CacheLayer | None) -> Mask | str:
    """The mask over the keys, where the last of them are those of x."""
    if attention_mask is None:
        return FULL
    if type(attention_mask) is not MaskTensor:
        return "the mask is not one that qkv made"
    mask = attention_mask.mask
    tokens = x.shape[1]
    _, _, rows, keys = attention_mask.shape
    if mask.is_pairwise or mask.chunk or mask.prefix_tokens:
        return "the mask has more than an interval and padding"
    if keys != tokens + (0 if layer is None else layer.length_before()) or rows != tokens:
        return "the mask is one of other tokens"
    if attention_mask.offset != keys - tokens:
        return "the mask is one of other positions"
    return mask


def run_step(module: Any, x: Tensor, step: Step) -> Tensor | str:
    """The output of an attention module, counted for reports; why not, with nothing written, if the cache or the kernel
    refuses it.
    """
    mark = step.mark()
    try:
        keys = step.claim(x)
        out = None if keys is None else step_call(x, keys, step.computed)
    except BaseException:  # out of memory
        step.restore(mark)
        raise
    if keys is None:
        return _REFUSED
    if out is None:
        step.restore(mark)
        return "the kernel refuses these tensors"
    count(module, x, step, keys)
    return out


def count(module: nn.Module, x: Tensor, step: Step, keys: Keys) -> None:
    """Counts a call of an attention module for reports."""
    batch, tokens, _ = x.shape
    head_dim = step.parts.head_dim
    query = (batch, step.parts.weights["q_weight"].shape[0] // head_dim, tokens, head_dim)
    key = (*keys.k.shape[:2], keys.lk, keys.k.shape[3])
    calls.tally(module, type(module).__name__, calls.ONE_CALL, query, key)
    notify = calls.current_callback()
    if notify is not None and not isinstance(notify, calls.TallyFor):
        notify(_caller(), query, key, None)


_FORWARDING = ("qkv.", "torch.nn.", "transformers.modeling_layers")
"""Files whose functions hand calls on to modules."""


def _caller() -> FrameType:
    """The frame that called the module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_FORWARDING):
        frame = frame.f_back
    return frame
