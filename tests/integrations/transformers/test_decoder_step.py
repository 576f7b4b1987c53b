"""Decoder layers of transformers over few tokens as one call of the kernel: the bits of their parts, whatever family;
and the calls that are composed of them, since something watches, changes or gives back a part.
"""

import copy
import functools
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from integrations.transformers.one_line import model
from integrations.transformers.test_attention_step import (
    IDS,
    KINDS,
    WATCHED,
    composed,
    decoded,
    double,
    forward_of,
    twice,
)
from integrations.transformers.test_norms_and_mlps import LINEAR_CHANGES, MLP_CHANGES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.activations import SiLUActivation
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.utils import output_capturing
from transformers.utils.deprecation import deprecate_kwarg

import qkv
from qkv import kernels
from qkv.integrations.transformers.cache_argument import wrapped
from qkv.integrations.transformers.steps import decoder_parts, decoder_step
from qkv.integrations.transformers.steps.decoder_forms import _form_of_code, form_of, without_checkpointing
from qkv.integrations.transformers.steps.decoder_parts import found_in
from qkv.layers.tree_state import ClassState

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),
]

OTHERS = ("granite", "granite_swa", "apertus")
"""Families whose layers compute something else: residuals with a factor, MLPs without a gate."""


def made(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    of = model(kind, **{**KINDS[kind], **options}).to(dtype)
    with torch.no_grad():
        for parameter in of.parameters():
            if parameter.dim() == 1:  # gains of norms, which begin as ones or zeros
                parameter.normal_(1, 0.3)
    return of.requires_grad_(False)


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of layers in one call so far. Other products are the kernel's, so that bits agree."""
    torch.manual_seed(0)
    torch.compiler.reset()
    tokens: list[int] = []
    run = decoder_step.run

    def counted(layers: Sequence[decoder_step.Layer], x: Tensor) -> tuple[int, Tensor]:
        written, out = run(layers, x)
        tokens.extend([x.shape[1]] * written)
        return written, out

    monkeypatch.setattr(decoder_step, "run", counted)
    monkeypatch.setattr(kernels, "is_faster", lambda x, weight: kernels.has_few_rows(x))
    monkeypatch.setattr(kernels, "gains_from_rows", lambda x: kernels.has_few_rows(x) and x.numel() <= 16 * x.shape[-1])
    monkeypatch.setattr(kernels, "gains_from_few_rows", lambda x, weight: x.numel() <= 16 * x.shape[-1])
    return tokens


@contextmanager
def in_parts() -> Iterator[None]:
    """Context manager in which attention, norms and MLPs are calls of their own."""
    run, decoder_step.run = decoder_step.run, lambda layers, x: (0, x)
    try:
        yield
    finally:
        decoder_step.run = run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_its_parts(kind: str, dtype: torch.dtype, layers: list[int]) -> None:
    ours = qkv.accelerate(made(kind, dtype))
    got = decoded(ours)
    assert bool(layers) == (kind not in OTHERS)
    if layers:  # of steps; a window moves for the chunk of 8
        assert [layers.count(length) for length in (1, 2, 3, 4)] == [8, 2, 2, 2] and layers.count(9) == 0
    with in_parts():
        assert torch.equal(decoded(ours), got)
    text = str(qkv.report(ours))
    assert ("2 layers" in text and "few tokens in one call of the kernel, norms and MLP too" in text) == bool(layers)


def test_layers_with_tables_and_masks_of_their_own(layers: list[int]) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    ours = qkv.accelerate(made("gemma3_text", num_hidden_layers=3, layer_types=types))
    ids = IDS[:, :4]  # fewer than the window, so that all layers have as many keys
    with torch.no_grad():
        logits = []
        for context in (nullcontext, in_parts):
            cache = ours(ids[:, :1], use_cache=True).past_key_values
            with context():
                logits.append([ours(part, past_key_values=cache).logits for part in ids[:, 1:].split(1, dim=1)])
    assert all(map(torch.equal, *logits)) and layers == [1] * 9


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(OTHERS)))
@torch.no_grad()
def test_what_is_remembered_is_what_is_found(kind: str) -> None:
    ours = qkv.accelerate(made(kind))
    ours(IDS[:, :3], use_cache=False)
    for layer in ours.model.layers:
        remembered, found = (
            tree_leaves(each) for each in (decoder_parts.remembered(layer, ClassState.is_current), found_in(layer))
        )
        assert len(remembered) == len(found) > 20
        for one, other in zip(remembered, found, strict=True):
            assert one.data_ptr() == other.data_ptr() if isinstance(one, Tensor) else one == other
    twin = copy.deepcopy(ours)
    assert not any(decoder_parts.remembered(layer, ClassState.is_current) for layer in twin.model.layers)


