"""`qkv inspect` on folders, files and, without a network, the hub."""

import io
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from convert import models

from qkv.cli import main
from qkv.convert.files import safetensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llama"), "llama", shards="60KB", dtype=torch.bfloat16)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_name_that_the_terminal_cannot_show(tmp_path, llama, monkeypatch, encoding):
    """Names are bytes, and need not be text at all."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    folder = tmp_path / os.fsdecode(b"l\xffama-\xc3\xbc")
    shutil.copytree(llama, folder)
    assert main(["inspect", str(folder)]) == 0
    letter = "\xfc" if encoding == "utf-8" else r"\xfc"
    assert rf"l\udcffama-{letter} (llama)" in " ".join(shown.buffer.getvalue().decode(encoding).split())


@pytest.mark.parametrize("command", [["inspect"], ["convert", "x", "--kv-heads", "1"]])
def test_home_of_an_unknown_user(capsys, command):
    assert main([command[0], "~nobody-of-that-name/model", *command[1:]]) == 1
    shown = capsys.readouterr().err
    assert "~nobody-of-that-name/model" in shown and "Traceback" not in shown


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


def document(capsys, *arguments):
    code, captured = run(capsys, *arguments, "--json")
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_text(capsys, llama):
    code, captured = run(capsys, llama, "--length", "1000", "--batch", "2", "--dtype", "float32")
    assert (code, captured.err) == (0, "")
    shown = words(captured.out)
    assert shown.startswith(f"{llama} (llama), 83,136 parameters, keys and values stored in BF16 ")
    kind = "multi-head attention: 8 query heads, 8 KV heads, head width 8, no window, biases, rotary (theta 10000)"
    assert f" 3 layers of {kind} " in shown
    assert " Parameters, and the KV cache of 2 sequences of 1,000 tokens in float32 and in int8 " in shown
    rows = [line.split() for line in captured.out.splitlines()[-4:]]
    # 3 layers * 8 heads * (8 + 8) numbers * 4 bytes = 1536 bytes a token; in int8 a quarter, and 3 * 8 * 8 of scales.
    assert rows[0] == ["8", "(now)", "83,136", "49,920", *["1.5", "KiB", "2.9", "MiB", "1.1", "MiB", "100.0%"]]
    assert rows[3] == ["1", "61,296", "28,080", *["192", "B", "375.0", "KiB", "140.6", "KiB", "12.5%"]]
    assert [row[0] for row in rows] == ["8", "4", "2", "1"]


def words(text):
    """A report without its line breaks, of which all are within 80 columns, names aside."""
    assert all(len(line) <= 80 or len(line.split()) <= 2 for line in text.splitlines()), text
    return " ".join(text.split())


def test_the_cache_is_in_the_dtype_of_the_model(capsys, llama, tmp_path):
    assert document(capsys, llama)["kv_cache"]["dtype"] == "bfloat16"
    stored = models.save(tmp_path / "float32", "llama")
    found = document(capsys, stored)["kv_cache"]
    assert (found["dtype"], found["sizes"][0]["kv_bytes_per_token"]) == ("float32", 1536)
    doubles = models.save(tmp_path / "float64", "llama", dtype=torch.float64)
    found = document(capsys, doubles)
    assert (found["stored_dtype"], found["kv_cache"]["dtype"]) == ("F64", "bfloat16")


def test_int8_is_what_a_cache_in_int8_takes(capsys, tmp_path):
    """Against the memory of the tensors that one holds."""
    from qkv import QKVCache

    for family in ("llama", "gemma3_text"):  # with windows in two layers
        folder = models.save(tmp_path / family, family)
        model = models.load(folder)
        model.set_attn_implementation("eager")
        cache = QKVCache(model, dtype="int8")
        with torch.no_grad():
            model(models.IDS[:, :5], past_key_values=cache)
        kept = [tensor for layer in cache.layers for tensor in stored(layer._cache.latest(5))]
        found = document(capsys, folder, "--length", 5)["kv_cache"]["sizes"][0]
        assert found["kv_bytes_in_int8"] == sum(tensor.nbytes for tensor in kept)


def stored(keys):
    return [tensor for tensor in (keys.k, keys.v, keys.k_scale, keys.v_scale) if tensor is not None]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_json_agrees_with_the_model(capsys, tmp_path, family):
    """Parameters by counting, and the bytes of a cache that transformers filled."""
    folder = models.save(tmp_path, family)
    model = models.load(folder)
    found = document(capsys, folder, "--length", models.IDS.shape[1], "--dtype", "float32")
    own = found["kv_cache"]["sizes"][0]
    attention = {
        id(p): p.numel() for n, p in model.named_parameters() if re.search(r"\.(self_attn|attn|attention)\.", n)
    }
    assert own["attention_parameters"] == sum(attention.values())
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert own["parameters"] == found["parameters"] == stored
    assert sum(layer["num_layers"] for layer in found["layers"]) == 3
    cache = model(models.IDS).past_key_values
    nbytes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    tokens = [layer.keys.shape[2] for layer in cache.layers]
    windows = [layer["window"] for layer in found["layers"] for _ in range(layer["num_layers"])]
    # What transformers keeps of a window is one key less: the next one is not there yet.
    whole = sum(
        size // count * min(models.IDS.shape[1], window or models.IDS.shape[1])
        for size, count, window in zip(nbytes, tokens, sorted(windows, key=lambda w: (w is None, w)), strict=True)
    )
    assert own["kv_bytes"] == whole


def test_different_layers_are_listed_separately(capsys, tmp_path):
    found = document(capsys, models.save(tmp_path, "gemma3_text"))
    assert [(layer["num_layers"], layer["window"]) for layer in found["layers"]] == [(2, 5), (1, None)]
    assert [layer["numbers"] for layer in found["layers"]] == [[0, 2], [1]]
    assert {layer["qk_norm"] for layer in found["layers"]} == {True}
    assert main(["inspect", str(tmp_path)]) == 0
    shown = words(capsys.readouterr().out)
    kind = "multi-head attention: 8 query heads, 8 KV heads, head width 16"
    assert f" 2 layers (0, 2) of {kind}, a window of 5, " in shown
    assert f" 1 layer (1) of {kind}, no window, " in shown


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("phi3", 2), ("qwen3", 1), ("gpt_bigcode", 1)])
def test_converted_model_has_the_predicted_sizes(capsys, tmp_path, family, heads):
    source = models.save(tmp_path / "source", family)
    predicted = {size["num_kv_heads"][0]: size for size in document(capsys, source)["kv_cache"]["sizes"]}
    assert main(["convert", str(source), str(tmp_path / "out"), "--kv-heads", str(heads)]) == 0
    capsys.readouterr()
    assert document(capsys, tmp_path / "out")["kv_cache"]["sizes"][0] == predicted[heads]


def test_one_shard(capsys, llama):
    code, captured = run(capsys, sorted(llama.glob("*.safetensors"))[0])
    assert (code, captured.out) == (1, "")
    assert "LlamaForCausalLM needs tensor 'model.layers.1." in captured.err
    assert (
        "which the checkpoint does not have (1 other layer does). For sharded checkpoints, give the folder."
        in captured.err
    )


def test_single_file_model(capsys, tmp_path):
    folder = models.save(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert document(capsys, folder / "mine.safetensors")["parameters"] == 83_136


def test_hub_is_read_by_headers(capsys, monkeypatch, llama):
    def metadata(name):
        assert name == "someone/llama"
        headers = [safetensors.read_header(path).tensors for path in sorted(llama.glob("*.safetensors"))]
        return SimpleNamespace(files_metadata={str(i): SimpleNamespace(tensors=h) for i, h in enumerate(headers)})

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(llama / file))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    found, local = document(capsys, "someone/llama"), document(capsys, llama)
    assert found | {"model": ""} == local | {"model": ""}


def test_hub_without_a_network(capsys, monkeypatch):
    def fail(name, file):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    code, captured = run(capsys, "someone/llama")
    assert (code, captured.out) == (1, "")
    message = (
        "qkv: could not fetch the headers of 'someone/llama' from the Hub. ConnectionError: no route\nCheck the name"
    )
    assert captured.err.startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "qkv: 'no/such/folder' is not an existing file or folder, and not a valid Hub model name."),
        ("./none", "qkv: './none' is not an existing file or folder, and not a valid Hub"),
        ("none.gguf", "qkv: 'none.gguf' is not an existing file or folder, and not a valid Hub"),
    ],
)
def test_missing_models_are_refused(capsys, name, message):
    code, captured = run(capsys, name)
    assert (code, captured.out) == (1, "")
    assert message in captured.err


def test_a_file_of_another_kind_is_refused(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("Nothing will come of nothing.")
    code, captured = run(capsys, tmp_path / "text.txt")
    assert (code, captured.out) == (1, "")
    err = " ".join(captured.err.split())
    assert f"{tmp_path / 'text.txt'} must be a folder written by save_pretrained, a GGUF file, or a safetensors" in err
    assert f"{tmp_path / 'config.json'} is missing." in err


def test_contradictory_folder_is_refused(capsys, tmp_path):
    folder = models.save(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    code, captured = run(capsys, folder)
    assert (code, captured.out) == (1, "")
    assert (
        "needs tensor 'model.layers.0.self_attn.k_proj.weight' to be floating-point of shape [32, 64]; got "
        in captured.err
    )


def test_description_of_an_unusual_layer():
    from qkv.cli.reports.layers import describe
    from qkv.convert.inspect.inspection import LayerAttention

    layer = LayerAttention(4, 1, 8, 6, 7, False, True, "", 10, 5)
    expected = "multi-query attention: 4 query heads, 1 KV head, key width 8, value width 6, a window of 7, no biases, "
    assert describe(layer) == expected + "not rotary, normalised queries and keys"


OTHERS = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 64},
    "bloom": {"n_head": 8, "n_layer": 3},
    "falcon": {},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 2},
    "olmo2": {"num_key_value_heads": 4, "intermediate_size": 16},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 8, "rotary_dim": 4},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_local_experts": 4},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 8},
}
"""Decoders that do not convert, in few numbers."""


def config_of(family, changes):
    from transformers import AutoConfig

    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "pad_token_id": 0}
    return AutoConfig.for_model(family, **sizes | changes)


@pytest.mark.parametrize("family", OTHERS)
def test_other_decoders_agree_with_the_cache_that_they_fill(capsys, tmp_path, family):
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_config(config_of(family, OTHERS[family])).eval()
    model.save_pretrained(tmp_path)
    cache = DynamicCache()  # keeps all tokens, in layers with a window as well
    with torch.no_grad():
        model(models.IDS, past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = document(capsys, tmp_path, "--length", models.IDS.shape[1], "--dtype", "float32")
    own = found["kv_cache"]["sizes"]
    assert (len(own), own[0]["kv_bytes"], found["is_convertible"]) == (1, kept, False)
    assert found["encoder"] == [] and sum(layer["num_layers"] for layer in found["layers"]) == 3
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    named = [p for n, p in model.named_parameters() if re.search(r"\.(self_attn|attn|attention|self_attention)\.", n)]
    assert own[0]["attention_parameters"] == sum(parameter.numel() for parameter in named)
    (tmp_path / "model.safetensors").unlink()  # by the configuration alone, the same
    without = document(capsys, tmp_path, "--length", models.IDS.shape[1], "--dtype", "float32")
    assert (found["stored_dtype"], without["stored_dtype"]) == ("F32", "float32")
    assert without | {"stored_dtype": "F32"} == found
    assert document(capsys, tmp_path / "config.json")["layers"] == found["layers"]


def test_encoders_of_texts_images_and_speech_are_described(capsys, tmp_path):
    """By hand, from the papers."""
    expected = {
        "bert": (109_482_240, 12 * (4 * 768 * 768 + 4 * 768 + 2 * 768), [(12, 12, 64)]),
        "vit": (86_389_248, 12 * (4 * 768 * 768 + 4 * 768), [(12, 12, 64)]),
        "wav2vec2": (94_371_712, 12 * (4 * 768 * 768 + 4 * 768), [(12, 12, 64)]),
        "clip": (151_277_313, 12 * (4 * 512 * 512 + 4 * 512 + 4 * 768 * 768 + 4 * 768), [(12, 8, 64), (12, 12, 64)]),
    }
    for family, (parameters, in_attention, layers) in expected.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        found = document(capsys, tmp_path)
        shown = [(layer["num_layers"], layer["num_heads"], layer["head_dim"]) for layer in found["encoder"]]
        assert (found["parameters"], shown, found["layers"]) == (parameters, layers, [])
        assert found["kv_cache"]["sizes"][0]["attention_parameters"] == in_attention
        code, captured = run(capsys, tmp_path)
        report = words(captured.out)
        assert code == 0 and f" {in_attention:,} of the parameters are in attention. It keeps no keys" in report
        assert "window" not in report and "rotary" not in report  # not known, so nothing is said
    assert " 12 layers in vision_model.encoder.layers of multi-head attention: 12 query heads, " in report


def test_speech_models_cache_what_their_decoder_reads(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    found = document(capsys, tmp_path, "--length", "100")
    assert [layer["place"] for layer in found["encoder"]] == ["encoder.layers"]
    assert [(layer["num_layers"], layer["cross"]) for layer in found["layers"]] == [(4, False), (4, True)]
    # 4 layers * 6 heads * (64 + 64) numbers, twice.
    own = 4 * 6 * 128 * 100
    sizes = found["kv_cache"]["sizes"][0]
    assert (sizes["kv_bytes"], sizes["kv_bytes_in_int8"]) == (8 * own, own + 4 * 6 * 8 * 100 + 4 * own)


def test_latents_of_other_models(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "num_hidden_layers": 2}')
    found = document(capsys, tmp_path, "--length", "100", "--dtype", "bfloat16")
    (layer,) = found["layers"]
    assert (layer["num_heads"], layer["latent"], layer["head_dim"], layer["value_dim"]) == (128, [512, 64], 192, 128)
    sizes = found["kv_cache"]["sizes"][0]
    assert (sizes["kv_bytes"], sizes["kv_bytes_in_int8"]) == (2 * 2 * (512 + 64) * 100, None)


def test_a_family_that_converts_is_described_without_its_weights(capsys, tmp_path):
    folder = models.save(tmp_path, "llama")
    found = document(capsys, folder)
    (folder / "model.safetensors").unlink()
    without = document(capsys, folder)
    assert without["kv_cache"] == found["kv_cache"] and without["is_convertible"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type must be one that transformers "),
        ({"model_type": 7}, "knows; got 7."),
        ({"model_type": "no_such_model"}, "knows; got 'no_such_model'."),
        ({"model_type": "mamba", "num_hidden_layers": 2}, "qkv finds no attention in a mamba model"),
        (
            {"model_type": "bert", "num_hidden_layers": 10**9},
            "num_hidden_layers must be at most 10000; got 1000000000.",
        ),
        (
            {"model_type": "clip", "text_config": {"num_hidden_layers": 10**9}},
            "num_hidden_layers must be at most 10000",
        ),
        ({"model_type": "bert", "hidden_size": "wide"}, "transformers "),
        ({"model_type": "bert", "hidden_size": 7}, "transformers cannot build this model: "),
    ],
)
def test_configurations_that_are_refused(capsys, tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, captured = run(capsys, tmp_path)
    assert (code, captured.out, "Traceback" in captured.err) == (1, "", False)
    assert message in captured.err and str(tmp_path / "config.json") in captured.err
