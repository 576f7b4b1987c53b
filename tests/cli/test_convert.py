"""`qkv convert` from end to end."""

import json
import math
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from cli import tiny_model
from convert import models

from qkv.cli import main
from qkv.convert import measure_divergence
from qkv.models.errors import CommandError


def test_heads_are_aligned_unless_another_method_is_chosen(capsys, tmp_path):
    source = models.save(tmp_path / "source", "mistral")
    digests = {}
    for out, options in (("default", ()), ("aligned", ("--pool", "aligned")), ("mean", ("--pool", "mean"))):
        code, captured = run(capsys, source, tmp_path / out, "--kv-heads", "2", "--json", *options)
        assert code == 0 and json.loads(captured.out)["pooling"] == ("mean" if out == "mean" else "aligned")
        digests[out] = models.digest(tmp_path / out)["model.safetensors"]
    assert digests["default"] == digests["aligned"] != digests["mean"]
    code, captured = run(capsys, source, tmp_path / "window", "--window", "3", "--json")
    assert code == 0 and json.loads(captured.out)["pooling"] is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llama"), "llama", shards="60KB")


def run(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    return code, capsys.readouterr()


def words(text):
    """A report without its line breaks, of which none may be needed within 80 columns, paths aside."""
    assert all(len(line) <= 80 or len(line.split()) <= 3 for line in text.splitlines()), text
    return " ".join(text.replace("\\\n", "").split())


def test_report(capsys, tmp_path, llama):
    (llama / "pytorch_model.bin").write_bytes(b"")
    code, captured = run(capsys, llama, tmp_path / "out", "--kv-heads", "2")
    (llama / "pytorch_model.bin").unlink()
    assert code == 0
    assert captured.err.splitlines() == ["reading configuration and headers ...", "converting ..."]
    shown = words(captured.out)
    assert captured.out.startswith(f"wrote {tmp_path / 'out'}\n  multi-head attention: 8 query heads, 8 KV heads, ")
    assert " becomes grouped-query attention: 8 query heads, 2 KV heads, head width 8" in shown
    assert "\n  heads pooled: aligned\n" in captured.out
    assert "\n  21 of 42 tensors changed, 2 other files copied\n" in captured.out
    assert "\n  not copied (weights of the original model): pytorch_model.bin\n" in captured.out
    lines = captured.out.splitlines()
    title = lines.index("Parameters, and the KV cache in float32")
    rows = [line.split() for line in lines[title + 2 : title + 5]]
    assert rows[0] == ["parameters", "83,136", "64,416", "77.5%"]
    assert rows[1] == ["in", "attention", "49,920", "31,200", "62.5%"]
    assert rows[2] == ["KV", "cache", "a", "token", "1.5", "KiB", "384", "B", "25.0%"]
    assert lines[title + 5 : title + 9] == [
        "",
        "  predictions not compared: the model has no tokenizer",
        "  not known whether it is usable",
        "",
    ]
    next_command = f"qkv uptrain {tmp_path / 'out'} TEXT {tmp_path / 'out-trained'} --original {llama} --minutes 10"
    assert shown.endswith(next_command)
    assert models.load(tmp_path / "out").config.num_key_value_heads == 2


def test_report_of_latent_attention(capsys, tmp_path, llama):
    code, captured = run(capsys, llama, tmp_path / "out", "--latent", "24", "--rope-heads", "1")
    assert code == 0
    shown = words(captured.out)
    assert " multi-head attention: 8 query heads, 8 KV heads, head width 8" in shown
    latents = "latents of 24, rotary keys of 8, key width 16, value width 8"
    assert f" becomes multi-head latent attention: 8 query heads, {latents}" in shown
    assert "15 of 39 tensors changed, 2 other files copied model type llama becomes qkv_latent_llama" in shown
    assert "KV cache a token 1.5 KiB 384 B 25.0%" in shown
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "multi-head latent attention: 8 query heads, latents of 24" in " ".join(capsys.readouterr().out.split())
    code, captured = run(capsys, tmp_path / "out", tmp_path / "again", "--kv-heads", "1")
    assert code == 1 and "latent attention has no KV heads to pool" in captured.err


def test_the_divergence_of_latent_attention_is_that_of_rounding_at_full_rank(capsys, tmp_path):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny_model.WORDS))
    code, captured = run(capsys, source, tmp_path / "out", "--latent", "16", "--text", text)
    assert code == 0
    assert "KL divergence 0.000 nats a token, same most probable token: 100.0%" in captured.out
    shown = words(captured.out)
    assert shown.endswith(f"usable: the loss is the same Next: qkv inspect {tmp_path / 'out'}")


