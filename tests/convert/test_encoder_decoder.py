"""T5, BART and their kin: converted decoders against transformers' own models with shared keys and values."""

import json
import pickle
import re

import pytest
import torch
import transformers
from convert import models

from qkv.cli import main
from qkv.convert import CheckpointError, convert_checkpoint, convert_state_dict, inspect_checkpoint
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.integrations.transformers import grouped_decoders

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

HEADS = 8
SIZES = {"vocab_size": 40, "d_model": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
LAYERS = {"encoder_layers": 3, "decoder_layers": 2}
T5 = {**SIZES, "num_heads": HEADS, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
BART = {
    **(SIZES | LAYERS),
    # Another number than the decoder has, which is what is converted.
    "encoder_attention_heads": 4,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
MODELS = {
    "t5": ("t5", T5),
    "t5 of version 1.1": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", T5),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", BART),
    "marian": ("marian", {**BART, "decoder_vocab_size": 40}),
}
READ = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(1))
WRITTEN = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
PROJECTION = re.compile(r".*decoder\..*(?:SelfAttention|EncDecAttention|self_attn|encoder_attn)\.[kv](?:_proj)?\.\w+")
"""Names of the pooled projections."""


@pytest.fixture(autouse=True, scope="module")
def registered():
    grouped_decoders.register()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def build(name, **changes):
    """A random model of transformers' whose attention is far from uniform, and whose norms and biases are in use."""
    model_type, sizes = MODELS[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **sizes | changes)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # Sinusoidal positions are not trained, and some models do not save them.
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model


def save(folder, name, **changes):
    build(name, **changes).save_pretrained(folder)
    return folder


def load(folder, **options):
    """The model as loaded by transformers, which must find each tensor and no others."""
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def shared(weight, groups, how="mean"):
    """The rows of all heads, where those of a group have the same, spelled out by hand."""
    parts = weight.unflatten(0, (groups, HEADS // groups, -1))
    one = parts.mean(1, keepdim=True) if how == "mean" else parts[:, :1]
    return one.expand_as(parts).flatten(0, 2)


def share(model, groups, how="mean"):
    """The transformers model with all heads, those of a group being equal."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if PROJECTION.fullmatch(key):
                parameter.copy_(shared(parameter, groups, how))
    return model


def keep(side):
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, :4], mask[2, :9] = 0, 0
    return mask if side == "left" else mask.flip(1)


def logits(model, side="left"):
    with torch.no_grad():
        return model(input_ids=READ, attention_mask=keep(side), decoder_input_ids=WRITTEN).logits


@pytest.fixture
def pair(tmp_path, name):
    """The converted model, and transformers' own that must compute the same."""
    convert_checkpoint(save(tmp_path / "source", name), tmp_path / "out", 2)
    return load(tmp_path / "out"), share(build(name), 2)


def test_logits_are_those_of_shared_heads(pair, name):
    ours, theirs = pair
    assert ours.config._attn_implementation == "qkv"
    precise, apart = share(build(name), 2).double(), build(name)
    for side in ("left", "right"):
        got, want = logits(ours, side), logits(theirs, side)
        # Either is as far from the truth as fp32 takes it, so that twice that may lie between them.
        allowed = 2 * (logits(precise, side) - want).abs().max()
        assert (got - want).abs().max() <= allowed
        assert (logits(apart, side) - want).abs().max() > 1000 * allowed


@pytest.mark.parametrize(("name", "dropout"), [("t5", "dropout_rate"), ("bart", "dropout")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_shared_heads(tmp_path, name, dropout, checkpointing):
    convert_checkpoint(save(tmp_path / "source", name, **{dropout: 0.0}), tmp_path / "out", 2)
    ours, theirs = load(tmp_path / "out").train(), share(build(name), 2)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    for model in (ours, theirs):
        model(input_ids=READ, attention_mask=keep("left"), labels=WRITTEN).loss.backward()
    want = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    # Those of biases of keys are 0 but for rounding, which is that of the others.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in want.values())
    for key, parameter in ours.named_parameters():
        if PROJECTION.fullmatch(key):  # Each row of ours stands for those of its group.
            want[key] = want[key].unflatten(0, (2, HEADS // 2, -1)).sum(1).flatten(0, 1)
        if key in want:
            torch.testing.assert_close(parameter.grad, want[key], rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generated_tokens_are_those_of_shared_heads(pair, side):
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        tokens = [
            model.generate(READ, attention_mask=keep(side), max_new_tokens=20, min_new_tokens=20, **options)
            for model in pair
        ]
        assert tokens[0].shape[1] == 21
        assert torch.equal(*tokens), options


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
def test_static_cache_has_fewer_heads(pair):
    options = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    ours, theirs = (model.generate(READ, max_new_tokens=9, min_new_tokens=9, **options) for model in pair)
    assert torch.equal(ours.sequences, theirs.sequences)
    for cache in ("self_attention_cache", "cross_attention_cache"):
        layers = [getattr(out.past_key_values, cache).layers for out in (ours, theirs)]
        # T5's has a layer too many, since transformers counts those of the encoder.
        heads = [[layer.keys.shape[1] for layer in cached if layer.is_initialized] for cached in layers]
        assert heads == [[2, 2], [HEADS, HEADS]]


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
def test_attention_weights_are_those_of_shared_heads(pair):
    inputs = {"input_ids": READ, "attention_mask": keep("left"), "decoder_input_ids": WRITTEN}
    ours, theirs = (model(**inputs, output_attentions=True) for model in pair)
    for kind in ("decoder_attentions", "cross_attentions"):
        for got, want in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
def test_attention_implementations(pair):
    ours = pair[0]
    got = logits(ours)
    ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(ours), got, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r'Grouped\w+: attn_implementation="eager" does not support .* use \'qkv\''):
        ours.set_attn_implementation("eager")


def test_attention_dropout(tmp_path):
    convert_checkpoint(save(tmp_path / "source", "bart", dropout=0.0, attention_dropout=0.5), tmp_path / "out", 2)
    model = load(tmp_path / "out")
    still = logits(model)
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    assert not torch.allclose(first, second, atol=1e-2)
    assert not torch.allclose(first, still, atol=1e-2)


def test_converting_to_all_heads_keeps_the_model(tmp_path, name):
    source = save(tmp_path / "source", name)
    convert_checkpoint(source, tmp_path / "out", HEADS)
    before, after = load(source), load(tmp_path / "out")
    assert type(before) is type(after)
    assert all(torch.equal(after.state_dict()[key], value) for key, value in before.state_dict().items())
    assert torch.equal(logits(after), logits(before))
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
@pytest.mark.parametrize("how", ["mean", "first"])
def test_only_keys_and_values_of_the_decoder_change(name, how):
    model = build(name)
    converted = convert_state_dict(model.state_dict(), model.config.to_dict(), 4, how=how).state_dict
    changed = 0
    for key, weight in model.state_dict().items():
        if PROJECTION.fullmatch(key):
            changed += 1
            weight = shared(weight, 4, how).unflatten(0, (4, HEADS // 4, -1))[:, 0].flatten(0, 1)
        assert torch.equal(converted[key], weight), key
    assert changed == 2 * 2 * 2 * (1 if name == "t5" else 2)


@pytest.mark.parametrize("name", ["t5", "bart"], indirect=True)
def test_pooling_in_steps_equals_pooling_at_once(tmp_path, name):
    source = save(tmp_path / "8", name)
    convert_checkpoint(source, tmp_path / "4", 4)
    convert_checkpoint(tmp_path / "4", tmp_path / "4 to 2", 2)
    convert_checkpoint(source, tmp_path / "2", 2)
    assert models.digest(tmp_path / "4 to 2") == models.digest(tmp_path / "2")
    convert_checkpoint(tmp_path / "2", tmp_path / "1", 1)
    assert torch.isfinite(logits(load(tmp_path / "1"))).all()


def test_base_models_without_a_head(tmp_path):
    for name, architecture in (("t5", "GroupedT5Model"), ("bart", "GroupedBartModel")):
        build(name).base_model.save_pretrained(tmp_path / name)
        if name == "t5":  # T5ForConditionalGeneration does not wrap T5Model.
            transformers.T5Model(build(name).config).save_pretrained(tmp_path / name)
        convert_checkpoint(tmp_path / name, tmp_path / f"{name} out", 2)
        model = transformers.AutoModel.from_pretrained(tmp_path / f"{name} out")
        assert type(model).__name__ == architecture
        assert model(input_ids=READ, decoder_input_ids=WRITTEN).last_hidden_state.shape == (3, 7, 64)


def test_saving_and_loading_keeps_the_model(tmp_path, name):
    convert_checkpoint(save(tmp_path / "source", name), tmp_path / "out", 2)
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert json.loads((tmp_path / "again/config.json").read_text())["num_key_value_heads"] == 2
    convert_checkpoint(tmp_path / "again", tmp_path / "smaller", 1)


def test_sinusoidal_positions_need_not_be_saved(tmp_path):
    import safetensors.torch as torch_files

    weights = save(tmp_path / "source", "pegasus") / "model.safetensors"
    kept = {key: value for key, value in torch_files.load_file(weights).items() if "embed_positions" not in key}
    torch_files.save_file(kept, weights, {"format": "pt"})
    convert_checkpoint(tmp_path / "source", tmp_path / "out", 2)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), logits(share(build("pegasus"), 2)), rtol=1e-4, atol=1e-4)


def test_pickles_find_our_classes(tmp_path):
    convert_checkpoint(save(tmp_path / "source", "t5"), tmp_path / "out", 2)
    model = load(tmp_path / "out")
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is grouped_decoders.GroupedT5ForConditionalGeneration
    assert torch.equal(logits(copy), logits(model))
    with pytest.raises(AttributeError, match="has no attribute 'GroupedGPT'"):
        grouped_decoders.GroupedGPT  # noqa: B018


def test_tokenizer_is_found_by_model_type():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    ours, theirs = (type(transformers.AutoConfig.for_model(model_type)) for model_type in ("qkv_t5", "t5"))
    assert TOKENIZER_MAPPING[ours] is TOKENIZER_MAPPING[theirs]


def test_the_result_needs_register(tmp_path, monkeypatch):
    convert_checkpoint(save(tmp_path / "source", "t5"), tmp_path / "out", 2)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {})  # Where register puts our types.
    with pytest.raises(ValueError, match="model type `qkv_t5` but Transformers does not recognize"):
        load(tmp_path / "out")


def test_inspection(tmp_path, name):
    convert_checkpoint(save(tmp_path / "source", name), tmp_path / "out", 2)
    for folder, num_kv_heads in (("source", HEADS), ("out", 2)):
        model, found = load(tmp_path / folder), inspect_checkpoint(tmp_path / folder)
        assert [(layer.num_heads, layer.num_kv_heads, layer.cross) for layer in found.layers] == [
            *[(HEADS, num_kv_heads, False)] * 2,
            *[(HEADS, num_kv_heads, True)] * 2,
        ]
        encoder = HEADS if "t5" in name else 4
        assert [(layer.num_heads, layer.num_kv_heads) for layer in found.encoder] == [(encoder, encoder)] * 3
        attention = re.compile(r".*(SelfAttention|EncDecAttention|self_attn|encoder_attn)\.(?!relative).+")
        numbers = [parameter.numel() for key, parameter in model.named_parameters() if attention.fullmatch(key)]
        assert found.attention_parameters == sum(numbers)
        predicted = inspect_checkpoint(tmp_path / "source").with_kv_heads(num_kv_heads)
        assert (predicted.layers, predicted.parameters) == (found.layers, found.parameters)
        assert found.possible_kv_heads == [n for n in (8, 4, 2, 1) if n <= num_kv_heads]


def test_heads_are_pooled_by_their_mean_unless_another_method_is_chosen(capsys, tmp_path):
    source = save(tmp_path / "source", "t5")
    weights = {}
    for out, options in (("default", []), ("mean", ["--pool", "mean"]), ("first", ["--pool", "first"])):
        assert main(["convert", str(source), str(tmp_path / out), "--kv-heads", "2", *options]) == 0
        method = options[-1] if options else "mean"
        assert f"\n  heads pooled: {method}\n" in capsys.readouterr().out
        weights[out] = (tmp_path / out / "model.safetensors").read_bytes()
    assert weights["default"] == weights["mean"] != weights["first"]
    assert main(["convert", str(source), str(tmp_path / "out"), "--kv-heads", "2", "--pool", "aligned"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "heads of t5 models cannot be aligned" in said and "Choose another method: mean, first or random." in said


def test_commands(capsys, tmp_path):
    source = save(tmp_path / "source", "bart")
    (source / "tokenizer.json").write_text("{}")
    assert main(["convert", str(source), str(tmp_path / "out"), "--kv-heads", "2", "--pool", "first"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " multi-head attention: 8 query heads, 8 KV heads, head width 8, no window, biases" in out
    assert " becomes grouped-query attention: 8 query heads, 2 KV heads, head width 8" in out
    assert " 16 of " in out
    assert "predictions not compared: only causal language models are compared" in out
    theirs = share(build("bart"), 2, "first")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(theirs), rtol=1e-4, atol=1e-4)
    assert main(["inspect", str(tmp_path / "out"), "--length", "100", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    out = " ".join(" ".join(lines).split())
    assert " 3 layers in the encoder of multi-head attention: 4 query heads, 4 KV heads, " in out
    assert " 2 layers in the decoder of grouped-query attention: 8 query heads, 2 KV heads, " in out
    assert " 2 layers in the decoder of grouped-query cross-attention: 8 query heads, 2 KV heads, " in out
    assert " KV cache of 1 sequence of 100 tokens (encoded and generated) in float32 " in out
    # 4 attentions * 2 heads * (8 + 8) numbers * 4 bytes = 512 bytes; with those of the decoder's own in int8, with two
    # scales of 4 bytes a head, 256 + 2 * 2 * (16 + 8) = 352.
    rows = [line.split()[-7:] for line in lines if line.endswith("100.0%")]
    assert rows == [["512", "B", "50.0", "KiB", "34.4", "KiB", "100.0%"]]


@pytest.mark.parametrize(
    ("name", "heads", "changes", "message"),
    [
        ("t5", 3, {}, r"num_kv_heads must divide the model's 8 KV heads \(8, 4, 2, 1\); got 3"),
        ("t5", 2, {"model_type": "qkv_t5", "num_key_value_heads": 3}, "must divide the 8 query heads .* got 3"),
        (
            "t5",
            2,
            {"model_type": "qkv_t5", "num_key_value_heads": 4},
            r"needs tensor .* of shape \[48, 64\]; got F32 \[96, 64\]",
        ),
        (
            "t5",
            2,
            {"model_type": "qkv_t5", "num_key_value_heads": "4"},
            "num_key_value_heads must be null or an integer >= 1; got '4'",
        ),
        ("t5", 2, {"num_decoder_layers": 3}, r"needs tensor 'decoder\.block\.2\."),
        ("t5", 2, {"num_decoder_layers": 10**9}, "num_decoder_layers must be an integer from 1 to "),
        (
            "t5",
            2,
            {"architectures": ["T5EncoderModel"]},
            "must be T5ForConditionalGeneration or T5Model with is_encoder_decoder=True",
        ),
        ("t5", 2, {"is_encoder_decoder": False}, "with is_encoder_decoder=False"),
        ("bart", 2, {"decoder_attention_heads": 16, "d_model": 32}, "needs tensor .*; got F32"),
        (
            "bart",
            2,
            {"architectures": ["BartForCausalLM"]},
            "must be BartForConditionalGeneration or BartModel .*; got 'BartFor",
        ),
    ],
)
def test_invalid_models_are_refused(tmp_path, name, heads, changes, message):
    source = save(tmp_path / "source", name)
    config = json.loads((source / "config.json").read_text()) | changes
    if "qkv" in config["model_type"]:
        config["architectures"] = ["GroupedT5ForConditionalGeneration"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", heads)
    if heads == 2:
        with pytest.raises(CheckpointError, match=message):
            inspect_checkpoint(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_alignment_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"heads of {name} models cannot be aligned"):
        convert_checkpoint(save(tmp_path / "source", name), tmp_path / "out", 2, how="aligned")


def test_a_window_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a t5 model cannot express a window"):
        convert_checkpoint(save(tmp_path / "source", "t5"), tmp_path / "out", 2, window=3)


def test_every_type_is_tested():
    types = {model_type for model_type, _ in MODELS.values()}
    assert types | {f"qkv_{model_type}" for model_type in types} == ENCODER_DECODERS.keys()
