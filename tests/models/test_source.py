"""Names of models, and the errors for invalid ones."""

import json

import pytest

from qkv.cli import main
from qkv.models.errors import CommandError
from qkv.models.source import ModelSource, find_model

BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}


def test_folder(tmp_path):
    (tmp_path / "config.json").touch()
    source = find_model(str(tmp_path))
    assert source == ModelSource(str(tmp_path), str(tmp_path))
    assert not source.is_remote


def test_gguf_file(tmp_path, monkeypatch):
    (tmp_path / "tiny.Q4.gguf").write_bytes(b"GGUF and more")
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny.Q4.gguf") == ModelSource("tiny.Q4", str(tmp_path), "tiny.Q4.gguf")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(name) == ModelSource(name, name)
    assert find_model(name).is_remote


@pytest.mark.parametrize("model", ["./nothing", "nothing.gguf", "a/b/c", "two words", "/not/there", ".hidden"])
def test_neither_file_nor_hub_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CommandError, match=f"{model!r} is not an existing file or folder, and not a valid Hub model name"
    ):
        find_model(model)


def test_folder_without_config(tmp_path):
    with pytest.raises(CommandError, match=f"the folder {tmp_path} is not a model: it contains no config.json"):
        find_model(str(tmp_path))


def test_folder_with_a_gguf_file_points_to_it(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(CommandError, match=f"For the GGUF file in it, give {tmp_path / 'tiny.gguf'}."):
        find_model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_file_that_is_not_gguf(tmp_path, content):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    with pytest.raises(CommandError) as caught:
        find_model(str(path))
    assert f"{path} is not a GGUF file: it must start with b'GGUF'; got {content!r}." in str(caught.value)


def _fails(capsys, model):
    assert main(["demo", "--model", str(model)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("config", "kind"), [(BERT, "BertForMaskedLM"), ({"model_type": "t5"}, "t5"), ({"model_type": "vit"}, "vit")]
)
def test_model_that_is_not_causal(capsys, tmp_path, config, kind):
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = _fails(capsys, tmp_path)
    assert f"qkv: {str(tmp_path)!r} must be a causal language model; got {kind}." in shown


@pytest.mark.parametrize("content", ['{"model_type"', '{"model_type": "llama"}', "{}"])
def test_damaged_folder(capsys, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    shown = _fails(capsys, tmp_path)
    assert f"qkv: cannot load the configuration or tokenizer of {str(tmp_path)!r}. " in shown
    assert "Check that it is complete" in shown


def test_truncated_gguf_file(capsys, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert f"cannot load the configuration or tokenizer of {str(path)!r}." in _fails(capsys, path)


@pytest.mark.parametrize("content", [b"PK", b"GGUF\x03\x00\x00\x00"])
def test_convert_blames_no_option_of_demo(capsys, tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "out"), "--kv-heads", "1"]) == 1
    shown = capsys.readouterr().err
    assert str(path) in shown
    assert "--model" not in shown


def test_hub_that_cannot_be_reached(capsys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shown = _fails(capsys, "nobody-at-all/no-such-model")
    assert "cannot load the configuration or tokenizer of 'nobody-at-all/no-such-model'. " in shown
    assert "Check the name and the network, or give a local folder or a GGUF file." in shown