@torch.no_grad()
def test_without_a_cache_and_with_padding(layers: list[int]) -> None:
    ours = qkv.accelerate(made())
    keep = torch.ones(2, 8, dtype=torch.long)
    keep[0, :3] = 0
    for options in ({}, {"attention_mask": keep}):
        got = ours(IDS[:, :8], use_cache=False, **options).logits
        assert layers == [8, 8]
        with in_parts():
            assert torch.equal(ours(IDS[:, :8], use_cache=False, **options).logits, got)
        layers.clear()
    ours(IDS[:, :9], use_cache=False)  # 18 tokens
    assert not layers


@pytest.mark.parametrize("bias", [{"mlp_bias": True, "attention_bias": True}, {}], ids=["biases", "no biases"])
@torch.no_grad()
def test_tokens_of_one_row_and_biases(bias: dict[str, bool], layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1, **bias))
    for tokens in (1, 2, 15, 16):
        got = ours(IDS[:1, :tokens], use_cache=False).logits
        with in_parts():
            assert torch.equal(ours(IDS[:1, :tokens], use_cache=False).logits, got)
    assert layers == [1, 2, 15, 16]


def of(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of a part of a layer."""
    return lambda layer: change(getattr(layer, name))


def hidden(name: str) -> Callable[[Any], Any]:
    """An attribute of an instance that hides a part."""

    def change(layer: Any) -> None:
        part = getattr(layer, name)
        vars(layer)[name] = twice(part)

    return change


def negated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Doubled, all hidden states would have the same norm."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return -function(*args, **kwargs)

    return call


class Other(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return twice(self.part)(*args, **kwargs)


CHANGES: dict[str, Callable[[Any], Any]] = {
    **{
        f"a {kind} of {part}": of(part, change)
        for part in ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
        for kind, change in {
            "hook": lambda module: module.register_forward_hook(
                lambda _, args, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
            ),
            "forward": lambda module: setattr(module, "forward", twice(module.forward)),
            "subclass": lambda module: setattr(
                module, "__class__", type("Mine", (type(module),), {"forward": twice(type(module).forward)})
            ),
            "compiled call": lambda module: setattr(module, "_compiled_call_impl", twice(module._call_impl)),
        }.items()
    },
    **{
        f"{part} replaced": lambda layer, part=part: setattr(layer, part, Other(getattr(layer, part)))
        for part in ("mlp",)
    },
    **{f"{part} hidden by an attribute": hidden(part) for part in ("mlp", "self_attn", "input_layernorm")},
    "a pre-hook of mlp": of("mlp", lambda mlp: mlp.register_forward_pre_hook(lambda _, args: (2 * args[0],))),
    "another eps": of("input_layernorm", lambda norm: setattr(norm, "variance_epsilon", 0.5)),
    "gains hidden by an attribute": of("input_layernorm", lambda norm: vars(norm).update(weight=norm.weight * 2)),
    "a subclass of the layer": lambda layer: setattr(
        layer, "__class__", type("Mine", (type(layer),), {"forward": negated(type(layer).forward)})
    ),
    **{f"the MLP: {name}": of("mlp", change) for name, change in MLP_CHANGES.items() if name != "a forward of its own"},
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_is_watched_or_replaced_is_called(name: str, layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    before = ours(IDS[:, :3], use_cache=False).logits
    assert layers.pop() == 3
    CHANGES[name](ours.model.layers[0])
    got = ours(IDS[:, :3], use_cache=False).logits
    assert not layers and not torch.allclose(got, before)
    with in_parts():
        assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, got)


@pytest.mark.parametrize("name", sorted(LINEAR_CHANGES))
@torch.no_grad()
def test_modified_linear_layers_are_called(name: str, layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1, mlp_bias=True, intermediate_size=32))
    before = ours(IDS[:, :3], use_cache=False).logits
    assert layers.pop() == 3
    LINEAR_CHANGES[name](ours.model.layers[0].mlp)
    got = ours(IDS[:, :3], use_cache=False).logits
    assert len(layers) == name.endswith("no bias any more")
    assert not torch.allclose(got, before)
    with in_parts():
        assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, got)


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_watched_in_attention_is_called(name: str, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    with torch.no_grad():
        cache = ours(IDS[:, :9]).past_key_values
        ours(IDS[:, :1], past_key_values=cache)
    assert layers.pop() == 1
    with monkeypatch.context() as patch, torch.set_grad_enabled(name == "a gradient"):
        WATCHED[name](ours.model.layers[0].self_attn, cache, patch)
        ours(IDS[:, :1], past_key_values=cache)
    assert not layers


def of_class(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    kind, method = name.split(".")
    return lambda patch: patch.setattr(getattr(modeling_llama, kind), method, value)


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the forward of all layers": of_class(
        "LlamaDecoderLayer.forward", negated(modeling_llama.LlamaDecoderLayer.forward)
    ),
    "the forward of all MLPs": of_class("LlamaMLP.forward", twice(modeling_llama.LlamaMLP.forward)),
    "the forward of all norms": of_class("LlamaRMSNorm.forward", twice(modeling_llama.LlamaRMSNorm.forward)),
    "the forward of all activations": lambda patch: patch.setattr(SiLUActivation, "forward", lambda _, x: x),
    "calls of all modules": lambda patch: patch.setattr(nn.Module, "_call_impl", _calling(nn.Module._call_impl)),
    "the forward of all linear layers": lambda patch: patch.setattr(nn.Linear, "forward", twice(nn.Linear.forward)),
}


def _calling(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def calls(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        return 2 * out if isinstance(self, modeling_llama.LlamaMLP) else out

    return calls


@pytest.mark.parametrize("name", PATCHES)
@torch.no_grad()
def test_patches_of_classes_are_in_effect(name: str, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    before = ours(IDS[:, :3], use_cache=False).logits
    assert layers.pop() == 3
    PATCHES[name](monkeypatch)
    got = ours(IDS[:, :3], use_cache=False).logits
    assert not layers and not torch.allclose(got, before)


@torch.no_grad()
def test_a_forward_around_ours_is_called(layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    before, layer = ours(IDS[:, :3], use_cache=False).logits, ours.model.layers[0]
    layer.forward = negated(layer.forward)
    assert not torch.allclose(ours(IDS[:, :3], use_cache=False).logits, before) and layers == [3, 3]


@pytest.mark.parametrize("part", ["mlp", "input_layernorm", "self_attn"])
@torch.no_grad()
def test_a_part_that_is_given_back_is_called(part: str, layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    layer = ours.model.layers[0]
    qkv.accelerate(getattr(layer, part), enabled=False)
    ours(IDS[:, :3], use_cache=False)
    assert not layers
    qkv.accelerate(ours)
    ours(IDS[:, :3], use_cache=False)
    assert layers == [3]
    qkv.accelerate(layer, enabled=False)
    ours(IDS[:, :3], use_cache=False)
    assert layers == [3] and "forward" not in vars(layer)


@torch.no_grad()
def test_copies_pickles_and_the_way_back(layers: list[int]) -> None:
    theirs = made()
    ours = qkv.accelerate(copy.deepcopy(theirs))
    want, buffer = ours(IDS[:, :3], use_cache=False).logits, io.BytesIO()
    assert layers == [3, 3]
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        for parameter in ours.parameters():
            parameter.zero_()
        layers.clear()
        assert torch.equal(other(IDS[:, :3], use_cache=False).logits, want) and layers == [3, 3]
        ours.load_state_dict(other.state_dict())
    shallow = copy.copy(ours.model.layers[0])  # calls the original, as with every forward of an instance
    shallow._modules = {**shallow._modules, "mlp": Other(shallow.mlp)}
    layers.clear()
    qkv.accelerate(ours, enabled=False)
    assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, theirs(IDS[:, :3], use_cache=False).logits)
    assert not layers


def test_gradients_modes_and_training(layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    for parameter in ("mlp.up_proj.weight", "input_layernorm.weight", "self_attn.q_proj.weight"):
        weight = ours.model.layers[0].get_parameter(parameter).requires_grad_(True)
        ours(IDS[:, :3], use_cache=False).logits.sum().backward()
        assert not layers and weight.grad is not None and weight.grad.abs().max() > 0
        weight.requires_grad_(False)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            ours(IDS[:, :3], use_cache=False)
        ours.double()(IDS[:, :3], use_cache=False)
        assert not layers
        ours.float().train()
        ours(IDS[:, :3], use_cache=False)
        assert layers.pop() == 3  # nothing is dropped
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours(IDS[:, :3], use_cache=False)
        assert not layers


@torch.no_grad()
def test_dropouts_of_residuals(layers: list[int]) -> None:
    ours = qkv.accelerate(made("phi3", num_hidden_layers=1, resid_pdrop=0.5))
    before = ours(IDS[:, :3], use_cache=False).logits
    assert layers.pop() == 3
    dropout = ours.model.layers[0].resid_mlp_dropout
    for change in (lambda: dropout.train(), lambda: dropout.eval().register_forward_hook(double)):
        change()
        assert not torch.allclose(ours(IDS[:, :3], use_cache=False).logits, before) and not layers


@torch.no_grad()
def test_hidden_states_and_attentions(layers: list[int]) -> None:
    """Transformers leaves its hooks on layers and attention modules, which do nothing in other calls."""
    ours = qkv.accelerate(made())
    want = ours(IDS[:, :3], use_cache=False).logits
    out = ours(IDS[:, :3], use_cache=False, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.logits, want)
    with composed(), in_parts():
        parts = ours(IDS[:, :3], use_cache=False, output_hidden_states=True)
    assert all(map(torch.equal, out.hidden_states, parts.hidden_states))
    layers.clear()
    for _ in range(2):
        assert ours(IDS[:, :3], use_cache=False, output_attentions=True).attentions[1].shape == (2, 4, 3, 3)
        assert not layers
    assert ours.model.layers[0].self_attn._forward_hooks
    assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, want) and layers == [3, 3]
    ours.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, want) and layers == [3, 3, 3]
    layer, x = ours.model.layers[1], torch.randn(1, 2, 32)
    rotary = ours.model.rotary_emb(x, torch.arange(2)[None])
    token = output_capturing._active_collector.set({"attentions": []})
    layer(x, position_embeddings=rotary)
    assert layers == [3, 3, 3]
    output_capturing._active_collector.reset(token)
    layer(x, position_embeddings=rotary)
    assert layers == [3, 3, 3, 2]


@torch.no_grad()
def test_caches_of_transformers_and_arguments_by_position(layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    ours(IDS[:, :3], past_key_values=DynamicCache())
    layer, x = ours.model.layers[0], torch.randn(1, 2, 32)
    rotary = ours.model.rotary_emb(x, torch.arange(2)[None])
    want = layer(x, position_embeddings=rotary)
    assert layers.pop() == 2 and not layers
    assert torch.allclose(layer(hidden_states=x, position_embeddings=rotary), want, atol=1e-5)
    assert torch.allclose(layer(x, None, position_embeddings=rotary), want, atol=1e-5)
    assert not layers
    x.requires_grad_(True)
    with torch.enable_grad():
        assert layer(x, position_embeddings=rotary).requires_grad and not layers
    with pytest.raises(TypeError):
        layer(position_embeddings=rotary)


def test_calls_are_counted_once(layers: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    with torch.no_grad():
        ours(IDS[:, :3], use_cache=False)
    report = qkv.report(ours)
    assert layers == [3] and report.routed == 1 and "qkv: one call of the kernel" in str(report)


FAMILIES = [
    *("arcee.Arcee", "gemma.Gemma", "gemma2.Gemma2", "gemma3.Gemma3", "llama.Llama", "ministral.Ministral"),
    *("mistral.Mistral", "phi3.Phi3", "qwen2.Qwen2", "qwen3.Qwen3", "smollm3.SmolLM3"),
]
STRANGERS = ["cohere.Cohere", "olmo2.Olmo2", "glm4.Glm4", "granite.Granite", "stablelm.StableLm"]
"""Attention and MLP side by side, norms after both, other names, factors, dropouts of another kind."""


def test_families_with_a_layer_that_is_known() -> None:
    """By the sources, which are not imported: that would take long."""
    known = [name for name in FAMILIES + STRANGERS if _form_of_code(forward_of(name, "DecoderLayer")) is not None]
    assert known == FAMILIES


@pytest.mark.parametrize("kind", [modeling_llama.LlamaDecoderLayer, modeling_gemma2.Gemma2DecoderLayer])
def test_a_layer_is_known_by_either_name_of_its_cache(kind: Any) -> None:
    """``past_key_values`` before transformers 5.24, ``cache`` since, within a wrapper that replaces the former name."""
    inner = wrapped(without_checkpointing(kind.forward))
    source = textwrap.dedent(inspect.getsource(inner))
    for name in ("cache", "past_key_values"):
        names = dict(vars(sys.modules[kind.__module__]))
        exec(re.sub(r"\b(past_key_values|cache)\b", name, source), names)
        found = form_of(deprecate_kwarg("former", "1000.0", new_name=name)(names["forward"]))
        assert found is not None and found == form_of(kind.forward)


def test_forwards_that_differ_are_not_known() -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    assert form_of(forward) is not None
    assert form_of(functools.partial(forward)) is None and form_of(nn.Linear.forward) is None
    assert form_of(modeling_llama.LlamaAttention.forward) is None
    code = wrapped(without_checkpointing(forward)).__code__
    for name, value in (("co_names", "mlp"), ("co_varnames", "position_embeddings")):
        constants = getattr(code, name)
        other = tuple("another" if each == value else each for each in constants)
        assert other != constants and _form_of_code(code.replace(**{name: other})) is None


def test_reports_say_which_layers_are_taken() -> None:
    """Layers of Arcee are arranged as Llama's, and their MLP has no gate."""
    for kind, taken in (("llama", True), ("arcee", False), ("granite", None)):
        ours = qkv.accelerate(model(kind))
        found = [part for part in qkv.report(ours).parts if part.subject == "decoders"]
        assert [part.taken for part in found] == ([] if taken is None else [taken])
        assert all(("forward" in vars(layer)) == bool(taken) for layer in ours.model.layers)
