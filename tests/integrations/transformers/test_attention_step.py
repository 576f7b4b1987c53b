"""Attention modules of transformers over few tokens as one call of the kernel: the function of their parts, whatever
family, cache and mask; and the calls that are composed of them, since something watches or changes a part.
"""

import copy
import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from budget import assert_within_budget
from integrations.transformers.one_line import model
from layers.test_projection import CHANGES
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import qkv
from qkv import QKVCache, kernels
from qkv.cache import Keys
from qkv.integrations.transformers.attention import attend
from qkv.integrations.transformers.cache import AppendLayer
from qkv.integrations.transformers.cache_argument import cache_name, wrapped
from qkv.integrations.transformers.steps import attention_step
from qkv.integrations.transformers.steps.attention_forms import _form_of_code, form_of
from qkv.integrations.transformers.steps.decoder_forms import _form_of_code as _form_of_layer
from qkv.kernels import Gain
from qkv.layers.normed_forward import norm_of

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),
]

IDS = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
CHUNKS = [9, 1, 3, 1, 8, 1, 2, 1, 4]
"""Those of 9 have more tokens than a step, with a batch of 2; a window of 5 moves several times."""

GROUPS = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 5, **GROUPS}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, **GROUPS},
    "mistral": WINDOW,
    "qwen2": GROUPS,
    "qwen3": {"head_dim": 12, **GROUPS},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": {"head_dim": 8, **WINDOW},
    "phi3": {"partial_rotary_factor": 0.5, **GROUPS},
    "smollm3": {"no_rope_layers": [0, 1], **GROUPS},
    "granite": {"attention_multiplier": 0.3, **GROUPS},
    "apertus": GROUPS,
    "granite_swa": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
SLIDING = {"mistral": 2, "gemma2": 1, "gemma3_text": 2, "granite_swa": 1}
"""Layers whose caches move their window for the chunk of 8, which makes no step."""


def made(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return model(kind, **{**KINDS[kind], **options}).to(dtype)


@torch.no_grad()
def decoded(of: Any, cache: Any = None, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Logits of tokens in chunks."""
    logits = []
    for part in ids.split(CHUNKS, dim=1):
        out = of(part, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def steps_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens for which caches have made room in steps so far."""
    tokens: list[int] = []
    claim = attention_step.Step.claim

    def counted(step: attention_step.Step, x: Tensor) -> Keys | None:
        keys = claim(step, x)
        if keys is not None:
            tokens.append(x.shape[1])
        return keys

    monkeypatch.setattr(attention_step.Step, "claim", counted)
    return tokens


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of steps so far. Products are the kernel's in steps and elsewhere, so that bits agree."""
    tokens = steps_seen(monkeypatch)
    monkeypatch.setattr(kernels, "is_faster", lambda x, weight: kernels.has_few_rows(x))
    return tokens


@contextmanager
def composed() -> Iterator[None]:
    """Context manager without steps."""
    most, attention_step.MAX_TOKENS = attention_step.MAX_TOKENS, 0
    try:
        yield
    finally:
        attention_step.MAX_TOKENS = most


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float16), *((kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16))],
    ids=str,
)
def test_it_computes_what_transformers_does(kind: str, dtype: torch.dtype, seen: list[int]) -> None:
    theirs = made(kind, dtype)
    theirs.set_attn_implementation("eager")
    peer, want = decoded(theirs), decoded(copy.deepcopy(theirs).double())
    ours = qkv.accelerate(theirs)
    got = decoded(ours)
    assert [seen.count(length) for length in (1, 2, 3, 4, 8)] == [8, 2, 2, 2, 2 - SLIDING.get(kind, 0)]
    assert_within_budget(got, want, peer, kind)
    with composed():
        assert torch.equal(decoded(ours), got)