def test_options(capsys, tmp_path):
    source = models.save(tmp_path / "source", "mistral")
    options = ("--kv-heads", "4", "--pool", "random", "--window", "3")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, source, tmp_path / out, *options, "--seed", seed)[0] == 0
    a, b, c = (models.digest(tmp_path / out)["model.safetensors"] for out in "abc")
    assert (a == b, a == c) == (True, False)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["sliding_window"] == 3


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Five layers with windows nowhere."""
    config = tiny_model.llama(num_hidden_layers=5)
    return tiny_model.save(config, tmp_path_factory.mktemp("plain") / "source")


def test_report_of_windows(capsys, tmp_path, plain):
    code, captured = run(capsys, plain, tmp_path / "out", "--window", "8", "--layers", "0,2-3")
    assert code == 0
    shown = words(captured.out)
    attention = "grouped-query attention: 6 query heads, 2 KV heads, head width 8"
    assert f"/out {attention}, no window, " in shown
    assert f" becomes 3 layers (0, 2-3) of {attention}, a window of 8, " in shown
    assert f" becomes 2 layers (1, 4) of {attention}, no window, " in shown
    assert " 0 of 48 tensors changed, 3 other files copied model type llama becomes ministral " in shown
    # 32 numbers of a key and a value in each layer, of 4 bytes each: all 4096 tokens in 2 layers, 8 in 3.
    assert " KV cache a token 640 B 640 B 100.0% " in shown
    assert " KV cache of 4,096 tokens 2.5 MiB 1.0 MiB 40.1% " in shown
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = words(capsys.readouterr().out)
    assert f" 3 layers (0, 2-3) of {attention}, a window of 8, " in shown
    assert f" 2 layers (1, 4) of {attention}, no window, " in shown


def test_the_model_with_windows_is_the_one_that_is_compared(capsys, tmp_path, plain):
    from transformers import AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("attention is a weighted sum of the values " * 30)
    code, captured = run(capsys, plain, tmp_path / "out", "--window", "2", "--text", text)
    assert (code, "cuts nothing" in captured.out) == (0, False)
    token_ids = AutoTokenizer.from_pretrained(plain)(text.read_text(), return_tensors="pt").input_ids[:, :64]
    before, after = (loss(folder, token_ids) for folder in (plain, tmp_path / "out"))
    assert abs(before - after) > 0.001
    assert f"    loss {before:.3f} -> {after:.3f} nats a token" in captured.out.splitlines()
    code, captured = run(capsys, plain, tmp_path / "wide", "--window", "64", "--text", text)
    shown = words(captured.out)
    assert (
        " KL divergence 0.000 nats a token, same most probable token: 100.0% not known whether it is usable: " in shown
    )
    assert " usable: a window of 64 cuts nothing of 64 tokens Next, to compare them on a longer text: " in shown
    assert shown.endswith(f"qkv see {plain} --against {tmp_path / 'wide'} --text TEXT --tokens 256")
    assert "cuts nothing" not in run(capsys, plain, tmp_path / "narrow", "--window", "63", "--text", text)[1].out


def test_windows_like_a_report(capsys, tmp_path, plain):
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps({"model": "any", "proposal": {"window": 8, "sink_tokens": 0, "layers": [3, 1], "k": 2}})
    )
    assert run(capsys, plain, tmp_path / "like", "--like", report)[0] == 0
    assert run(capsys, plain, tmp_path / "given", "--window", "8", "--layers", "1,3", "--sink-tokens", "0")[0] == 0
    assert models.digest(tmp_path / "like") == models.digest(tmp_path / "given")
    kinds = json.loads((tmp_path / "like" / "config.json").read_text())["layer_types"]
    assert [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"] == [1, 3]
    assert run(capsys, plain, tmp_path / "both", "--like", report, "--kv-heads", "1")[0] == 0
    assert models.load(tmp_path / "both").config.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "report.json is missing."),
        ("[1]", "report.json must be a JSON object"),
        ("{", "report.json"),
        ({}, "must have a proposal with window and layers. It has one after"),
        ({"proposal": None}, "qkv see MODEL --text FILE --window W --measure --json "),
        ({"proposal": {"window": 8}}, "must have a proposal with window and layers."),
        ({"proposal": {"window": 0, "layers": [1]}}, "window must be an integer >= 1; got 0"),
        (
            {"proposal": {"window": 8, "layers": "1"}},
            "layers must be a list whose items are each an integer >= 0; got '1'",
        ),
        ({"proposal": {"window": 8, "layers": [1.0]}}, "layers must be a list whose items are each an integer >= 0"),
        (
            {"proposal": {"window": 8, "layers": []}},
            "layers must be one or more of 0 to 4, since the model has 5; got [].",
        ),
        (
            {"proposal": {"window": 8, "layers": [5]}},
            "layers must be one or more of 0 to 4, since the model has 5; got [5].",
        ),
        (
            {"proposal": {"window": 8, "sink_tokens": 4, "layers": [1]}},
            "a configuration of transformers has windows without sink tokens; got 4.",
        ),
    ],
)
def test_reports_that_are_refused(capsys, tmp_path, plain, report, message):
    file = tmp_path / "report.json"
    if report is not None:
        file.write_text(report if isinstance(report, str) else json.dumps(report))
    code, captured = run(capsys, plain, tmp_path / "out", "--like", file)
    assert (code, captured.out, "Traceback" in captured.err) == (1, "", False)
    assert (message in captured.err and "report.json" in captured.err) or "since the model has" in message
    assert not (tmp_path / "out").exists()


def entries(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_dry_run_measures_and_writes_nothing(capsys, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    (tmp_path / "text.txt").write_text("attention is a weighted sum of the values " * 30)
    before = entries(tmp_path)
    options = ("--kv-heads", "1", "--text", tmp_path / "text.txt")
    code, captured = run(capsys, source, "--dry-run", *options)
    assert code == 0 and entries(tmp_path) == before
    assert captured.out.startswith(f"would convert {source}\n")
    expected = f"Next, to write it: qkv convert {source} OUT --kv-heads 1 --text {tmp_path / 'text.txt'}"
    assert words(captured.out).endswith(expected)
    written = run(capsys, source, tmp_path / "out", *options)[1].out
    compared = [line for line in captured.out.splitlines() if "->" in line]
    assert len(compared) == 2 and compared == [line for line in written.splitlines() if "->" in line]


@pytest.mark.parametrize("out", ["source", "source/out", "none/out", "file", "folder"])
def test_a_dry_run_ignores_the_output(capsys, tmp_path, llama, out):
    shutil.copytree(llama, tmp_path / "source")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = entries(tmp_path)
    code, captured = run(capsys, tmp_path / "source", tmp_path / out, "--kv-heads", "1", "--dry-run", "--seed", "2")
    assert code == 0 and entries(tmp_path) == before
    assert words(captured.out).endswith(f"convert {tmp_path / 'source'} {tmp_path / out} --kv-heads 1 --seed 2")


def test_a_document_says_what_the_report_says(capsys, tmp_path):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("attention is a weighted sum of the values " * 30)
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1", "--text", text, "--json")
    found = json.loads(captured.out)
    assert code == 0 and f"wrote {tmp_path / 'out'}" in captured.err.splitlines()
    assert (found["model"], found["out"], found["tensors"]) == (
        source,
        str(tmp_path / "out"),
        {"changed": 12, "all": 30},
    )
    assert [layers[0]["num_kv_heads"] for layers in (found["before"]["layers"], found["after"]["layers"])] == [2, 1]
    sizes = found["before"]["kv_cache"], found["after"]["kv_cache"]
    assert [(each["dtype"], each["bytes_per_token"]) for each in sizes] == [("float32", 384), ("float32", 192)]
    measured = measure_divergence(
        models.load(tmp_path / "source"),
        models.load(tmp_path / "out"),
        tokens_of(source, text.read_text()),
    )
    assert found["compared"]["tokens"] == 63
    # Sums of fp32 in another order, by another kernel.
    assert found["compared"]["loss"]["after"] == pytest.approx(measured.loss_after, rel=1e-5)
    assert found["usable"] is True and found["next"][:2] == ["qkv", "uptrain"]
    again = json.loads(run(capsys, source, "--kv-heads", "1", "--dry-run", "--text", text, "--json")[1].out)
    assert again["out"] is None and again["compared"]["loss"] == found["compared"]["loss"]
    assert again["next"][-1] == "--json" and "--dry-run" not in again["next"]
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    found = json.loads(run(capsys, source, "--kv-heads", "1", "--dry-run", "--json")[1].out)
    assert (found["usable"], found["compared"]) == (None, {"why_not": "the model has no tokenizer"})


def tokens_of(folder, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :64]


@pytest.mark.parametrize(
    ("before", "after", "usable", "said"),
    [
        (2.0, 2.0004, True, "usable: the loss is the same"),
        (2.0, 2.9, True, "usable: the loss is up by 0.900 nats a token"),
        (2.0, 3.0, True, "usable: the loss is up by 1.000 nats a token"),
        (2.0, 3.01, False, "not usable until trained: the loss is up by 1.010 nats a token, of which 1 is the most"),
        (2.0, 1.5, True, "usable: the loss is down by 0.500 nats a token"),
        (2.0, math.inf, False, "not usable until trained: the loss is up by inf nats a token, of which 1 is the most"),
        (2.0, math.nan, False, "not usable until trained: its loss is not a number"),
        (math.nan, math.nan, None, "not known whether it is usable: the loss of the original is not a number"),
    ],
)
def test_a_model_is_usable_up_to_one_nat(before, after, usable, said):
    from qkv.cli.reports import verdict

    assert verdict.is_usable(before, after) is usable
    assert verdict.describe(before, after, "until trained") == said


def test_an_unusable_model_is_called_that(capsys, tmp_path, monkeypatch):
    from qkv.cli.reports import verdict

    monkeypatch.setattr(verdict, "MOST", 0.001)  # a random model has little to lose
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    options = ("--kv-heads", "1", "--pool", "mean")
    code, captured = run(capsys, source, tmp_path / "out", *options, "--json")
    found = json.loads(captured.out)
    loss = found["compared"]["loss"]
    assert code == 0 and loss["after"] - loss["before"] > 0.001 and found["usable"] is False
    captured = run(capsys, source, *options, "--dry-run")[1]
    assert "\n  not usable until trained: the loss is up by 0.022 nats a token, of which" in captured.out


@pytest.mark.parametrize(("heads", "remedy"), [(2, "Give fewer: 1."), (1, "It has no fewer to pool to.")])
def test_as_many_heads_as_there_are_is_refused(capsys, tmp_path, heads, remedy):
    source = tiny_model.save(tiny_model.llama(num_key_value_heads=heads), tmp_path / "source")
    for more in ((), ("--dry-run",), ("--window", "8")):
        code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", heads, *more)
        assert (code, captured.out, (tmp_path / "out").exists()) == (1, "", False)
        noun = "head" if heads == 1 else "heads"
        already = f"{source} has {heads} KV {noun} already, so nothing would be pooled. {remedy}\n"
        assert captured.err.endswith(f"qkv: --kv-heads: {already}")


def test_a_model_on_the_hub_is_downloaded(capsys, tmp_path, monkeypatch):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    asked = []

    def snapshot_download(name, *, ignore_patterns):
        asked.append((name, "*.bin" in ignore_patterns, "*.safetensors" in ignore_patterns))
        return source

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "someone/llama", "out", "--kv-heads", "1")[0] == 0
    assert asked == [("someone/llama", True, False)]
    assert models.load(tmp_path / "out").config.num_key_value_heads == 1

    def fail(name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    code, captured = run(capsys, "someone/llama", "other", "--kv-heads", "1")
    assert (code, captured.out) == (1, "")
    assert "qkv: could not download 'someone/llama' from the Hub. ConnectionError: no route\nCheck the" in captured.err


def test_overwriting_needs_the_option(capsys, tmp_path, llama):
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
    ("place", "message"),
    [("source/out", "must not contain the source"), ("none/out", "none does not exist; create it")],
)
def test_outputs_are_checked_first(capsys, tmp_path, place, message):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    code, captured = run(capsys, source, tmp_path / place, "--kv-heads", "1")
    assert (code, captured.out, "reading" in captured.err) == (1, "", False)
    assert message in captured.err


def test_report_comes_before_a_comparison_that_fails(capsys, tmp_path, llama, monkeypatch):
    from qkv.cli import convert

    def fail(*arguments):
        raise CommandError("no memory")

    monkeypatch.setattr(convert, "compare_with", fail)
    code, captured = run(capsys, llama, tmp_path / "out", "--kv-heads", "2")
    assert (code, captured.out.splitlines()[0]) == (1, f"wrote {tmp_path / 'out'}")
    assert captured.err.endswith("\nqkv: no memory\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-heads", "3"], 1, "num_kv_heads must divide the model's 8 KV heads (8, 4, 2, 1); got 3."),
        (["--kv-heads", "0"], 2, "Invalid value for '--kv-heads': it must be at least 1; got 0."),
        ([], 2, "give --kv-heads, --latent, --window or --like."),
        (["--kv-heads", "2", "--latent", "8"], 2, "give either --kv-heads or --latent."),
        (["--kv-heads", "2", "--rope-heads", "1"], 2, "--rope-heads belongs to --latent."),
        (["--latent", "8", "--pool", "first"], 2, "--pool belongs to --kv-heads."),
        (["--window", "8", "--pool", "first"], 2, "--pool belongs to --kv-heads."),
        (["--latent", "8", "--window", "5"], 2, "--window and --like do not go with --latent."),
        (["--latent", "8", "--like", "r.json"], 2, "--window and --like do not go with --latent."),
        (["--window", "8", "--like", "r.json"], 2, "--like gives window and layers; give either it or --window and"),
        (["--layers", "1", "--like", "r.json"], 2, "--like gives window and layers; give either it or --window and"),
        (["--kv-heads", "2", "--layers", "1"], 2, "--layers belongs to --window."),
        (["--kv-heads", "2", "--sink-tokens", "1"], 2, "--sink-tokens belongs to --window."),
        (
            ["--window", "8", "--sink-tokens", "4"],
            1,
            "qkv: --sink-tokens: a configuration of transformers has windows ",
        ),
        (["--window", "8", "--sink-tokens", "4"], 1, "with qkv.SlidingKVCache(window, sink_tokens)."),
        (["--window", "8", "--sink-tokens", "-1"], 2, "Invalid value for '--sink-tokens'"),
        (["--window", "0"], 2, "Invalid value for '--window': it must be at least 1; got 0."),
        (["--window", "1"], 1, "window must be an integer, at least 2 "),
        (
            ["--window", "8", "--layers", "2-1"],
            2,
            "--layers: it must be like 0,2,5-9, with ranges that ascend; got '2-1'.",
        ),
        (
            ["--window", "8", "--layers", "0,,2"],
            2,
            "--layers: it must be like 0,2,5-9, with ranges that ascend; got ''.",
        ),
        (
            ["--window", "8", "--layers", "-1"],
            2,
            "--layers: it must be like 0,2,5-9, with ranges that ascend; got '-1'.",
        ),
        (
            ["--window", "8", "--layers", "0-99999"],
            2,
            "--layers: it must be like 0,2,5-9, with ranges that ascend; got ",
        ),
        (["--window", "8", "--layers", "0,3"], 1, "must be one or more of 0 to 2, since the model has 3; got [0, 3]."),
        (["--window", "8", "--layers", "0-1,1"], 1, "layers must differ; got layer 1 more than once."),
        (["--latent", "65"], 1, "rank must be from 1 to 64, the full one; got 65."),
        (["--latent", "8", "--rope-heads", "9"], 1, "rope_heads must be from 1 to 8, the KV heads; got 9."),
        (["--kv-heads", "2", "--pool", "median"], 2, "'median' is not one of 'mean', 'first', 'random', 'aligned'."),
        (["--kv-heads", "2", "--window", "5"], 1, "a ministral model, which has no biases; got attention_bias."),
    ],
)
def test_invalid_conversions_are_refused(capsys, tmp_path, llama, arguments, code, message):
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
    assert "Pickled weights such as pytorch_model.bin can execute code and are never loaded" in captured.err


def test_result_generates_with_its_tokenizer(capsys, tmp_path):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    assert run(capsys, source, tmp_path / "out", "--kv-heads", "1")[0] == 0
    demo = ["demo", "--model", str(tmp_path / "out"), "--prompt", "attention is", "--max-new-tokens", "4", "--json"]
    assert main(demo) == 0
    (layer,) = json.loads(capsys.readouterr().out)["attention"]
    assert (layer["num_heads"], layer["num_kv_heads"]) == (6, 1)


def loss(folder, token_ids):
    """In nats a token, by transformers' own formula."""
    model = models.load(folder)
    with torch.no_grad():
        return model(token_ids, labels=token_ids).loss.item()


