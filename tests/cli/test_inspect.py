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
    assert rf"l\udcffama-{letter} (llama)" in shown.buffer.getvalue().decode(encoding)


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
    lines = captured.out.splitlines()
    assert lines[0] == f"{llama} (llama), 83,136 parameters, keys and values stored in BF16"
    kind = "multi-head attention: 8 query heads, 8 KV heads, head width 8, no window, biases, rotary (theta 10000)"
    assert lines[1] == f"  3 layers of {kind}"
    assert lines[3] == "Parameters, and the KV cache of 2 sequences of 1000 tokens in float32"
    rows = [line.split() for line in lines[5:]]
    # 3 layers * 8 heads * (8 + 8) numbers * 4 bytes = 1536 bytes a token.
    assert rows[0] == ["8", "(this", "model)", "83,136", "49,920", "1.5", "KiB", "2.9", "MiB", "100.0%"]
    assert rows[3] == ["1", "61,296", "28,080", "192", "B", "375.0", "KiB", "12.5%"]
    assert [row[0] for row in rows] == ["8", "4", "2", "1"]


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
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  2 layers (0, 2) of multi-head attention: ") and ", a window of 5, " in lines[1]
    assert lines[2].startswith("  1 layer (1) of multi-head attention: ") and ", no window, " in lines[2]


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
        "which the checkpoint does not have (1 other layers do). For sharded checkpoints, give the folder."
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