@pytest.mark.parametrize("padded", [slice(0, 4), slice(8, 13)], ids=["left", "between"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@torch.no_grad()
def test_padded_rows(kind: str, padded: slice, seen: list[int]) -> None:
    is_token = torch.ones(IDS.shape, dtype=torch.long)
    is_token[0, padded] = 0
    positions = (is_token.cumsum(1) - 1).clamp(min=0)
    theirs = made(kind)  # not eager, whose softmax in fp32 makes NaN of the masks of fp64

    def rows(of: Any) -> Tensor:
        cache, logits, end = None, [], 0
        for tokens in CHUNKS:
            part, end = slice(end, end + tokens), end + tokens
            options = {"attention_mask": is_token[:, :end], "position_ids": positions[:, part], "use_cache": True}
            out = of(IDS[:, part], past_key_values=cache, **options)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, dim=1)[is_token.bool()]

    peer, want = rows(theirs), rows(copy.deepcopy(theirs).double())
    ours = qkv.accelerate(theirs)
    got = rows(ours)
    assert len(seen) == 16 - SLIDING.get(kind, 0)
    assert_within_budget(got, want, peer, kind)
    with composed():
        assert torch.equal(rows(ours), got)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_int8_has_the_bits_of_its_parts(kind: str, seen: list[int]) -> None:
    ours = qkv.accelerate(made(kind, torch.bfloat16))
    caches = [QKVCache(ours, dtype="int8") for _ in range(2)]
    got = decoded(ours, caches[0])
    assert len(seen) == 16 - SLIDING.get(kind, 0)
    with composed():
        assert torch.equal(decoded(ours, caches[1]), got)
    assert_same(*caches)


def assert_same(one: QKVCache, other: QKVCache) -> None:
    """Both caches have the same tokens, those in view and those that are stored."""
    for mine, its in zip(one.layers, other.layers, strict=True):
        assert mine.get_seq_length() == its.get_seq_length()
        for name in ("keys", "values"):
            pair = [getattr(layer, name) for layer in (mine, its)]
            assert torch.equal(*(tokens.materialize() if hasattr(tokens, "materialize") else tokens for tokens in pair))


def test_without_a_cache_it_is_the_module_on_few_tokens(seen: list[int]) -> None:
    for kind in ("llama", "mistral"):
        ours = qkv.accelerate(made(kind))
        with torch.no_grad():
            got = ours(IDS[:, :8], use_cache=False).logits
            with composed():
                assert torch.equal(ours(IDS[:, :8], use_cache=False).logits, got)
    assert seen == [8] * 4


REORDERED = torch.tensor([1, 1])
CACHE_CHANGES: dict[str, Callable[[QKVCache], Any]] = {
    "a crop": lambda cache: cache.crop(-2),
    "beams": lambda cache: cache.reorder_cache(REORDERED),
    "rows selected": lambda cache: cache.batch_select_indices(REORDERED),
    "a copy": copy.copy,
    "a deep copy": copy.deepcopy,
    "a pickle": lambda cache: torch.load(io.BytesIO(saved(cache)), weights_only=False),
    "a reset": lambda cache: cache.reset(),
    "keys of somebody's own": lambda cache: [setattr(layer, "keys", layer.keys * 2) for layer in cache.layers],
}


def saved(cache: QKVCache) -> bytes:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["append", "int8", "sliding", "sliding, int8"])
@pytest.mark.parametrize("name", CACHE_CHANGES)
@torch.no_grad()
def test_a_cache_in_any_state(name: str, kind: str, seen: list[int]) -> None:
    if name == "keys of somebody's own" and "int8" in kind:
        return  # views of codes, which nobody can set
    ours = qkv.accelerate(made("mistral", num_hidden_layers=1, sliding_window=5 if "sliding" in kind else None))
    caches, logits, first = [], [], 3 if name == "a crop" else 9  # a full window cannot be cropped
    for way in (nullcontext, composed):
        cache = QKVCache(ours, dtype="int8" if "int8" in kind else None)
        with way():
            ours(IDS[:, :first], past_key_values=cache)
            ours(IDS[:, first : first + 1], past_key_values=cache)
            with torch.inference_mode(name == "a crop"):
                changed = CACHE_CHANGES[name](cache)
            kept = changed if isinstance(changed, QKVCache) else cache
            logits.append(
                [ours(part, past_key_values=kept).logits for part in IDS[:, 12:].split([1, 1, 6, 1, 9], dim=1)]
            )
            logits[-1].append(ours(IDS[:, 12:13], past_key_values=cache).logits)  # beside a copy
        caches.append(kept)
    assert len(seen) >= 4
    assert all(map(torch.equal, *logits))
    assert_same(*caches)


