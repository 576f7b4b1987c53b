"""`report`: which parts of a model run on qkv, why others do not, and what answered its calls so far."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from qkv import kernels
from qkv.integrations import calls
from qkv.integrations.calls import Calls
from qkv.integrations.transformers import models
from qkv.integrations.transformers.attention import NAME
from qkv.integrations.transformers.latent import reads_latents
from qkv.integrations.transformers.steps.attention_forms import form_of
from qkv.integrations.transformers.steps.decoder_forward import DecoderForward, is_known
from qkv.integrations.transformers.steps.model_forward import ModelForward
from qkv.integrations.transformers.steps.rotated_forward import RotatedForward, rotates
from qkv.integrations.transformers.unpadding import is_unpadded, packable_layers
from qkv.layers.gated_forward import GatedForward, is_gated_mlp, mlp_of
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import NormedForward, norm_of
from qkv.layers.projection import ProjectedForward


class Part(NamedTuple):
    """A part of a model, and what runs it."""

    subject: str
    """attention, cache, latents, rotary, steps, decoders, torch's attention, norms, MLPs, linear layers or padding"""
    name: str
    """the class of a model, or the number of modules"""
    taken: bool
    """whether qkv runs it"""
    detail: str
    """what qkv does, or why it does not"""


@dataclass(frozen=True)
class ModelReport:
    """What `report` found. ``str()`` is a text of two tables."""

    parts: tuple[Part, ...]
    calls: dict[tuple[str, str], Calls]
    """calls by place (class of the module, or module, line and function), and by what answered them: "qkv", and how if
    it may compute a whole attention module of transformers; or "torch: " and the reason. For layers that `unpad` packs
    "without padding", or "with padding: " and the reason."""

    @property
    def taken(self) -> tuple[Part, ...]:
        """The parts that qkv runs."""
        return tuple(part for part in self.parts if part.taken)

    @property
    def left(self) -> tuple[Part, ...]:
        """The parts that it does not run, with the reasons."""
        return tuple(part for part in self.parts if not part.taken)

    @property
    def routed(self) -> int:
        """Number of calls of attention that qkv computed."""
        return sum(calls.count for (_, by), calls in self.calls.items() if by.startswith("qkv"))

    @property
    def fallback(self) -> int:
        """Number of calls of attention that torch computed."""
        return sum(calls.count for (_, by), calls in self.calls.items() if by.startswith("torch"))

    def _columns(self) -> tuple[list[str], list[str]]:
        return [part.subject for part in self.parts], [part.name for part in self.parts]

    def __str__(self) -> str:
        subject, name = (max((len(text) for text in texts), default=0) for texts in self._columns())
        lines = [
            f"{part.subject:<{subject}}  {part.name:<{name}}  {'qkv' if part.taken else 'not'}: {part.detail}"
            for part in self.parts
        ]
        if not self.calls:
            return "\n".join([*lines, "No call of attention so far. (Compiled programs are not counted.)"])
        rows = [found.row(where, by) for (where, by), found in self.calls.items()]
        return "\n".join([*lines, "", calls.table(rows)])


