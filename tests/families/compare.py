"""One family: a random model on eager, sdpa and qkv; outputs and gradients are compared with eager in fp64."""

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from families.inputs import Inputs, pad, variants
from families.registry import candidates
from families.shrink import WIDTH, shrink
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers.unpadding import unpad

NEW_TOKENS = 20
# What any implementation may round: sums over the width of a layer, sqrt(64) / 2 units of their size.
ROUNDING = math.sqrt(WIDTH) / 2 * torch.finfo(torch.float32).eps


@dataclass
class Outcome:
    """What became of a family."""

    family: str
    model: str = ""
    inputs: tuple[str, ...] = ()
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    reference: str = "eager fp64"
    worst: float = 0.0
    """The largest error as a share of what is allowed."""

    @property
    def works(self) -> bool:
        return not self.reason


class DisagreementError(AssertionError):
    """qkv's result is not eager's."""


def judge(family: str, only: str | None = None) -> Outcome:
    """Runs a family; ``only`` names the class to take."""
    reasons: list[str] = []
    for cls in candidates(family):
        if only is not None and cls.__name__ != only:
            continue
        outcome = Outcome(family, cls.__name__)
        try:
            model = build(cls)
            inputs = suitable(model)
            outcome.inputs = tuple(inputs)
            check(model, inputs, outcome)
        except DisagreementError as error:
            outcome.reason = str(error)
            return outcome
        except Exception as error:
            reasons.append(f"{cls.__name__}: {_line(error)}")
            continue
        return outcome
    return Outcome(family, reason=reasons[0] if reasons else "no model class of its own")


def build(cls: Any) -> Any:
    """A small model in which attention is far from uniform."""
    torch.manual_seed(0)
    model = cls._from_config(
        shrink(cls.config_class()), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    size = sum(p.numel() for p in model.parameters())
    if size > 40e6:
        raise ValueError(f"{size / 1e6:.0f} million parameters are left after shrinking")
    draw_weights(model)
    return model.float()


def draw_weights(model: Any) -> None:
    """Random weights that keep the size of what passes through, so that scores are of the order of 1."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                    continue
                convolution = name == "weight" and hasattr(module, "kernel_size")
                fan_in = parameter[0].numel() if convolution else parameter.shape[-1]
                parameter.normal_(std=1 / math.sqrt(fan_in))


def suitable(model: Any) -> Inputs:
    """The first inputs that the model takes."""
    first: Exception | None = None
    for inputs in variants(model):
        for given in with_labels(model, inputs):
            try:
                with torch.no_grad():
                    output = model(**given)
            except Exception as error:
                first = first or error
                continue
            if next(tensors(output), None) is not None:
                return given
    raise first or ValueError("no inputs known for it")


def with_labels(model: Any, inputs: Inputs) -> Iterator[Inputs]:
    language = type(model).__name__.endswith(("LM", "LMHeadModel", "ForConditionalGeneration"))
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if language and ids is not None and "labels" in inspect.signature(model.forward).parameters:
        yield {**inputs, "labels": ids.clone()}
    yield inputs


def check(model: Any, inputs: Inputs, outcome: Outcome) -> None:
    for side in ("left", "right") if "attention_mask" in inputs else ("unpadded",):
        given = inputs if side == "unpadded" else pad(inputs, side)
        try:
            compare(model, given, outcome)
        except DisagreementError:
            with empty_rows_are_zero(model):
                compare(model, given, outcome)
            outcome.notes.append(f"{side} padding leaks")
        outcome.checks.append(side)
    if model.can_generate():
        generate(model, pad(inputs, "left") if "attention_mask" in inputs else inputs, outcome)
    if "attention_mask" in inputs:
        without_padding(model, pad(inputs, "right"), outcome)


def without_padding(model: Any, inputs: Inputs, outcome: Outcome) -> None:
    """Outputs and gradients where the model computes real tokens alone.

    Padding lies on the right, and has the least of all tokens: poolers of the first or of the largest token find a real
    one.
    """
    try:
        unpad(model)
    except ValueError:
        return
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        inputs = {**inputs, "input_ids": ids.masked_fill(inputs["attention_mask"] == 0, int(ids.min()))}
    with without_caches(model):
        if 1 in compare(model, inputs, outcome).batches:
            outcome.checks.append("unpad")
    unpad(model, enabled=False)


@contextlib.contextmanager
def without_caches(model: Any) -> Iterator[None]:
    parts = [part for part in model.modules() if hasattr(getattr(part, "config", None), "use_cache")]
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(mock.patch.object(part.config, "use_cache", False))
        yield


def compare(model: Any, inputs: Inputs, outcome: Outcome) -> "Counted":
    """Outputs and gradients: at most twice as far from the reference as transformers' own implementations.

    Returns:
        what qkv was called with.
    """
    eager = results(on(model, "eager"), inputs)
    if not all(tensor.isfinite().all() for tensor in eager.values()):
        raise ValueError("eager itself gives values that are not finite")
    with Counted() as count:
        try:
            got = results(on(model, "qkv"), inputs)
        except Exception as error:
            raise DisagreementError(f"qkv alone raises {_line(error)}") from error
    if not count:
        raise NotImplementedError("the model does not call the attention function on these inputs")
    want = reference(model, inputs)
    if want is None or not _near(eager, want):
        outcome.reference, want = "eager fp32", eager
    peers = [eager]
    if model._supports_sdpa:
        sdpa = results(on(model, "sdpa"), inputs)
        if _near(sdpa, want):
            peers.append(sdpa)
        elif (note := "sdpa is not eager") not in outcome.notes:
            outcome.notes.append(note)
    scales = _scales(want)
    for name, wanted in want.items():
        allowed = 2 * max(_error(peer[name], wanted) for peer in peers) + ROUNDING * scales[name]
        error = _error(got[name], wanted)
        if not error <= allowed:
            raise DisagreementError(f"{name}: error {error:.2g} exceeds the allowed {allowed:.2g}")
        outcome.worst = max(outcome.worst, error / allowed if allowed else 0.0)
    return count


@contextlib.contextmanager
def empty_rows_are_zero(model: Any) -> Iterator[None]:
    """Eager without the mean of all keys that it gives to queries which see none; sdpa and qkv give 0."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    with contextlib.ExitStack() as stack:
        for module in modules:
            eager = getattr(module, "eager_attention_forward", None)
            if eager is not None:
                stack.enter_context(mock.patch.object(module, "eager_attention_forward", _emptied(eager)))
        yield


def _emptied(eager: Any) -> Any:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        out, weights = eager(module, query, key, value, attention_mask, *args, **kwargs)
        if attention_mask is not None and attention_mask.is_floating_point():
            seen = (attention_mask > torch.finfo(attention_mask.dtype).min / 2).any(-1)
            out = out * seen.transpose(1, 2)[..., None]
        return out, weights

    return attend


def results(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """What a model returns at real positions, and the gradients of all its parameters."""
    torch.manual_seed(2)
    keep = inputs.get("attention_mask")
    if keep is not None and "labels" in inputs and inputs["labels"].shape == keep.shape:
        # A padded position predicts the first token of its row, and means nothing.
        fair = keep.bool() & keep.roll(1, 1).bool()
        inputs = {**inputs, "labels": inputs["labels"].masked_fill(~fair, -100)}
    output = model(**inputs)
    found = {name: real(tensor, keep) for name, tensor in tensors(output)}
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)).sum() / math.sqrt(tensor.numel())
        for tensor in found.values()
        if tensor.requires_grad
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(loss, Tensor):
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        found |= {f"gradient of {name}": g for (name, _), g in zip(named, gradients, strict=True) if g is not None}
    return {name: tensor.detach().double() for name, tensor in found.items() if tensor.numel()}