def test_predictions_are_compared_on_a_text(capsys, tmp_path):
    from transformers import AutoTokenizer

    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("attention is a weighted sum of the values " * 30)
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1", "--text", text)
    assert code == 0
    # The model takes 64 tokens, of which the first is not predicted.
    token_ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt").input_ids[:, :64]
    before, after = (loss(tmp_path / folder, token_ids) for folder in ("source", "out"))
    found = measure_divergence(models.load(tmp_path / "source"), models.load(tmp_path / "out"), token_ids)
    assert found.kl > 0
    assert words(captured.out).split(" predictions ")[1].split(" usable:")[0] == (
        f"of 63 tokens of {text} loss {before:.3f} -> {after:.3f} nats a token "
        f"perplexity {math.exp(before):.1f} -> {math.exp(after):.1f} "
        f"KL divergence {found.kl:.3f} nats a token, same most probable token: {found.agreement:.1%}"
    )


def test_equal_heads_predict_the_same_on_the_built_in_text(capsys, tmp_path):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    model = models.load(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[8:] = projection.weight[:8]
    model.save_pretrained(source)
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1")
    assert code == 0
    shown = words(captured.out)
    assert " predictions of 63 tokens of the beginning of On the Origin of Species " in shown
    assert " KL divergence 0.000 nats a token, same most probable token: 100.0% usable: the loss is the same " in shown
    assert shown.endswith(f"Next: qkv demo --model {tmp_path / 'out'} --prompt 'Once upon a time'")


def test_large_models_are_loaded_only_when_asked_to(capsys, tmp_path, monkeypatch):
    from qkv.models import divergence

    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    monkeypatch.setattr(divergence, "MAX_BYTES", 1000)
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1")
    assert (code, "loading" in captured.err) == (0, False)
    expected = "not compared: the weights take 146.4 KiB, more than 1000 B; give --text not known whether"
    assert expected in words(captured.out)
    (tmp_path / "text.txt").write_text("attention is")
    options = ("--kv-heads", "1", "--overwrite", "--text", tmp_path / "text.txt")
    assert " predictions of 1 token of " in words(run(capsys, source, tmp_path / "out", *options)[1].out)


def test_tokenizer_that_cannot_be_loaded_stops_only_what_needs_it(capsys, tmp_path, llama):
    shutil.copytree(llama, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text("attention is")
    text = ("--text", tmp_path / "text.txt")
    code, captured = run(capsys, tmp_path / "source", tmp_path / "out", "--kv-heads", "2", *text)
    assert (code, captured.out, (tmp_path / "out").exists()) == (1, "", False)
    assert "cannot load the configuration or tokenizer of" in captured.err
    code, captured = run(capsys, tmp_path / "source", tmp_path / "out", "--kv-heads", "2")
    assert code == 0
    assert " predictions not compared: cannot load the configuration or tokenizer of" in words(captured.out)


def test_tokenizer_of_another_model_is_detected(capsys, tmp_path, llama):
    source = tiny_model.save(tiny_model.llama(vocab_size=4), tmp_path / "source")
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1")
    assert code == 0
    assert "belongs to another model: it gives token 13, but the model's vocabulary has 4 tokens." in words(
        captured.out
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "qkv: --text: cannot read {}: No such file or directory."),
        (b"attention \xff", "qkv: --text: {} must be UTF-8; got invalid start byte at byte 10."),
        (b"attention", "qkv: --text: {} must have at least two tokens; give a longer text."),
    ],
)
def test_texts_that_are_refused(capsys, tmp_path, content, message):
    source = tiny_model.save(tiny_model.llama(), tmp_path / "source")
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    code, captured = run(capsys, source, tmp_path / "out", "--kv-heads", "1", "--text", text)
    assert (code, captured.out, captured.err.splitlines()[-1]) == (1, "", message.format(text))
    assert not (tmp_path / "out").exists()


