"""Windows in some layers: the converted model, as stock transformers runs it, against its source with masks by hand."""

import json
from typing import NamedTuple

import pytest
import torch
from convert import models

from qkv.convert import CheckpointError, convert_checkpoint, convert_state_dict, inspect_checkpoint
from qkv.convert.families.registry import FAMILIES
from qkv.convert.families.windows import BY_LAYER, WHOLE
from qkv.integrations.transformers import register


class Case(NamedTuple):
    """A source, what it is given, and the windows and the type that it must have then."""

    family: str
    changes: dict
    window: int
    layers: list[int] | None
    windows: list[int | None]
    model_type: str


PLAIN = {"attention_bias": False}
NO_WINDOW = {"sliding_window": None}
CASES = [
    Case("llama", {**PLAIN, "num_key_value_heads": 2}, 4, [2, 0], [4, None, 4], "ministral"),
    Case("llama", {**PLAIN, "head_dim": 12, "hidden_act": "gelu"}, 3, None, [3, 3, 3], "ministral"),
    Case("mistral", NO_WINDOW, 4, [1, 2], [None, 4, 4], "ministral"),
    Case("mistral", NO_WINDOW, 4, None, [4, 4, 4], "mistral"),
    Case("mistral", {}, 3, None, [3, 3, 3], "mistral"),
    Case("ministral", {}, 3, [1, 2], [None, 3, 3], "ministral"),
    Case("ministral", {}, 5, [0], [5, None, 5], "ministral"),
    Case("qwen2", {}, 4, [0, 2], [4, None, 4], "qwen2"),
    Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        4,
        [1, 2],
        [None, 4, 4],
        "qwen2",
    ),
    Case("qwen3", {}, 4, [1], [None, 4, None], "qwen3"),
    Case("qwen3", {}, 2, None, [2, 2, 2], "qwen3"),
    Case("gemma2", {}, 5, [1], [5, 5, 5], "gemma2"),
    Case("gemma2", {}, 3, [0, 2], [3, None, 3], "gemma2"),
    Case("gemma3_text", {}, 3, [0, 2], [3, None, 3], "gemma3_text"),
    Case("smollm3", {"no_rope_layers": [1, 0, 1]}, 4, [1, 2], [None, 4, 4], "smollm3"),
    Case("phi3", {}, 4, None, [4, 4, 4], "phi3"),
    Case("starcoder2", {}, 4, [2, 1, 0], [4, 4, 4], "starcoder2"),
]
NAMES = [f"{case.family}-{case.window}-{case.layers}-{index}" for index, case in enumerate(CASES)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def with_masks(model, windows):
    """The model, whose attention modules get masks of our own: theirs, and no key further back than the window."""

    def hook(window):
        def narrow(module, args, kwargs):
            mask = kwargs["attention_mask"]
            queries, keys = mask.shape[-2:]
            back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            hidden = torch.zeros(queries, keys).masked_fill(back > window - 1, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": torch.minimum(mask, hidden)}

        return narrow

    model.set_attn_implementation("eager")
    for layer, window in zip(model.model.layers, windows, strict=True):
        if window is not None:
            layer.self_attn.register_forward_pre_hook(hook(window), with_kwargs=True)
    return model


def run_on(model, implementation):
    """The model with this attention, or eager instead of SDPA for a softcap, which releases refuse or leave out."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("eager" if softcap and implementation == "sdpa" else implementation)
    return model


def close(got, want):
    """Whether logits are the same up to rounding."""
    return torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def converted(request, tmp_path_factory):
    """A case, and the folders of its source and its result."""
    case, folder = request.param, tmp_path_factory.mktemp("windows")
    models.save(folder / "source", case.family, **case.changes)
    convert_checkpoint(folder / "source", folder / "out", window=case.window, layers=case.layers)
    return case, folder


with_attention = pytest.mark.parametrize("implementation", ["eager", "sdpa", "qkv"])


@with_attention
def test_logits_are_those_of_the_source_with_masks_by_hand(converted, implementation):
    case, folder = converted
    model = run_on(models.load(folder / "out"), implementation)
    assert (model.config.model_type, type(model).config_class.model_type) == (case.model_type, case.model_type)
    source = folder / "source"
    got = models.logits(model)
    assert close(got, models.logits(with_masks(models.load(source), case.windows)))
    # A window is neither longer nor shorter, in any layer. 11 of the 12 keys are all but the first of the last query.
    before = [layer.window for layer in inspect_checkpoint(source).layers]
    for layer, (old, window) in enumerate(zip(before, case.windows, strict=True)):
        for other in (11,) if window is None else (window - 1, window + 1):
            if other <= (old or other):
                windows = [*case.windows[:layer], other, *case.windows[layer + 1 :]]
                assert not close(got, models.logits(with_masks(models.load(source), windows)))


@with_attention
def test_cached_steps_and_generation_are_those_of_the_source(converted, implementation):
    """With padding on the left of one row."""
    case, folder = converted
    model = run_on(models.load(folder / "out"), implementation)
    expected = with_masks(models.load(folder / "source"), case.windows)
    ids = models.IDS.repeat(2, 1)
    ids[1, :3] = 0
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        want = expected(ids, attention_mask=mask).logits
        cache, start = None, 0
        for end in (6, 8, *range(9, 13)):
            step = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            assert close(step.logits[0], want[0, start:end])
            assert close(step.logits[1, max(3 - start, 0) :], want[1, max(3, start) : end])
            cache, start = step.past_key_values, end
        new = ids[:1]
        for _ in range(6):
            new = torch.cat([new, expected(new).logits[:, -1:].argmax(-1)], 1)
        generated = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, new)


def test_weights_and_all_other_files_are_copied_and_the_configuration_alone_changes(converted):
    case, folder = converted
    before, after = models.digest(folder / "source"), models.digest(folder / "out")
    assert {**before, "config.json": ""} == {**after, "config.json": ""}
    old, new = (json.loads((folder / name / "config.json").read_text()) for name in ("source", "out"))
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    switches = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    assert changed <= switches | ({"model_type", "architectures"} if case.model_type != case.family else set())
    assert [layer.window for layer in inspect_checkpoint(folder / "out").layers] == case.windows


def test_every_family_with_windows_is_tested():
    assert {case.family for case in CASES} == {*BY_LAYER, *WHOLE}
    # One window for all layers, or several that differ.
    assert {case.family for case in CASES if None in case.windows} == {*BY_LAYER}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {*BY_LAYER, *WHOLE}))
def test_other_families_are_refused_with_those_that_can(family):
    """Before anything else is read of the model."""
    with pytest.raises(CheckpointError) as refused:
        convert_state_dict({}, {"model_type": family}, window=4)
    assert str(refused.value) == (
        f"config: the configuration of a {family} model cannot express a window; those of llama, mistral, ministral, "
        "qwen2, qwen3, gemma2, gemma3_text, smollm3 can, by layer, and those of phi3, starcoder2 one for all layers."
    )


@pytest.mark.parametrize(
    ("family", "changes", "window", "layers", "message"),
    [
        ("phi3", {}, 4, [0, 1], "a phi3 model has one window for all layers. Give all of them; those of llama, "),
        ("llama", {}, 4, None, "gets windows as a ministral model, which has no biases; got attention_bias"),
        ("llama", {**PLAIN, "mlp_bias": True}, 4, [0], "which has no biases; got mlp_bias"),
        ("gemma3_text", {}, 5, [1], r"layer 1 has none. Give some of layers 0, 2"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}, 5, [1], r"layer 1 has none\.$"),
        ("gemma3_text", {"use_bidirectional_attention": True}, 2, [0, 2], "use_bidirectional_attention cannot be set"),
        ("gemma2", {}, 4, [1], "layers 0, 2 have one of 5 already, got 4 for others. .* or layers 0, 2 as well"),
        ("ministral", {}, 4, [0, 1], "layer 2 has one of 5 already, got 4 for others. .* or layer 2 as well"),
        ("mistral", {}, 6, None, "only be narrowed; layers 0-2 already have one of 5, got 6"),
        ("ministral", {}, 6, [0, 2], "only be narrowed; layer 2 already has one of 5, got 6"),
        (
            "qwen2",
            {},
            1,
            [0],
            r"window must be an integer, at least 2 \(the caches of transformers fail at 1, .* got 1",
        ),
        ("qwen2", {}, 0, [0], "window must be an integer, at least 2 .* got 0"),
        ("qwen2", {}, True, [0], "window must be an integer, at least 2 .* got True"),
        ("qwen2", {}, 4, [0, 3], r"must be one or more of 0 to 2, since the model has 3; got \[0, 3\]"),
        ("qwen2", {}, 4, [-1], r"must be one or more of 0 to 2, since the model has 3; got \[-1\]"),
        ("qwen2", {}, 4, [], r"must be one or more of 0 to 2, since the model has 3; got \[\]"),
        ("qwen2", {}, 4, [True], r"must be one or more of 0 to 2, .* got \[True\]"),
        ("qwen2", {}, 4, [1, 2, 1], "layers must differ; got layer 1 more than once"),
        ("qwen2", {}, None, [1], "layers belong to a window; got num_kv_heads=None, window=None, layers"),
        ("qwen2", {}, None, None, "needs num_kv_heads, window or both"),
    ],
)
def test_windows_that_are_refused(tmp_path, family, changes, window, layers, message):
    source = models.save(tmp_path / "source", family, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", window=window, layers=layers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "first"), [([0, 1, 2], 0), ([1, 2], 1), ([2], 2), ([0, 2], 2), ([0, 1], 3), ([0], 3)]
)
def test_qwen_has_windows_at_its_end_without_layer_types_too(tmp_path, layers, first):
    """As far as one number tells them, which is what transformers reads where the list is missing."""
    source = models.save(tmp_path / "source", "qwen2")
    convert_checkpoint(source, tmp_path / "out", window=4, layers=layers)
    file = tmp_path / "out" / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "layer_types"}
    file.write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "out").layers
    assert [layer.window for layer in found] == [4 if layer >= first else None for layer in range(3)]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_configuration_leaves_out_is_that_of_its_own_type(tmp_path, family):
    """A Ministral model has 8 KV heads and 131072 positions by default, and no default for the width of a head."""
    changes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    }
    source = models.save(tmp_path / "source", family, **(changes if family == "mistral" else changes | PLAIN))
    config = json.loads((source / "config.json").read_text())
    kept = {
        name: value for name, value in config.items() if name not in ("head_dim", "rope_parameters", "architectures")
    }
    if family == "llama":
        del kept["num_key_value_heads"], kept["max_position_embeddings"], kept["sliding_window"]
    (source / "config.json").write_text(json.dumps(kept))
    convert_checkpoint(source, tmp_path / "out", window=4, layers=[1])
    old, new = models.load(source), models.load(tmp_path / "out")
    assert (new.config.model_type, new.config.num_key_value_heads, new.config.head_dim) == ("ministral", 4, 16)
    assert new.config.max_position_embeddings == 2048
    assert close(models.logits(new), models.logits(with_masks(old, [None, 4, None])))


def test_a_mistral_file_with_layer_types_is_read_as_transformers_reads_it(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    source = models.save(tmp_path / "source", "mistral")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"layer_types": kinds}))
    for out, layers, windows in (("some", [0, 1], [3, 3, None]), ("all", None, [3, 3, 3])):
        convert_checkpoint(source, tmp_path / out, window=3, layers=layers)
        want = models.logits(with_masks(models.load(source), windows))
        assert close(models.logits(models.load(tmp_path / out)), want)


def test_scaled_rotary_embedding_stays(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "original_max_position_embeddings": 8, "rope_theta": 500.0}
    source = models.save(tmp_path / "source", "llama", **PLAIN, rope_parameters=rope)
    config = json.loads((source / "config.json").read_text())
    # As older files have it.
    old = {name: value for name, value in config.items() if name != "rope_parameters"}
    theta = rope.pop("rope_theta")
    (source / "config.json").write_text(json.dumps(old | {"rope_theta": theta, "rope_scaling": rope}))
    convert_checkpoint(source, tmp_path / "out", window=4, layers=[1])
    want = models.logits(with_masks(models.load(source), [None, 4, None]))
    assert close(models.logits(models.load(tmp_path / "out")), want)
    plain = models.build("llama", **PLAIN)
    assert not close(models.logits(with_masks(plain, [None, 4, None])), want)


def test_fewer_heads_and_windows_in_one_run_are_those_of_two(tmp_path):
    source = models.save(tmp_path / "source", "llama", **PLAIN, shards="60KB")
    convert_checkpoint(source, tmp_path / "grouped", 2)
    convert_checkpoint(tmp_path / "grouped", tmp_path / "two", window=4, layers=[0])
    convert_checkpoint(source, tmp_path / "one", 2, window=4, layers=[0])
    assert models.digest(tmp_path / "one") == models.digest(tmp_path / "two")
    found = inspect_checkpoint(tmp_path / "one")
    assert [(layer.num_kv_heads, layer.window) for layer in found.layers] == [(2, 4), (2, None), (2, None)]


def test_a_result_is_narrowed_again(tmp_path):
    source = models.save(tmp_path / "source", "llama", **PLAIN)
    convert_checkpoint(source, tmp_path / "four", window=4, layers=[0, 2])
    convert_checkpoint(tmp_path / "four", tmp_path / "three", window=3, layers=[0, 2])
    convert_checkpoint(source, tmp_path / "once", window=3, layers=[0, 2])
    assert models.digest(tmp_path / "three") == models.digest(tmp_path / "once")


def test_state_dict_converts_like_a_folder(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = models.build("llama", **PLAIN)
    result = convert_state_dict(model.state_dict(), model.config.to_dict(), window=4, layers=[1])
    loaded = AutoModelForCausalLM.from_config(AutoConfig.for_model(**result.config)).eval()
    loaded.load_state_dict(result.state_dict)
    assert close(models.logits(loaded), models.logits(with_masks(model, [None, 4, None])))


@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_other_heads_keep_theirs(tmp_path, head):
    import transformers

    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = getattr(transformers, f"Llama{head}")(transformers.LlamaConfig(**sizes, pad_token_id=0))
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", window=2)
    cls = getattr(transformers, f"Ministral{head}")
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.architectures == [f"Ministral{head}"]


@pytest.mark.parametrize("version", [{"transformers_version": "4.40.0"}, {}])
def test_tokenizer_of_an_older_llama_is_not_taken_for_one_that_needs_mending(tmp_path, version):
    """Transformers says so of large tokenizers of Mistral's types from before version 5."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source, out = models.save(tmp_path / "source", "llama", **PLAIN), tmp_path / "out"
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(100_001)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    del config["transformers_version"]
    (source / "config.json").write_text(json.dumps(config | version))
    convert_checkpoint(source, out, window=4)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert type(before) is type(after)
    assert before("w3 w100000 w7").input_ids == after("w3 w100000 w7").input_ids == [3, 100_000, 7]
    assert not hasattr(after._tokenizer, "fix_mistral_regex")
    converted = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(converted | {"transformers_version": "4.40.0"}))
    assert hasattr(AutoTokenizer.from_pretrained(out)._tokenizer, "fix_mistral_regex")


def test_layers_pass_their_window_on_to_attention_that_makes_its_own_masks(converted):
    """Such as FlashAttention."""
    from transformers import AttentionInterface

    case, folder = converted
    seen = []

    def attend(module, query, key, value, mask, **options):
        seen.append(options.get("sliding_window"))
        return query.transpose(1, 2), None

    AttentionInterface.register("records_windows", attend)
    model = models.load(folder / "out")
    model.set_attn_implementation("records_windows")
    models.logits(model)
    assert seen == case.windows