def real(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The rows of real tokens, where a result has rows of tokens."""
    return tensor[keep.bool()] if keep is not None and tensor.shape[:2] == keep.shape else tensor


def reference(model: Any, inputs: Inputs) -> dict[str, Tensor] | None:
    """The results of eager in fp64, or None where the model does not run in it."""
    double = copy.deepcopy(on(model, "eager")).double()
    try:
        with InDouble():
            return results(double, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    except Exception:
        return None


class InDouble(TorchFunctionMode):
    """Takes fp64 wherever a model asks for fp32, as rotations, norms and softmaxes do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def generate(model: Any, inputs: Inputs, outcome: Outcome) -> None:
    """Greedy tokens: those of eager, or of sdpa where eager lets padding leak."""
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0
    try:
        want = greedy(on(model, "eager"), inputs)
    except Exception as error:
        outcome.notes.append(f"eager does not generate: {_line(error)}")
        return
    try:
        got = greedy(on(model, "qkv"), inputs)
    except Exception as error:
        raise DisagreementError(f"generate: {_line(error)}") from error
    if not _equal(got, want):
        if not model._supports_sdpa or not _equal(got, greedy(on(model, "sdpa"), inputs)):
            raise DisagreementError("generated tokens differ")
        outcome.notes.append("tokens are those of sdpa, not of eager")
    outcome.checks.append("generate")


def greedy(model: Any, inputs: Inputs) -> Any:
    torch.manual_seed(2)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


def on(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    return model


class Counted:
    """The calls of our attention function, within."""

    def __enter__(self) -> "Counted":
        self.batches: list[int] = []
        self.patch = mock.patch.dict(AttentionInterface._global_mapping, {integration.NAME: self.attend})
        self.patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.patch.stop()

    def __bool__(self) -> bool:
        return len(self.batches) > 0

    def attend(self, module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        self.batches.append(len(key))
        return integration.attend(module, query, key, *args, **options)


def tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating-point results of a model with their names; no caches, and no weights, which eager alone returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            if not any(word in key for word in ("past_key_values", "cache", "attentions")):
                yield from tensors(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for place, value in enumerate(output):
            yield from tensors(value, f"{name}.{place}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(a[name], b[name]) for name in a if isinstance(a[name], Tensor))
    return torch.equal(a, b)


def _error(a: Tensor, b: Tensor) -> float:
    """Root of the mean square, in which a peer's luck with one number shows less than in the largest."""
    return (a - b).square().mean().sqrt().item() if a.shape == b.shape else math.inf


def _scales(results: dict[str, Tensor]) -> dict[str, float]:
    """The size of the numbers that each result was made of: its own, or that of the largest gradient."""
    sizes = {name: tensor.square().mean().sqrt().item() for name, tensor in results.items()}
    largest = max((size for name, size in sizes.items() if name.startswith("gradient")), default=0.0)
    return {name: largest if name.startswith("gradient") else size for name, size in sizes.items()}


def _near(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two precisions ran the same computation: no other random numbers, no other choice of experts."""
    return all(_error(a[name], b[name]) <= 1e-3 * size for name, size in _scales(b).items())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
