"""The cache that a model on "qkv" makes, whose choice it is, and what `register` does and `unregister` undoes."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from integrations.transformers.one_line import IDS, LEFT, STEPS, generated, model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import configuration_utils

import qkv
from qkv.integrations.transformers.cache import AppendLayer, Int8Layer, Int8SlidingLayer, SlidingLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    qkv.register(cache=True)
    yield
    qkv.register(cache=True)


@pytest.fixture
def ours() -> Any:
    found = model()
    found.set_attn_implementation("qkv")
    return found


def made(of: Any, **options: Any) -> Any:
    return generated(of, **options).past_key_values


CHOICES = {
    "nothing": ({}, qkv.QKVCache),
    "ours": ({"cache_implementation": "qkv"}, qkv.QKVCache),
    "theirs": ({"cache_implementation": "dynamic"}, DynamicCache),
    "a static one": ({"cache_implementation": "static"}, StaticCache),
    "none": ({"use_cache": False}, type(None)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_arguments_of_generate_choose(name: str, ours: Any) -> None:
    options, kind = CHOICES[name]
    got, want = generated(ours, **options), generated(model())
    assert type(got.get("past_key_values")) is kind and torch.equal(got.sequences, want.sequences)


def test_a_model_on_another_attention_gets_ours_if_asked_for() -> None:
    other = model()
    assert type(made(other)) is DynamicCache
    assert type(made(other, cache_implementation="qkv")) is qkv.QKVCache
    assert type(made(other)) is DynamicCache


def test_a_cache_that_is_handed_in_is_used_as_it_is(ours: Any) -> None:
    config = ours.config
    for cache in (DynamicCache(config=config), DynamicCache(), StaticCache(config=config, max_cache_len=30)):
        kind = type(cache)
        assert made(ours, past_key_values=cache) is cache and type(cache) is kind is not qkv.QKVCache
        assert cache.get_seq_length() == 8 + STEPS
    cache = DynamicCache(config=config)
    assert ours(IDS, past_key_values=cache).past_key_values is cache and type(cache.layers[0]) is not AppendLayer


@pytest.mark.parametrize("dtype", [torch.int8, "int8"])
def test_int8_by_default_and_by_call(dtype: Any, ours: Any) -> None:
    options = {"cache_implementation": "qkv", "cache_config": {"dtype": dtype}}
    assert type(made(ours, **options).layers[0]) is Int8Layer and type(made(ours).layers[0]) is AppendLayer
    assert type(qkv.QKVCache(ours, dtype=dtype).layers[0]) is Int8Layer
    windows = transformers.MistralConfig(num_hidden_layers=1, sliding_window=5)
    assert type(qkv.QKVCache(windows, dtype=dtype).layers[0]) is Int8SlidingLayer
    qkv.register(cache=dtype)
    assert type(made(ours).layers[0]) is type(ours(IDS).past_key_values.layers[0]) is Int8Layer
    assert type(made(model())) is DynamicCache
    qkv.register()  # keeps the choice
    assert type(made(ours).layers[0]) is Int8Layer
    assert "2 Int8Layer" in str(qkv.report(ours))


def test_no_cache_of_ours_by_default(ours: Any) -> None:
    qkv.register(cache=False)
    assert type(made(ours)) is DynamicCache and "register(cache=False)" in str(qkv.report(ours))
    assert type(made(ours, cache_implementation="qkv")) is qkv.QKVCache


def test_other_choices_are_refused(ours: Any) -> None:
    for cache in ("int4", torch.float16, 3):
        with pytest.raises(ValueError, match=r'cache must be True, False, torch.int8, "int8" or None; got'):
            qkv.register(cache=cache)
    with pytest.raises(ValueError, match=r'QKVCache: dtype must be torch.int8 or "int8", or None .* got \'int4\''):
        made(ours, cache_implementation="qkv", cache_config={"dtype": "int4"})
    with pytest.raises(ValueError, match=r"cache_config must be .* got also \{'nbits': 4\}"):
        made(ours, cache_implementation="qkv", cache_config={"nbits": 4})
    for wrong, got in ((nn.Linear(2, 2), "a Linear without one"), ("llama", "str")):
        with pytest.raises(TypeError, match=f"QKVCache: config must be the configuration .* got {got}"):
            qkv.QKVCache(wrong)
    assert type(made(ours)) is qkv.QKVCache


def test_unregister_leaves_transformers_as_it_was() -> None:
    def found() -> list[Any]:
        mappings = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
        prepare = GenerationMixin._prepare_cache_for_generation
        return [*mappings, DynamicCache.__init__, prepare, configuration_utils.ALL_CACHE_IMPLEMENTATIONS]

    qkv.unregister()
    before = found()
    assert not any("qkv" in part for part in (*before[:2], before[-1]))
    qkv.unregister()
    assert found() == before
    for _ in range(2):
        qkv.register(cache="int8")
    assert all(a != b for a, b in zip(found(), before, strict=True))
    qkv.unregister()
    assert found() == before
    with pytest.raises(ValueError, match="not supported"):
        model().set_attn_implementation("qkv")
    qkv.register()
    other = model()
    other.set_attn_implementation("qkv")
    assert type(made(other).layers[0]) is AppendLayer  # the choice is undone as well


def test_what_others_put_over_ours_stays_and_what_they_wrap_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    init, seen = DynamicCache.__init__, []

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        seen.append(type(args[0]))
        init(*args, **kwargs)

    monkeypatch.setattr(DynamicCache, "__init__", wrapped)
    names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    monkeypatch.setattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", (*names, "theirs"))
    of = qkv.accelerate(model())
    for _ in range(2):
        seen.clear()
        assert type(made(of)) is type(of(IDS).past_key_values) is qkv.QKVCache and len(seen) == 2
        assert type(DynamicCache(config=of.config)) is DynamicCache
        qkv.unregister()
        assert DynamicCache.__init__ is wrapped
        rest = tuple(name for name in names if name != "qkv")
        assert (*rest, "theirs") == configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        assert type(made(model())) is DynamicCache
        qkv.register()
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_a_model_on_qkv_says_by_name_that_it_is_not_registered(kind: str) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, num_hidden_layers=1)).eval()
    of, inputs = (vit, torch.zeros(1, 3, 8, 8)) if kind == "vit" else (model(kind), IDS)
    with torch.no_grad():
        want = of(inputs)[0]
        qkv.accelerate(of)
        qkv.unregister()
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r'"qkv": qkv must be registered; .* Call qkv\.register\(\), or take'
            ):
                of(inputs)
        assert "qkv" not in AttentionInterface().valid_keys()
        with pytest.raises(KeyError, match="another"):
            AttentionInterface()["another"]
        qkv.accelerate(of, enabled=False)
        assert torch.equal(of(inputs)[0], want)
        qkv.accelerate(of)  # registers it
        torch.testing.assert_close(of(inputs)[0], want, atol=1e-4, rtol=1e-4)


def test_from_config_alone_brings_the_cache() -> None:
    config = model().config
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="qkv").eval()
    assert type(made(other)) is type(other(IDS).past_key_values) is qkv.QKVCache


WAYS = {
    "beams": {"num_beams": 3, "attention_mask": LEFT},
    "prompt lookup": {"ids": IDS[:1], "prompt_lookup_num_tokens": 3},
    "a draft": {"ids": IDS[:1], "draft": True},
    "chunks": {"ids": IDS[:1], "prefill_chunk_size": 4},
}


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param(way, kind, marks=() if kind == "gemma3_text" else pytest.mark.long)
        for kind in ("llama", "gemma3_text")
        for way in WAYS
    ],
)
def test_ways_to_generate(way: str, kind: str) -> None:
    texts = []
    for implementation in ("sdpa", "qkv"):
        of, draft, options = model(kind), model(kind, num_hidden_layers=1), {**WAYS[way]}
        if options.pop("draft", False):
            options["assistant_model"] = draft
        for each in (of, draft):
            each.set_attn_implementation(implementation)
        ids = options.pop("ids", IDS)
        texts.append(of.generate(ids, max_new_tokens=STEPS, do_sample=False, **options))
    assert torch.equal(*texts)


def test_layers_without_an_equivalent_stay_transformers_own() -> None:
    scan = qkv.accelerate(model("mamba"))
    assert type(scan(IDS).cache_params) is DynamicCache
    assert "transformers' own, whose layers ours have no equivalent of: 2 LinearAttentionLayer" in str(qkv.report(scan))
    windows = qkv.accelerate(model("gemma3_text", layer_types=["sliding_attention", "full_attention"]))
    assert [type(layer) for layer in windows(IDS).past_key_values.layers] == [SlidingLayer, AppendLayer]


def test_a_configuration_may_ask_for_another_cache(ours: Any) -> None:
    ours.generation_config.cache_implementation = "static"
    assert type(made(ours)) is StaticCache
    assert "cache_implementation='static' in its generation_config" in str(qkv.report(ours))