def test_gguf_file_is_unpacked_first(capsys, tmp_path, monkeypatch):
    """The loading itself is that of ``qkv demo``, and has its tests there."""
    from qkv.models import model_folder
    from qkv.models.language_model import LanguageModel

    folder = tiny_model.save(tiny_model.llama(), tmp_path / "model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    asked = []

    def load(source, dtype, progress):
        from transformers import AutoTokenizer

        asked.append((source.gguf_file, dtype))
        return LanguageModel("model", models.load(folder), AutoTokenizer.from_pretrained(folder))

    monkeypatch.setattr(model_folder, "load", load)
    assert run(capsys, tmp_path / "model.gguf", tmp_path / "out", "--kv-heads", "1")[0] == 0
    assert asked == [("model.gguf", torch.float32)]
    assert models.load(tmp_path / "out").config.num_key_value_heads == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not any((tmp_path / "out").glob("*.gguf"))


def test_truncated_gguf_file_is_refused(capsys, tmp_path):
    """Known before anything is loaded."""
    name = b"output.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 16, 8, 0, 0)
    (tmp_path / "cut.gguf").write_bytes((b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor).ljust(96 + 511))
    code, captured = run(capsys, tmp_path / "cut.gguf", tmp_path / "out", "--kv-heads", "1")
    assert code == 1 and "Traceback" not in captured.err
    assert (
        f"{tmp_path / 'cut.gguf'} is truncated: it has 607 bytes, but by its header tensor 'output.weight'"
        in captured.err
    )
    assert not (tmp_path / "out").exists()


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
