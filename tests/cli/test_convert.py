"""`qkv convert` from end to end."""

import json
import subprocess
import sys

import pytest
import torch
from cli import tiny_model
from convert import models

from qkv.cli import main


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llama"), "llama", shards="60KB")


def run(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    return code, capsys.readouterr()


def test_report(capsys, tmp_path, llama):
    (llama / "pytorch_model.bin").write_bytes(b"")
    code, captured = run(capsys, llama, tmp_path / "out", "--kv-heads", "2")
    (llama / "pytorch_model.bin").unlink()
    assert code == 0
    assert captured.err.splitlines() == ["reading configuration and headers ...", "converting ..."]
    lines = captured.out.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'out'}"
    assert lines[1].startswith("  multi-head attention: 8 query heads, 8 KV heads, head width 8")
    assert lines[2].startswith("  becomes grouped-query attention: 8 query heads, 2 KV heads, head width 8")
    assert lines[3] == "  12 of 42 tensors changed, 2 other files carried over"
    assert lines[4] == "  left behind, since they hold weights of the model as it was: pytorch_model.bin"
    rows = [line.split() for line in lines[-3:]]
    assert rows[0] == ["parameters", "83,136", "64,416", "77.5%"]
    assert rows[1] == ["in", "attention", "49,920", "31,200", "62.5%"]
    assert rows[2] == ["KV", "cache", "a", "token", "1.5", "KiB", "384", "B", "25.0%"]
    assert models.load(tmp_path / "out").config.num_key_value_heads == 2


def test_options(capsys, tmp_path):
    source = models.save(tmp_path / "source", "mistral")
    options = ("--kv-heads", "4", "--pool", "random", "--window", "3")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, source, tmp_path / out, *options, "--seed", seed)[0] == 0
    a, b, c = (models.digest(tmp_path / out)["model.safetensors"] for out in "abc")
    assert (a == b, a == c) == (True, False)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["sliding_window"] == 3


def test_dry_run_writes_nothing(capsys, tmp_path, llama):
    code, captured = run(capsys, llama, tmp_path / "out", "--kv-heads", "1", "--dry-run")
    assert code == 0
    assert captured.out.startswith(f"would write {tmp_path / 'out'}\n")
    assert not list(tmp_path.iterdir())


def test_overwriting_must_be_asked_for(capsys, tmp_path, llama):
    assert run(capsys, llama, tmp_path / "out", "--kv-heads", "4")[0] == 0
    before = models.digest(tmp_path / "out")
    code, captured = run(capsys, llama, tmp_path / "out", "--kv-heads", "2")
    assert (code, captured.out) == (1, "")
    assert captured.err == f"qkv: {tmp_path / 'out'} exists; give another folder, or --overwrite to replace it.\n"
    assert models.digest(tmp_path / "out") == before
    assert run(capsys, llama, tmp_path / "out", "--kv-heads", "2", "--overwrite")[0] == 0
    assert models.load(tmp_path / "out").config.num_key_value_heads == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-heads", "3"], 1, "the 8 KV heads of the model can be pooled to 8, 4, 2, 1; got 3."),
        (["--kv-heads", "0"], 2, "Invalid value for '--kv-heads': it must be at least 1; got 0."),
        ([], 2, "Missing option '--kv-heads'"),
        (["--kv-heads", "2", "--pool", "median"], 2, "'median' is not one of 'mean', 'first', 'random'."),
        (["--kv-heads", "2", "--window", "5"], 1, "the configuration of a llama model cannot express a window"),
    ],
)
def test_what_is_refused(capsys, tmp_path, llama, arguments, code, message):
    got, captured = run(capsys, llama, tmp_path / "out", *arguments)
    assert (got, captured.out) == (code, "")
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_loaded(capsys, tmp_path):
    class Trap:
        def __reduce__(self):
            return (sys.exit, ("the pickle was loaded",))

    source = tmp_path / "source"
    tiny_model.llama().save_pretrained(source)
    torch.save(Trap(), source / "pytorch_model.bin")
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1")
    assert (code, captured.out) == (1, "")
    assert "Pickled weights such as pytorch_model.bin can run code and are never loaded" in captured.err


def test_result_generates_with_its_tokenizer(capsys, tmp_path):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    assert run(capsys, source, tmp_path / "out", "--kv-heads", "1")[0] == 0
    demo = ["demo", "--model", str(tmp_path / "out"), "--prompt", "attention is", "--max-new-tokens", "4", "--json"]
    assert main(demo) == 0
    (layer,) = json.loads(capsys.readouterr().out)["attention"]
    assert (layer["num_heads"], layer["num_kv_heads"]) == (6, 1)


def test_gguf_file_is_unpacked_first(capsys, tmp_path, monkeypatch):
    """The loading itself is that of ``qkv demo``, and has its tests there."""
    from qkv.cli import convert
    from qkv.cli.language_model import LanguageModel

    folder = tiny_model.save(tiny_model.llama(), tmp_path / "model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = []

    def load(source, dtype, progress):
        from transformers import AutoTokenizer

        asked.append((source.gguf_file, dtype))
        return LanguageModel("model", models.load(folder), AutoTokenizer.from_pretrained(folder))

    monkeypatch.setattr(convert, "load", load)
    assert run(capsys, tmp_path / "model.gguf", tmp_path / "out", "--kv-heads", "1")[0] == 0
    assert asked == [("model.gguf", torch.float32)]
    assert models.load(tmp_path / "out").config.num_key_value_heads == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not any((tmp_path / "out").glob("*.gguf"))


def test_broken_checkpoint_ends_without_a_traceback(tmp_path, llama):
    shard = next(llama.glob("*.safetensors"))
    (tmp_path / "source").mkdir()
    for path in llama.iterdir():
        data = path.read_bytes()
        (tmp_path / "source" / path.name).write_bytes(data[:-1] if path == shard else data)
    code = "import sys; from qkv.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        str(tmp_path / "source"),
        str(tmp_path / "out"),
        "--kv-heads",
        "2",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, "Traceback" in ended.stderr) == (1, "", False)
    assert f"qkv: {tmp_path / 'source' / shard.name} is truncated: it has " in ended.stderr