@pytest.mark.parametrize("kind", ["append", "int8", "sliding", "sliding, int8"])
@pytest.mark.parametrize("fault", ["refused", "refused with its layer alone", "no memory"])
@torch.no_grad()
def test_after_a_fault_the_cache_is_as_before(fault: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = qkv.accelerate(made("mistral", num_hidden_layers=1, sliding_window=5 if "sliding" in kind else None))
    caches = [QKVCache(ours, dtype="int8" if "int8" in kind else None) for _ in range(2)]
    for cache in caches:
        ours(IDS[:, :9], past_key_values=cache)

    def fails(*call: object) -> int:
        if fault == "no memory":
            raise MemoryError
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "decoder_layers", fails)
        if fault != "refused with its layer alone":
            patch.setattr(kernels, "layer_step", fails)
        if fault == "no memory":
            with pytest.raises(MemoryError):
                ours(IDS[:, :2], past_key_values=caches[0])
            assert_same(*caches)
        else:
            got = ours(IDS[:, :2], past_key_values=caches[0]).logits
            assert torch.equal(got, ours(IDS[:, :2], past_key_values=caches[1]).logits)
            is_composed = "qkv: composed: the kernel refuses these tensors" in str(qkv.report(ours))
            assert is_composed == (fault == "refused")
    assert torch.equal(*(ours(IDS[:, 2:3], past_key_values=cache).logits for cache in caches))


def double(*call: Any) -> Any:
    return 2 * call[-1]


