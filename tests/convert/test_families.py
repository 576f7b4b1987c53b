"""Each family, converted and loaded by transformers, against its source with shared keys and values."""

import json
import re

import pytest
import torch
from convert import models

from qkv.convert import CheckpointError, convert_checkpoint, convert_state_dict
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.convert.families.latent_decoder import LATENT_DECODERS
from qkv.convert.families.registry import FAMILIES

HEADS = 8
GROUPS = dict.fromkeys(models.FAMILIES, 2) | {"gpt2": 1, "gpt_bigcode": 1}


def share(model, family, groups, how):
    """Gives all heads of a group the same keys and values, in the projections of the source, spelled out by hand."""

    def shared(heads):
        parts = heads.unflatten(0, (groups, HEADS // groups))
        one = parts.mean(1, keepdim=True) if how == "mean" else parts[:, :1]
        return one.expand_as(parts).flatten(0, 1)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = parameter.T if re.search(r"c_attn\.weight", name) and family == "gpt2" else parameter
            if re.search(r"\.(k_proj|v_proj)\.", name):
                parameter.copy_(shared(rows.unflatten(0, (HEADS, -1))).flatten(0, 1))
            elif re.search(r"(qkv_proj|c_attn|query_key_value)\.", name):
                by_head = family in ("gpt_neox", "gpt_bigcode")
                split = rows.unflatten(0, (HEADS, 3, -1) if by_head else (3, HEADS, -1))
                q, k, v = split.unbind(1 if by_head else 0)
                packed = torch.stack([q, shared(k), shared(v)], 1 if by_head else 0).flatten(0, 2)
                parameter.copy_(packed.T if rows is not parameter else packed)


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_converted_model_computes_with_shared_heads(tmp_path, family, how):
    source = models.save(tmp_path / "source", family)
    convert_checkpoint(source, tmp_path / "out", GROUPS[family], how=how)
    expected = models.build(family)
    untouched = models.logits(expected)
    share(expected, family, GROUPS[family], how)
    got, want = models.logits(models.load(tmp_path / "out")), models.logits(expected)
    # Either is as far from the truth as fp32 takes it, so that twice that may lie between them.
    allowed = 2 * (models.logits(expected.double()) - want).abs().max()
    assert (got - want).abs().max() <= allowed
    assert (untouched - want).abs().max() > 1000 * allowed


def test_every_family_is_tested():
    assert models.FAMILIES.keys() | ENCODER_DECODERS.keys() | LATENT_DECODERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", sorted(models.FAMILIES.keys() - {"gpt2", "gpt_neox"}))
def test_converting_to_all_heads_keeps_every_byte(tmp_path, family):
    source = models.save(tmp_path / "source", family, shards="60KB", dtype=torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out", HEADS)
    shards = {name: digest for name, digest in models.digest(source).items() if name.endswith(".safetensors")}
    assert len(shards) > 1
    before, after = models.load(source).state_dict(), models.load(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("family", "heads", "changes", "message"),
    [
        ("llama", 3, {}, r"num_kv_heads must divide the model's 8 KV heads \(8, 4, 2, 1\); got 3"),
        ("llama", 16, {}, r"must divide the model's 8 KV heads \(8, 4, 2, 1\); got 16"),
        ("gpt2", 2, {}, "GPT-2 becomes GPT-BigCode, which has a single KV head .* got 2. Give 1 KV head"),
        ("gpt_bigcode", 4, {}, "have a single KV head .* got 4. Give 1 KV head"),
        ("gpt2", 1, {"scale_attn_by_inverse_layer_idx": True}, "GPT-2 with scale_attn_by_inverse_layer_idx cannot"),
        (
            "gpt_neox",
            2,
            {"use_parallel_residual": False},
            "which requires use_parallel_residual=True, .* got False, True",
        ),
        ("gpt_neox", 2, {"attention_bias": False}, "got True, False and False"),
    ],
)
def test_models_that_cannot_be_converted(tmp_path, family, heads, changes, message):
    source = models.save(tmp_path / "source", family, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", heads)
    assert not (tmp_path / "out").exists()


def test_another_family_is_refused_with_a_list(tmp_path):
    source = models.save(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"model_type must be one of llama, mistral, .*; got 'bert'"):
        convert_checkpoint(source, tmp_path / "out", 2)
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"quantised weights \(quantization_config\) cannot be pooled"):
        convert_checkpoint(source, tmp_path / "out", 2)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_state_dict_converts_like_a_folder(tmp_path, family):
    model = models.build(family)
    converted = convert_state_dict(model.state_dict(), model.config.to_dict(), 2, how="random", seed=5)
    convert_checkpoint(models.save(tmp_path / "source", family), tmp_path / "out", 2, how="random", seed=5)
    loaded = models.load(tmp_path / "out").state_dict()
    assert converted.state_dict.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in converted.state_dict.items())
    assert converted.config["num_key_value_heads"] == 2
    rest = {name: value for name, value in model.state_dict().items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"config: \w+ needs tensor 'model\.norm\.weight' \[64\]"):
        convert_state_dict(rest, model.config.to_dict(), 2)


def test_random_draws_each_tensor_independently(tmp_path):
    model = models.build("llama", attention_bias=False)
    drawn = convert_state_dict(model.state_dict(), model.config.to_dict(), 1, how="random").state_dict
    weights = [value / value.std() for name, value in drawn.items() if re.search(r"[kv]_proj\.weight", name)]
    assert len(weights) == 6
    for i, one in enumerate(weights):
        assert not any(torch.allclose(one, other, atol=1e-2) for other in weights[:i])
