"""`accelerate`: attention, caches, norms and linear layers of unmodified models, by qkv where it computes the same."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import isfunction
from typing import Any, TypeVar, overload

from torch import nn

from qkv.arguments import require_flag
from qkv.integrations import calls
from qkv.integrations.calls import Call as Call
from qkv.integrations.calls import Report as Report
from qkv.integrations.torch.dispatcher import routed
from qkv.integrations.torch.reachable import reaches_attention
from qkv.integrations.transformers import models
from qkv.integrations.transformers.latent import expand_latents, read_latents
from qkv.integrations.transformers.steps.decoder_forward import replace_decoder
from qkv.integrations.transformers.steps.model_forward import replace_model
from qkv.integrations.transformers.steps.rotated_forward import replace_rotary
from qkv.integrations.transformers.unpadding import note_labels, pack_layer, packable_layers, remove_hooks
from qkv.layers.gated_forward import replace_mlp
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import replace_norm
from qkv.layers.projection import reroute

Model = TypeVar("Model", bound=nn.Module)

_LATENT = "_qkv_accelerate_latent"
"""Attribute of an attention module whose latents `accelerate` put off to expand, and nobody else."""

_UNPADDED = "_qkv_accelerate_unpadded"
"""Attribute of a module that `accelerate` gave the hooks of `qkv.unpad`, and nobody else."""


@overload
def accelerate() -> AbstractContextManager[Report]: ...
@overload
def accelerate(model: Model, *, enabled: bool = True, unpad: bool = False) -> Model: ...
def accelerate(model: Any = None, *, enabled: bool = True, unpad: bool = False) -> Any:
    """Runs a model on qkv where it computes the same: attention, KV caches, norms, MLPs, linear layers.

    ``accelerate(model)`` takes, until ``accelerate(model, enabled=False)``, in this model alone and in any thread:

    - models of transformers, also as a part of other modules: their attention (``attn_implementation="qkv"``), and
      `QKVCache` as the cache that they make in ``generate`` and in a call with ``use_cache``. A cache that you pass is
      used as it is; layers of caches without an equivalent of ours stay transformers' own;
    - calls of torch's attention in all other modules: ``scaled_dot_product_attention``, under any name that the model
      has bound it to, for which `attention` would choose the native kernel, and the fused inference of
      ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``. Modules whose code calls nothing named so, such as
      adapters around linear layers, are called normally;
    - latent attention as in DeepSeek-V3, which decodes from latents as `qkv.integrations.transformers.latent` does;
    - the rotary embeddings of their attention modules, where they are the usual ones;
    - 1 to 16 tokens of these modules, of projections, cache and attention in one call of the kernel, where the forward
      is a known one and nothing in it is watched or replaced; and of decoder layers, with norms and MLP;
    - RMSNorm and gated MLPs with forwards as in Llama, Gemma, Phi-3 and many others, and ``nn.RMSNorm``: without a
      gradient, a norm is one call of the kernel, and so is an MLP of 1 to 16 tokens;
    - each ``nn.Linear``, with its hooks. Subclasses, quantised, adapted and patched ones are called normally.

    `qkv.report` lists what was taken, what not, and why, and counts the calls of a run.

    ``with accelerate() as report:`` routes calls of torch's attention of this thread (or asyncio task) in the block,
    and counts in ``report`` those that qkv computed, in models of transformers as well, and those that fell back to
    torch, with reasons.

    Fallbacks to torch: fp64, other devices, nested tensors and other subclasses, ``torch.func``, forward-mode
    derivatives, compiled and exported programs, shapes that broadcast, and calls that torch refuses.
    ``nn.MultiheadAttention`` makes no such call if it returns weights (``need_weights=True``, the default) and is in
    training or needs gradients.

    Results, gradients, layouts and errors are torch's, up to rounding, with these exceptions: a masked key has no
    influence even if it contains NaN or inf; dropout draws other elements from the same seed; second derivatives raise,
    which torch's unfused kernel has (``sdpa_kernel(SDPBackend.MATH)`` leaves calls to torch). With activation
    checkpointing, run backward inside the block as well.

    From the first block or module outside of transformers on, CPU calls of attention that are not routed cost some
    microseconds more in this process. Enter the first block while no other thread is inside an attention call. Call
    ``accelerate(model, enabled=False)`` before ``torch.jit.script`` and ``nn.DataParallel``, which need the original
    ``forward``.

    A model may be a part of another one, and be taken or taken back before or after that: each module is as it was told
    last. Copies of a part, and parts taken out of a model, stay accelerated until they are taken back themselves.

    A model of transformers gets copies of its configurations, as ``from_config`` makes one: change ``model.config``
    then, not the object that the model was made from, which other models may share. ``enabled=False`` puts that object
    back, unless ``model.config`` has been changed since: then its copy stays.

    Args:
        model: a module, modified in place: forwards are set on modules, attention implementations in configurations;
            types, parameters, state dict and hooks stay. Deep copies and pickles stay accelerated; modules added later
            are not. (A ``copy.copy`` calls its original, as with every ``forward`` that is set on an instance.) A
            ``model.forward`` that you keep is not the model: it raises a ReferenceError once the model is deleted.
        enabled: False undoes an earlier ``accelerate`` of this model, or of one that it is a part of; without one
            nothing. What was changed since (another attention implementation, another forward) stays, and hooks that
            other libraries have put over ours, such as those of the package accelerate.
        unpad: also skips padding tokens in layers of transformers' models, as `qkv.unpad` does: for encoders, and
            decoders in the first call of a cache. A loss is the mean over the same targets: calls with labels that are
            predicted at padding tokens (left padding, and no prompt without labels) run with padding.

    Returns:
        The model; without one, a context manager that returns a `Report`.

    Raises:
        TypeError: for a model that is not an ``nn.Module``.
        ValueError: for ``unpad=True`` if no layer can be packed, as `qkv.unpad`; nothing is changed then.

    Example:
        >>> import torch, qkv
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> with qkv.accelerate() as report:
        ...     out = model(torch.randn(2, 10, 32))
        >>> report.routed, report.fallback
        (1, 0)
        >>> model = qkv.accelerate(model)

    Source: the semantics of ``torch.nn.functional.scaled_dot_product_attention`` on CPU, and of transformers' models.
    """
    for name, flag in (("enabled", enabled), ("unpad", unpad)):
        require_flag("accelerate", name, flag)
    if model is None:
        if not enabled or unpad:
            raise TypeError("accelerate: enabled=False and unpad=True need a model; got none. Pass it first.")
        return _reporting()
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module; got {type(model).__name__}.")
    if enabled:
        _enable(model, unpad)
    else:
        _disable(model)
    return model


def _enable(model: nn.Module, unpad: bool) -> None:
    layers = packable_layers("accelerate", model) if unpad else []  # raises before anything changes
    through_interface: set[nn.Module] = set()
    for root in models.take(model):
        through_interface.update(root.modules())
        for part in models.parts(root):
            if models.why_not(part) is not None:
                through_interface.difference_update(part.modules())
    for module in model.modules():
        replace_norm(module)
        replace_mlp(module)
    others = {each for each in model.modules() if each not in through_interface or _calls_torchs_attention(each)}
    attending = set(filter(reaches_attention, others))
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if module not in others:
            _RoutedForward.take_back(module)  # set when this module alone was accelerated
        elif not (isinstance(forward, InstanceForward) or attending.isdisjoint(module.modules())):
            _RoutedForward.set_on(module)
    for module in through_interface:
        replace_rotary(module)
        if read_latents(module):
            module.__dict__[_LATENT] = True
    for module in through_interface:
        replace_decoder(module)
    for module in through_interface:
        replace_model(module)
    reroute(model)
    packed = [layer for layer in layers if pack_layer(layer)]
    for module in (*packed, *(note_labels(model) if layers else ())):
        module.__dict__[_UNPADDED] = True


def _disable(model: nn.Module) -> None:
    for module in model.modules():
        if module.__dict__.pop(_UNPADDED, False):
            remove_hooks(module)
        if module.__dict__.pop(_LATENT, False):
            expand_latents(module)
        InstanceForward.take_back(module)
    models.give_back(model)


@contextmanager
def _reporting() -> Iterator[Report]:
    report = Report()
    with routed(report.count):
        yield report


class _RoutedForward(InstanceForward):
    """The forward of a module, with calls routed: the current one of its class, or the former one of the instance."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in a block of routed calls."""
        if calls.current_callback() is not None:
            return self.forward(*args, **kwargs)
        with routed(calls.TallyFor(self.module)):
            return self.forward(*args, **kwargs)


def _calls_torchs_attention(module: nn.Module) -> bool:
    """Whether a module in a model of transformers may call torch's attention itself, past the AttentionInterface."""
    kind: Any = type(module)
    package = kind.__module__.partition(".")[0]
    if package == "torch":
        return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return package != "transformers" or _names_torchs_attention(kind)


@functools.cache
def _names_torchs_attention(kind: Any) -> bool:
    """Whether a method of a class does."""
    methods = (getattr(value, "__wrapped__", value) for base in kind.__mro__ for value in vars(base).values())
    return any("scaled_dot_product_attention" in method.__code__.co_names for method in methods if isfunction(method))