def in_class(kind: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A change of a class, for the time of a test."""
    return lambda module, cache, patch: patch.setattr(kind, name, method)


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose result, or all parts of it, are doubled."""

    @functools.wraps(function)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return tuple(None if x is None else 2 * x for x in out) if isinstance(out, tuple) else 2 * out

    return doubled


def attends_twice(*args: Any, **kwargs: Any) -> Any:
    out, weights = attend(*args, **kwargs)
    return 2 * out, weights


def a_local_function(module: Any, cache: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._local_mapping, "qkv", attends_twice)


def a_global_hook(module: Any, cache: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(torch_module._global_forward_hooks, 0, lambda of, args, out: 2 * out if of is module.o_proj else out)


WATCHED: dict[str, Callable[[Any, Any, pytest.MonkeyPatch], Any]] = {
    "a hook of q_proj": lambda module, *_: module.q_proj.register_forward_hook(double),
    "a hook before o_proj": lambda module, *_: module.o_proj.register_forward_pre_hook(lambda _, args: 2 * args[0]),
    "a hook of all modules": a_global_hook,
    "an adapter": lambda module, *_: setattr(module, "v_proj", nn.Sequential(module.v_proj, nn.Linear(16, 16))),
    "a subclass": lambda module, *_: setattr(module, "k_proj", type("Mine", (nn.Linear,), {})(32, 16)),
    "a forward of o_proj": lambda module, *_: setattr(module.o_proj, "forward", lambda x: 2 * x),
    "a projection hidden by an attribute": lambda module, *_: vars(module).__setitem__("q_proj", lambda x: 2 * x),
    "the forward of the class": in_class(
        modeling_llama.LlamaAttention, "forward", twice(modeling_llama.LlamaAttention.forward)
    ),
    "the rotation": in_class(modeling_llama, "apply_rotary_pos_emb", twice(modeling_llama.apply_rotary_pos_emb)),
    "the attention function": in_class(AttentionInterface, "_global_mapping", {"qkv": attends_twice}),
    "the attention function of a file": a_local_function,
    "another attention": lambda module, *_: setattr(module.config, "_attn_implementation", "sdpa"),
    "torch's product": in_class(F, "linear", twice(F.linear)),
    "an update of the cache": lambda module, cache, _: setattr(cache, "update", twice(cache.update)),
    "an update of its layer": lambda module, cache, _: setattr(
        cache.layers[0], "update", twice(cache.layers[0].update)
    ),
    "updates of all layers": in_class(AppendLayer, "update", twice(AppendLayer.update)),
    "updates of all caches": in_class(DynamicCache, "update", twice(DynamicCache.update)),
    "a scale that is no float": lambda module, *_: setattr(module, "scaling", 1),
    "dropout": lambda module, *_: (module.train(), setattr(module, "attention_dropout", 0.5)),
    "a gradient": lambda module, *_: module.v_proj.requires_grad_(True),
}


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_watched_or_replaced_is_called(name: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1)).requires_grad_(False)
    module = ours.model.layers[0].self_attn
    with torch.no_grad():
        cache = ours(IDS[:, :9]).past_key_values
        before = ours(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert seen.pop() == 1
    caches = [cache, copy.deepcopy(cache)]
    for way, each in zip((nullcontext, composed), caches, strict=True):
        with way(), monkeypatch.context() as patch, torch.set_grad_enabled(name == "a gradient"):
            undo = copy.copy(vars(module))
            torch.manual_seed(1)
            WATCHED[name](module, each, patch)
            after = ours(IDS[:, :1], past_key_values=each).logits
        assert not seen
        if name not in ("a gradient", "another attention", "a scale that is no float"):
            assert not torch.allclose(after, before)
        vars(module).update(undo)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_modified_projections_are_called(name: str, seen: list[int]) -> None:
    """All public ways to modify an ``nn.Linear``."""
    ours = qkv.accelerate(made(num_hidden_layers=1, num_key_value_heads=4))
    module = ours.model.layers[0].self_attn
    module.out_proj = module.o_proj  # its name in our layer
    nn.init.normal_(module.q_proj.bias)
    before = ours(IDS[:, :3], use_cache=False).logits
    assert seen.pop() == 3
    CHANGES[name](module)
    got = ours(IDS[:, :3], use_cache=False).logits
    assert len(seen) == (name == "no bias any more")
    with composed():
        assert torch.equal(ours(IDS[:, :3], use_cache=False).logits, got)
    assert not torch.allclose(got, before)


NORMS = {
    "a hook": lambda norm: norm.register_forward_hook(double),
    "its gain with a gradient": lambda norm: norm.weight.requires_grad_(True),
    "a gain of somebody's own": lambda norm: vars(norm).__setitem__("weight", norm.weight + 2),
    "another eps": lambda norm: setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.5),
    "another class": lambda norm: setattr(norm, "__class__", type("Mine", (type(norm),), {"forward": lambda _, x: -x})),
}


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_that_are_watched_or_replaced_are_called(name: str, kind: str, seen: list[int]) -> None:
    ours = qkv.accelerate(made(kind, num_hidden_layers=1)).requires_grad_(False)
    before = ours(IDS[:, :3], use_cache=False).logits
    assert seen.pop() == 3
    NORMS[name](ours.model.layers[0].self_attn.k_norm)
    got = ours(IDS[:, :3], use_cache=False).logits
    assert not seen
    assert name == "its gain with a gradient" or not torch.allclose(got, before)


def test_norms_of_other_codes_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = [modeling_qwen3.Qwen3RMSNorm(8), modeling_gemma3.Gemma3RMSNorm(8)]
    assert [norm_of(norm).gain for norm in norms] == [Gain.ROUNDED, Gain.ONE_MORE]  # type: ignore[union-attr]
    monkeypatch.setattr(modeling_gemma3.Gemma3RMSNorm, "_norm", lambda self, x: x)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", lambda self, x: x)
    assert [norm_of(norm) for norm in norms] == [None, None]


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


REASONS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "a cache of transformers": (
        "the cache is a DynamicCache",
        lambda of: {"past_key_values": filled(DynamicCache(), of)},
    ),
    "a static cache": (
        "the cache is a StaticCache",
        lambda of: {"past_key_values": filled(StaticCache(of.config, max_cache_len=20), of)},
    ),
    "a cache of somebody's own": (
        "the cache is a Mine",
        lambda of: {"past_key_values": filled(type("Mine", (QKVCache,), {})(of), of)},
    ),
    "an empty cache": ("the cache is empty, or moves its window", lambda of: {"past_key_values": QKVCache(of)}),
    "padding": (
        "one call of the kernel",
        lambda _: {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
    ),
    "a mask of numbers": (
        "the mask is not one that qkv made",
        lambda _: {"attention_mask": torch.zeros(2, 1, 3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -1e9)},
    ),
    "many tokens": ("hidden_states has not 1 to 16 tokens", lambda _: {"input_ids": IDS[:, :9]}),
    "a softcap": ("softcap is given", lambda _: {"softcap": 2.0}),
    "sink logits": ("s_aux is given", lambda _: {"s_aux": torch.ones(4)}),
    "a window": ("one call of the kernel", lambda _: {"sliding_window": 2}),
}


def filled(cache: Any, of: Any) -> Any:
    of(IDS[:, :5], past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", REASONS)
@torch.no_grad()
def test_calls_that_ask_for_more_are_composed(name: str, seen: list[int]) -> None:
    reason, options = REASONS[name]
    ours = qkv.accelerate(made(num_hidden_layers=1))
    given = options(ours)
    seen.clear()
    twins = [given, copy.deepcopy(given)]
    usual = {"input_ids": IDS[:, :3], "use_cache": "past_key_values" in given}
    got = ours(**{**usual, **twins[0]}).logits
    assert reason in str(qkv.report(ours))
    assert len(seen) == (name in ("a window", "padding"))
    with composed():
        assert torch.equal(ours(**{**usual, **twins[1]}).logits, got)


def test_modes_and_gradients_are_composed(seen: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    ours(IDS[:, :3], use_cache=False).logits.sum().backward()
    assert ours.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    ours.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ours(IDS[:, :3], use_cache=False)
    for mode in (FunctionMode(), DispatchMode()):
        with mode:
            ours(IDS[:, :3], use_cache=False)
    cache = ours(IDS[:, :9]).past_key_values  # a cache with gradients enabled
    ours(IDS[:, :3], past_key_values=cache)
    ours.double()(IDS[:, :3], use_cache=False)
    assert not seen
    found = str(qkv.report(ours))
    for reason in ("gradients, a transform", "torch.autocast", "a mode of torch", "gradients are enabled"):
        assert reason in found
    ours.float()(IDS[:, :3], use_cache=False)
    assert seen == [3]


def test_a_module_alone(seen: list[int]) -> None:
    """By position and by name, with tables of other dtypes, rows and widths."""
    ours = qkv.accelerate(made(num_hidden_layers=1)).requires_grad_(False)
    module, x = ours.model.layers[0].self_attn, torch.randn(2, 3, 32)
    form = form_of(type(module).forward)
    assert form is not None
    cos, sin = ours.model.rotary_emb(x, torch.tensor([[0, 1, 2], [5, 6, 7]]))
    with composed():
        want = module(x, (cos, sin), None)[0]
    assert torch.equal(module(x, (cos, sin), None)[0], want)
    assert torch.equal(module(hidden_states=x, position_embeddings=[cos, sin])[0], want)
    assert torch.equal(module(x.mT.contiguous().mT, (cos, sin), **{cache_name(): None})[0], want)
    assert torch.equal(module(x, (cos, sin), None, None)[0], want)
    assert seen == [3] * 4
    for tables in ((cos[:1], sin[:1]), (cos[:, :1], sin[:, :1])):
        got = module(x, tables, None)[0]
        with composed():
            assert torch.equal(module(x, tables, None)[0], got)
    assert seen == [3] * 6
    refused = [(cos[0], sin[0]), (cos, sin[..., :4]), (torch.cat([cos, cos], -1),) * 2, (cos,), None, cos]
    for tables in refused:
        given = {"hidden_states": x, "position_embeddings": tables}
        assert "cos and sin" in attention_step.step_of(module, form, given)  # type: ignore[operator]
    narrow = {"hidden_states": x, "position_embeddings": (cos[..., :4], sin[..., :4])}
    assert attention_step.step_of(module, form, narrow) == "the rotation is not the usual one"
    other = {"hidden_states": x, "position_embeddings": (cos.bfloat16(), sin.bfloat16())}
    assert attention_step.step_of(module, form, other) == "cos and sin have another dtype"
    torch.testing.assert_close(module(x, (cos.requires_grad_(), sin), None)[0], want)
    with pytest.raises(TypeError, match="positional argument"):
        module(x, (cos, sin), None, None, None)
    assert seen == [3] * 6


def test_calls_are_counted_once(seen: list[int]) -> None:
    ours = qkv.accelerate(made(num_hidden_layers=1))
    with torch.no_grad(), qkv.accelerate() as block:
        ours(IDS[:, :3], use_cache=False)
    assert seen == [3] and (block.routed, block.fallback) == (1, 0)
    assert "modeling_llama" in str(block) and "(2, 4, 3, 8)  (2, 2, 3, 8)" in str(block)
    assert qkv.report(ours).routed == 1
    qkv.accelerate(ours, enabled=False)
    with torch.no_grad():
        ours(IDS[:, :3], use_cache=False)
    assert seen == [3]


FAMILIES = [
    *("apertus.Apertus", "aria.AriaText", "cwm.Cwm", "dots1.Dots1", "gemma.Gemma", "gemma2.Gemma2", "gemma3.Gemma3"),
    *("granite.Granite", "granite_swa.GraniteSWA", "granitemoe.GraniteMoe", "jais2.Jais2", "llama.Llama"),
    *("ministral.Ministral", "mistral.Mistral", "mixtral.Mixtral", "nemotron.Nemotron", "phi3.Phi3", "qwen2.Qwen2"),
    *("qwen3.Qwen3", "qwen3_moe.Qwen3Moe", "qwen3_vl.Qwen3VLText", "smollm3.SmolLM3"),
]
MODELS = Path(transformers.__file__).parent / "models"
OTHERS = ["olmo2.Olmo2", "cohere2.Cohere2", "qwen3_next.Qwen3Next", "hunyuan_v1_dense.HunYuanDenseV1"]
"""Norms of all heads, rotation only in windows, gates, norms after the rotation."""


def test_families_with_a_forward_that_is_known() -> None:
    """By the sources, which are not imported: that would take long."""
    assert [name for name in FAMILIES + OTHERS if _form_of_code(forward_of(name))] == FAMILIES


def forward_of(name: str, suffix: str = "Attention") -> CodeType:
    folder, kind = name.split(".")
    path = MODELS / folder / f"modeling_{folder}.py"
    found = next(code for code in classes_in(path) if code.co_name == f"{kind}{suffix}")
    return next(code for code in codes_in(found) if code.co_name == "forward")


@functools.cache
def classes_in(path: Path) -> list[CodeType]:
    """Of a file of transformers, compiled and not run."""
    return codes_in(compile(path.read_text(), str(path), "exec", dont_inherit=True))


COUNTS = {"5.20.0": (62, 75), "5.23.0": (66, 80), "5.24.0": (68, 80)}
"""Classes of a release with a known forward, of attention and of decoder layers: as DESIGN.md has them."""


@pytest.mark.long
def test_as_many_classes_have_a_known_forward_as_are_claimed() -> None:
    forwards = [
        code
        for path in sorted(MODELS.glob("*/modeling_*.py"))
        for kind in classes_in(path)
        for code in codes_in(kind)
        if code.co_name == "forward"
    ]
    found = tuple(sum(form(code) is not None for code in forwards) for form in (_form_of_code, _form_of_layer))
    release = transformers.__version__
    assert found == COUNTS[release] if release in COUNTS else min(found) >= 62


def codes_in(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def test_forwards_that_differ_are_not_known() -> None:
    forward = modeling_llama.LlamaAttention.forward
    assert form_of(forward) is not None
    code = wrapped(forward).__code__
    assert form_of(functools.partial(forward)) is None and form_of(nn.Linear.forward) is None
    for name, value in (("co_names", "q_proj"), ("co_consts", -1)):
        constants = getattr(code, name)
        other = tuple("k_proj" if each == value else each for each in constants)
        assert other != constants
        assert _form_of_code(code.replace(**{name: other})) is None