def report(model: nn.Module) -> ModelReport:
    """What of a model qkv runs, what it leaves to torch or transformers and why, and the calls of the runs so far.

    For models that `accelerate` took, and models of transformers on ``attn_implementation="qkv"``. The parts are read
    from the model as it is now. Calls are counted from the first on, in all threads, for each module of the model, not
    in compiled programs. Calls of torch's attention within a block of `accelerate` are counted by the block instead.
    Copies of a model start at 0.

    Args:
        model: any module.

    Returns:
        ``parts`` (``taken`` and ``left``), ``calls``, ``routed`` and ``fallback``; ``print(...)`` shows tables.

    Raises:
        TypeError: for a model that is not an ``nn.Module``.

    Example:
        >>> import torch, qkv
        >>> model = qkv.accelerate(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True))
        >>> out = model(torch.randn(2, 10, 32))
        >>> qkv.report(model).routed
        1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module; got {type(model).__name__}.")
    found: list[Part] = []
    roots = models.roots(model)
    for root in roots:
        found += [*_attention(root), *_cache(root), *_latents(root), *_rotary(root), *_steps(root)]
        found += _decoders(root)
    found += [*_torchs_attention(model), *_norms(model), *_mlps(model), *_linear_layers(model)]
    found += _padding(model, roots)
    return ModelReport(tuple(found), calls.tallied(model.modules()))


def _attention(root: Any) -> Iterator[Part]:
    for part in models.parts(root):
        name, implementation = type(part).__name__, part.config._attn_implementation
        reason = models.why_not(part)
        if reason is None and implementation != NAME:
            reason = f"attn_implementation is {implementation!r}; qkv.accelerate(model) sets {NAME!r}"
        absent = kernels.absence()
        detail = f'attn_implementation="{NAME}"' + ("" if absent is None else f", without the kernel: {absent}")
        yield Part("attention", name, reason is None, reason or detail)


def _cache(root: Any) -> Iterator[Part]:
    """The cache that a model makes where it is given none."""
    from qkv.integrations.transformers import default_cache
    from qkv.integrations.transformers.cache import is_ours

    if not default_cache.makes_caches(root):
        return
    name, reason = type(root).__name__, default_cache.why_not(root)
    if reason is not None:
        yield Part("cache", name, False, reason)
        return
    layers = default_cache.layers_of(root)
    ours = Counter(type(layer).__name__ for layer in layers if is_ours(layer))
    theirs = Counter(type(layer).__name__ for layer in layers if not is_ours(layer))
    if not ours:
        yield Part(
            "cache", name, False, f"transformers' own, whose layers ours have no equivalent of: {_listed(theirs)}"
        )
        return
    rest = f"; transformers' own {_listed(theirs)}" if theirs else ""
    detail = f"QKVCache in generate and with use_cache=True, unless one is given: {_listed(ours)}{rest}"
    yield Part("cache", name, True, detail)


def _rotary(root: Any) -> Iterator[Part]:
    rotating = [module for module in root.modules() if rotates(module)]
    taken = sum(isinstance(module.__dict__.get("forward"), RotatedForward) for module in rotating)
    if taken:
        yield Part("rotary", _many(taken, "module"), True, "qkv's rotation in these modules alone")
    if len(rotating) > taken:
        reason = "qkv.accelerate(model) takes those whose rotation is the usual one"
        yield Part("rotary", _many(len(rotating) - taken, "module"), False, reason)


def _steps(root: Any) -> Iterator[Part]:
    """Attention modules that the kernel may compute in one call."""
    forwards = [module.__dict__.get("forward") for module in root.modules()]
    modules = [forward.module for forward in forwards if isinstance(forward, RotatedForward)]
    known = sum(form_of(type(module).forward) is not None for module in modules)
    if known:
        yield Part("steps", _many(known, "module"), True, "few tokens in one call of the kernel, projections included")
    if len(modules) > known:
        yield Part("steps", _many(len(modules) - known, "module"), False, "their forward is none that qkv knows")


def _decoders(root: Any) -> Iterator[Part]:
    """Layers that the kernel may compute in one call, where their attention, norms and MLP are."""
    forwards = [module.__dict__.get("forward") for module in root.modules() if is_known(module)]
    taken = sum(isinstance(forward, DecoderForward) for forward in forwards)
    if taken:
        yield Part("decoders", _many(taken, "layer"), True, "few tokens in one call of the kernel, norms and MLP too")
    elif forwards and any(rotates(module) and "forward" in vars(module) for module in root.modules()):
        reason = "in parts: their attention, norms or MLP are none that qkv knows"
        yield Part("decoders", _many(len(forwards), "layer"), False, reason)


def _latents(root: Any) -> Iterator[Part]:
    count = sum(map(reads_latents, root.modules()))
    if count:
        yield Part("latents", _many(count, "module"), True, "read as they are cached, not expanded at every step")


def _torchs_attention(model: nn.Module) -> Iterator[Part]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    others = (ProjectedForward, RotatedForward, DecoderForward, ModelForward, NormedForward, GatedForward)
    count = sum(isinstance(forward, InstanceForward) and not isinstance(forward, others) for forward in forwards)
    if count:
        yield Part(
            "torch's attention", _many(count, "module"), True, "calls on a CPU within these, where they are torch's"
        )


def _norms(model: nn.Module) -> Iterator[Part]:
    forwards = [module.__dict__.get("forward") for module in model.modules() if norm_of(module) is not None]
    taken, ready = sum(isinstance(forward, NormedForward) for forward in forwards), forwards.count(None)
    if taken:
        yield Part("norms", _many(taken, "norm"), True, "RMSNorm in one call of the kernel, without a gradient")
    if ready:
        yield Part("norms", _many(ready, "norm"), False, "qkv.accelerate(model) takes them")


def _mlps(model: nn.Module) -> Iterator[Part]:
    taken = 0
    reasons: Counter[str] = Counter()
    for module in model.modules():
        if not is_gated_mlp(module):
            continue
        mlp, forward = mlp_of(module), module.__dict__.get("forward")
        if isinstance(mlp, str):
            reasons[f"called as they are: {mlp}"] += 1
        elif isinstance(forward, GatedForward):
            taken += 1
        elif forward is None:
            reasons["qkv.accelerate(model) takes them"] += 1
        else:
            reasons["called as they are: with another forward"] += 1
    if taken:
        yield Part("MLPs", _many(taken, "MLP"), True, "1 to 16 tokens in one call of the kernel, without a gradient")
    for reason, count in reasons.items():
        yield Part("MLPs", _many(count, "MLP"), False, reason)


def _linear_layers(model: nn.Module) -> Iterator[Part]:
    rerouted, ready = 0, 0
    others: Counter[str] = Counter()
    for module in model.modules():
        kind, forward = type(module), module.__dict__.get("forward")
        if kind is nn.Linear and type(forward) is ProjectedForward:
            rerouted += 1
        elif kind is nn.Linear and forward is None:
            ready += 1
        elif kind is nn.Linear:
            others["nn.Linear with another forward"] += 1
        elif isinstance(module, nn.Linear) or (_is_named_linear(kind) and not any(True for _ in module.children())):
            others[kind.__name__] += 1
    if rerouted:
        yield Part("linear layers", _many(rerouted, "linear layer"), True, "products as in qkv's own layers")
    if ready:
        yield Part("linear layers", _many(ready, "linear layer"), False, "qkv.accelerate(model) takes them")
    if others:
        yield Part("linear layers", _many(others.total(), "module"), False, f"called as they are: {_listed(others)}")


def _is_named_linear(kind: type) -> bool:
    """Whether a class is one of linear layers by its name: those of quantising libraries, transformers' Conv1D."""
    return "Linear" in kind.__name__ or kind.__name__ == "Conv1D"


def _padding(model: nn.Module, roots: list[Any]) -> Iterator[Part]:
    if not roots:
        return
    try:
        layers = packable_layers("unpad", model)
    except ValueError:
        yield Part("padding", type(model).__name__, False, "its layers mix tokens outside of attention, or may do so")
        return
    if is_unpadded(model):
        yield Part("padding", _many(len(layers), "layer"), True, "real tokens alone, where a call has padding")
    else:
        yield Part("padding", _many(len(layers), "layer"), False, "qkv.accelerate(model, unpad=True) skips it")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _listed(kinds: Counter[str]) -> str:
    """``30 AppendLayer, 2 SlidingLayer``."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
