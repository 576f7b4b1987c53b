"""`qkv bench` from end to end, on a few tokens."""

import json
import os

import pytest
import torch

from qkv.bench import command as bench
from qkv.bench import peak_memory
from qkv.bench.mechanisms import LIBRARIES, OURS, TORCH, Sizes, mechanisms
from qkv.cli import main

TINY = ("--length", "24", "--heads", "6", "--head-dim", "8", "--window", "5", "--rounds", "2")
NAMES = [
    "scaled dot-product",
    "multi-head",
    "cross",
    "causal",
    "sliding-window",
    "multi-query",
    "grouped-query",
]


@pytest.fixture
def threads():
    """Those of torch, which a command may change."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def _bench(capsys, *options):
    code = main(["bench", *TINY, *options])
    return code, capsys.readouterr()


def _report(capsys, *options):
    code, captured = _bench(capsys, "--json", *options)
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_text(capsys):
    code, captured = _bench(capsys, "--kv-heads", "2")
    assert code == 0
    lines = captured.out.splitlines()
    assert lines[0].startswith("1 sequence of 24 tokens, head_dim 8, float32, forward, ")
    assert lines[1].endswith(f" against torch {torch.__version__}")
    time, memory = lines[3:12], lines[13:]
    assert time[0] == "Time of a call, median of 2 interleaved rounds"
    assert time[1].split() == ["heads", "keys", "backend", "qkv", "torch", "torch", "/", "qkv"]
    assert [line[2:20].strip() for line in time[2:]] == NAMES
    assert time[4].split()[1:5] == ["6", "on", "6", "12"]
    assert time[8].split()[1:5] == ["6", "on", "2", "24"]
    assert memory[1].split() == ["KV", "cache", "peak", "of", "qkv", "peak", "of", "torch"]
    # 24 tokens * 6 heads * (8 + 8) numbers * 4 bytes = 9 KiB; a window of 5 tokens keeps 1920 bytes.
    assert [line[2:].removeprefix(name).split()[:2] for line, name in zip(memory[2:], NAMES, strict=True)] == [
        ["1.5", "KiB"],
        ["9.0", "KiB"],
        ["4.5", "KiB"],
        ["9.0", "KiB"],
        ["1.9", "KiB"],
        ["1.5", "KiB"],
        ["3.0", "KiB"],
    ]
    assert all(len(line) <= 80 for line in time[1:] + memory[1:])
    assert "\x1b" not in captured.out + captured.err
    assert captured.err == "measuring memory ...\nmeasuring time ...\n"


def test_json(capsys, threads):
    report = _report(capsys, "--batch", "3", "--dtype", "bfloat16", "--threads", "1")
    assert (report["threads"], report["rounds"], report["versions"]["torch"]) == (1, 2, torch.__version__)
    assert report["sizes"] == {
        "batch": 3,
        "length": 24,
        "num_heads": 6,
        "num_kv_heads": 1,
        "head_dim": 8,
        "window": 5,
        "dtype": "bfloat16",
        "decode": False,
        "backward": False,
    }
    rows = report["mechanisms"]
    assert [row["mechanism"] for row in rows] == NAMES
    assert rows[4]["mask"] == "Mask.causal(window=5)"
    assert rows[4]["kv_bytes"] == 3 * 5 * 6 * 16 * 2
    for row in rows:
        assert row["backend"] in ("native", "sdpa")
        assert row["ratio"] == row["torch"]["median_us"] / row["qkv"]["median_us"]
        for library in ("qkv", "torch"):
            assert 0 < row[library]["low_us"] <= row[library]["median_us"] <= row[library]["high_us"]
            assert row[library]["peak_bytes"] >= 0


def test_decoding_has_one_query(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda *call: 0)
    rows = _report(capsys, "--decode")["mechanisms"]
    assert [(row["num_queries"], row["num_keys"]) for row in rows] == [(1, 12 if n == "cross" else 24) for n in NAMES]


def test_backward(capsys, threads, monkeypatch):
    """Of two mechanisms: a gradient in a forked process takes half a second, for each mechanism and library."""
    monkeypatch.setattr(bench, "mechanisms", lambda sizes: mechanisms(sizes)[3:5])
    code, captured = _bench(capsys, "--backward", "--threads", "1")
    assert code == 0
    assert "24 tokens, head_dim 8, float32, forward and backward, 1 thread\n" in captured.out
    assert [line.split()[0] for line in captured.out.splitlines()[5:7]] == NAMES[3:5]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_both_libraries_compute_the_same(decode, backward):
    sizes = Sizes(2, 24, 6, 3, 8, 5, torch.float32, decode, backward)
    for mechanism in mechanisms(sizes):
        inputs = mechanism.inputs()
        ours, theirs = (mechanism.prepare(library, inputs)() for library in (OURS, TORCH))
        assert len(ours) == len(theirs) == (3 if backward else 1)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, n=mechanism.name: f"{n}: {m}")


@pytest.mark.skipif("not hasattr(__import__('os'), 'fork')", reason="memory is measured in forked processes")
def test_peak_memory_includes_the_window_mask_of_torch_and_the_results():
    """A mask of 1024 * 1024 numbers of 4 bytes; results of 16 * 1024 * 64 numbers, nothing of it in the inputs."""
    window = mechanisms(Sizes(1, 1024, 16, 16, 64, 8, torch.float32, False, False))[4]
    peaks = {library: peak_memory.peak_memory(window, library) for library in LIBRARIES}
    results = 16 * 1024 * 64 * 4
    assert results * 0.9 < peaks[OURS] < results + 1024 * 1024 * 4
    assert peaks[TORCH] > results + 1024 * 1024 * 4


def test_too_little_memory_is_reported(capsys):
    code, captured = _bench(capsys, "--length", "30000000", "--batch", "100000")
    assert (code, captured.out) == (1, "")
    message = captured.err.splitlines()[-1]
    assert message.startswith("qkv: scaled dot-product attention fails on qkv, probably out of memory: ")
    assert message.endswith(" Give a smaller --length, --batch or --heads.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "Invalid value for '--length': it must be at least 1; got 0."),
        (["--threads", "-1"], "Invalid value for '--threads': it must be at least 1; got -1."),
        (["--threads", "99999"], f"it must be at most {os.cpu_count()}; got 99999."),
        (
            ["--rounds", "1"],
            "Invalid value for '--rounds': it must be at least 2, for quartiles; got 1.",
        ),
        (["--kv-heads", "4"], "Invalid value for '--kv-heads': it must divide --heads, 6; got 4."),
        (
            ["--decode", "--backward"],
            "'--decode' / '--backward': decoding has no backward pass; give only one of the two",
        ),
        (["--dtype", "float64"], "'float64' is not one of 'float32', 'bfloat16', 'float16'."),
    ],
)
def test_wrong_usage(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "mechanisms", None)
    code, captured = _bench(capsys, *arguments)
    assert (code, captured.out) == (2, "")
    assert message in captured.err


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (8, 2), (9, 1), (12, 3), (14, 2), (32, 8)])
def test_kv_heads_are_a_quarter_of_the_heads_or_the_next_divisor_below(monkeypatch, capsys, heads, kv_heads):
    chosen = []
    monkeypatch.setattr(bench, "mechanisms", lambda sizes: chosen.append(sizes) or [])
    assert _bench(capsys, "--heads", str(heads))[0] == 0
    assert chosen[0].num_kv_heads == kv_heads
