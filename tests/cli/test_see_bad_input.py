"""What `qkv see` says to input that it cannot use, or in part: no traceback, no half-written file, nothing silent."""

import json
import random

import pytest
import torch
import transformers
from cli import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkv.analysis.pricing import _Stack
from qkv.cli import main
from qkv.cli.see import reading

WORDS = random.Random(0).choices(tiny_model.WORDS, k=60)
SIZES = {**tiny_model.SIZES, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
HOSTILE = "</script><img", "onerror=alert(1)>", "<!--", "]]>", '"', "&lt;", "{{script}}", "\u202eabc", "\u200fx"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model.save(tiny_model.llama(num_hidden_layers=5), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS))
    return str(path)


def see_it(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = main(["see", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def report_of(capsys, *arguments):
    code, out, err = see_it(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments):
    """The message of a command that did nothing."""
    code, out, err = see_it(capsys, *arguments)
    assert (code, out) == (1, "") and "recording" not in err
    return err


def data_of(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def mistral(path, layers, **changes):
    config = tiny_model.llama(num_hidden_layers=layers).to_dict() | {"sliding_window": 7, **changes}
    config.pop("model_type")
    return tiny_model.save(transformers.MistralConfig(**config), path)


def test_a_window_as_long_as_the_text(capsys, llama, text):
    says = "a window of {} cuts nothing of 60 tokens; give a longer text or a smaller window."
    assert says.format(60) in refused(capsys, llama, "--text", text, "--window", "4", "--window", "60")
    assert says.format("58 and 2 sink tokens") in refused(
        capsys, llama, "--text", text, "--window", "58", "--sink-tokens", "2"
    )
    assert report_of(capsys, llama, "--text", text, "--window", "57", "--sink-tokens", "2")["windows"] == [57]


def test_a_text_longer_than_the_context(capsys, llama, tmp_path):
    long, page = tmp_path / "long.txt", tmp_path / "page.html"
    long.write_text(" ".join(WORDS * 2))
    code, out, _ = see_it(capsys, llama, "--text", str(long), "--out", str(page))
    assert code == 0 and out.startswith(f"{llama} on long.txt: 64 tokens (the first; 56 left out)")
    assert "64 tokens of the text; 56 more were left out" in page.read_text(encoding="utf-8")
    assert f"--tokens must fit into the context of {llama}, 64 tokens; got 65. Give 64 or fewer." in refused(
        capsys, llama, "--text", str(long), "--tokens", "65"
    )
    assert report_of(capsys, llama, "--text", str(long), "--tokens", "64")["tokens"] == 64


def test_tokens_left_out_are_counted_only_where_all_were_read(capsys, llama, tmp_path):
    long, page = tmp_path / "long.txt", tmp_path / "page.html"
    long.write_text(" ".join(WORDS * 20))
    found = report_of(capsys, llama, "--text", str(long), "--tokens", "9")
    assert (found["tokens"], found["tokens_left_out"]) == (9, None)
    code, out, _ = see_it(capsys, llama, "--text", str(long), "--tokens", "9", "--out", str(page))
    assert code == 0 and "9 tokens (the first; the rest left out)" in out.splitlines()[0]
    assert "9 tokens of the text; the rest was left out" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must contain a text; got none"),
        (b" \n\t", "must contain a text; got none"),
        (b"\xff\xfeq", "must be UTF-8; got invalid start byte at byte 0"),
        ("a \ud83d b".encode("utf-8", "surrogatepass"), "must be UTF-8; got invalid continuation byte at byte 2"),
        (b"attention", "--text: the text must have at least two tokens; got 1. Give a longer text."),
    ],
)
def test_a_text_that_is_none(capsys, llama, tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert message in refused(capsys, llama, "--text", str(path))


def test_the_first_characters_of_a_large_file_are_read(capsys, llama, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(" ".join(WORDS).encode() * 10_000 + b"\xff")
    assert report_of(capsys, llama, "--text", str(path))["tokens_left_out"] is None
    assert "the text must have at least two tokens; got 1. Give more --tokens." in refused(
        capsys, llama, "--text", str(path), "--tokens", "1"
    )


def test_the_tokenizer_of_another_model(capsys, text, tmp_path):
    model = tiny_model.save(tiny_model.llama(vocab_size=12), tmp_path / "model")
    assert f"the tokenizer of {model} belongs to another model: it gives token 14, but" in refused(
        capsys, model, "--text", text
    )
    both = transformers.T5Config(
        vocab_size=12, d_model=48, d_kv=8, d_ff=40, num_layers=1, num_heads=6, decoder_start_token_id=0
    )
    model = tiny_model.save(both, tmp_path / "both", auto="AutoModelForSeq2SeqLM")
    short = tmp_path / "short.txt"
    short.write_text("is a sum")
    assert "it gives token 14" in refused(capsys, model, "--text", str(short), "--target", text)


def test_layers_without_heads_of_keys(capsys, text, tmp_path):
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    sizes = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    config = transformers.Qwen3NextConfig(**SIZES | {"num_hidden_layers": 4}, **sizes, **experts, layer_types=kinds)
    model, page = tiny_model.save(config, tmp_path / "model"), tmp_path / "page.html"
    found = report_of(capsys, model, "--text", text)
    assert found["without_heads"] == ["model.layers.0", "model.layers.2", "model.layers.3"]
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.1.self_attn"]
    code, out, _ = see_it(capsys, model, "--text", text, "--out", str(page))
    assert code == 0 and "not shown: layers 0, 2-3 keep no keys by heads" in out
    assert '<p class="not">Layers 0, 2-3 keep no keys by heads.</p>' in page.read_text(encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 15}
    mamba = tiny_model.save(transformers.MambaConfig(**sizes), tmp_path / "mamba")
    code, out, err = see_it(capsys, mamba, "--text", text, "--out", str(tmp_path / "none.html"))
    assert (code, out) == (1, "") and not (tmp_path / "none.html").exists()
    assert "a layer of MambaForCausalLM must have heads of keys that queries attend to; got no call of one" in err


def test_models_that_have_windows_already(capsys, text, tmp_path):
    model = mistral(tmp_path / "all", 3)
    for more in ([], ["--measure"]):
        code, out, err = see_it(capsys, model, "--text", text, "--window", "4", "--window", "8", *more)
        assert (code, out) == (1, "") and "measuring" not in err
        assert "qkv: --window 8: layers 0-2 see 7 keys at most; give a smaller window.\n" in err
    assert "--window 7: layers 0-2 see 7 keys" in see_it(capsys, model, "--text", text, "--window", "7")[2]
    assert see_it(capsys, model, "--text", text, "--window", "6")[0] == 0
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma2Config(**SIZES, layer_types=kinds, sliding_window=7)
    model, page = tiny_model.save(config, tmp_path / "some"), tmp_path / "page.html"
    code, out, _ = see_it(capsys, model, "--text", text, "--window", "9", "--window", "5", "--out", str(page))
    assert code == 0 and "--window 9 hides nothing more where layers 0, 2 see 7 keys at most" in out.splitlines()
    assert "--window 5 hides" not in out
    assert "A window of 9 hides nothing where layers 0, 2 see 7 keys at most." in page.read_text(encoding="utf-8")
    cuts = [layer["cut_by_kv_head"] for layer in report_of(capsys, model, "--text", text, "--window", "9")["layers"]]
    assert cuts[0] == cuts[2] == [[0, 0]] and min(cuts[1][0]) > 0


def test_queries_and_keys_that_are_not_finite(capsys, llama, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    number = tiny_model.WORDS.index("weighted") + 2
    model.model.embed_tokens.weight.data[number] = 1e30  # finite, and the norm of it is not
    model.model.embed_tokens.weight.data[number, 3] = torch.inf
    for layer in model.model.layers[1:]:  # what layer 0 makes of it goes no further
        layer.self_attn.q_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    last, page = tmp_path / "last.txt", tmp_path / "page.html"
    last.write_text(" ".join(word for word in WORDS if word != "weighted") + " weighted")
    count = len(last.read_text().split())
    arguments = (str(tmp_path / "model"), "--text", str(last), "--window", "9")
    found = report_of(capsys, *arguments)
    assert [layer["queries_without_number"] for layer in found["layers"]] == [6] * 5, "the last query of each head"
    assert all(1 <= number <= count for layer in found["layers"] for number in layer["keys_in_effect"])
    assert all(0 < cut < 1 for layer in found["layers"] for cut in layer["cut_by_kv_head"][0])
    code, out, _ = see_it(capsys, *arguments, "--out", str(page))
    says = "that have no number, for NaN or inf, and are left out of the means: 6 in layer 0, 6 in layer 1"
    assert code == 0 and says in " ".join(out.split()) and says in page.read_text(encoding="utf-8")
    for layer in data_of(page.read_text(encoding="utf-8"))["layers"]:
        blocks = layer["map_shape"][0]
        assert layer["map_gaps"] == [blocks * head + blocks - 1 for head in range(6)]
        assert all(number is not None for name in ("keys_in_effect", "distance", "sinks") for number in layer[name])
    # A first token that all later queries see leaves no number at all, and no cut of 0.
    first = tmp_path / "first.txt"
    first.write_text("weighted " + " ".join(word for word in WORDS if word != "weighted"))
    found = report_of(capsys, str(tmp_path / "model"), "--text", str(first), "--window", "9")
    assert found["layers"][0]["queries_without_number"] == 6 * count
    assert found["layers"][0]["keys_in_effect"] == [None] * 6
    assert found["layers"][0]["cut_by_kv_head"] == [[None, None]]
    code, out, err = see_it(capsys, arguments[0], "--text", str(first), "--window", "9", "--measure")
    assert (code, out) == (1, "") and f"must have a finite loss at each token; {count - 1} are not" in err


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["4"], "--kv-heads: num_kv_heads must divide the model's 2 KV heads (2, 1); got 4"),
        (["1", "3"], "--kv-heads: num_kv_heads must divide the model's 2 KV heads (2, 1); got 3"),
        (["2"], "--kv-heads: kv_heads must be fewer than the model's 2; got 2"),
    ],
)
def test_kv_heads_that_do_not_divide_are_found_before_the_model_is_loaded(capsys, llama, text, heads, message):
    options = [option for number in heads for option in ("--kv-heads", number)]
    err = refused(capsys, llama, "--text", text, *options, "--measure")
    assert message in err and "loading the model" not in err


def test_softcap_sinks_and_biases_have_their_own_numbers(capsys, text, tmp_path):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny_model.save(transformers.GptOssConfig(**SIZES, **experts, sliding_window=7), tmp_path / "model")
    found = report_of(capsys, model, "--text", text)["layers"]
    assert all(0.1 < share < 1 for layer in found for share in layer["sinks"])


@pytest.mark.parametrize("place", ["a folder", "a file", "no folder", "a link"])
def test_a_page_that_cannot_be_written_is_found_before_the_work(capsys, llama, text, tmp_path, place):
    page = {"no folder": tmp_path / "none" / "page.html"}.get(place, tmp_path / "page.html")
    if place == "a folder":
        page.mkdir()
    if place == "a file":
        page.write_text("old")
    if place == "a link":
        page.symlink_to(tmp_path / "nowhere")
    says = {
        "a folder": "must be a file; it is a folder",
        "a file": "exists; give another name, or --overwrite",
        "no folder": "does not exist; make it first",
        "a link": "exists; give another name, or --overwrite",
    }
    err = refused(capsys, llama, "--text", text, "--out", str(page))
    assert says[place] in err and "loading" not in err
    assert place != "a file" or page.read_text() == "old"


def test_a_page_that_would_be_too_large_is_found_before_the_work(capsys, llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 200_000)
    page = tmp_path / "page.html"
    arguments = (llama, "--text", text, "--out", str(page), "--window", "9")
    assert see_it(capsys, *arguments)[0] == 0
    size = len(page.read_text(encoding="utf-8"))
    page.unlink()
    monkeypatch.setattr(reading, "LARGEST", 140_000)
    err = refused(capsys, *arguments)  # 5 layers of 6 heads, 60 by 60 blocks in 8 bits, in base64
    assert "--out: the page would have 0.1 MB or more" in err and "maps of 5 layers of 6 heads take 0.1 MB" in err
    assert 140_000 < 4 * 5 * 6 * 60 * 60 // 3 < size and not page.exists()
    monkeypatch.setattr(reading, "LARGEST", 145_000)
    assert see_it(capsys, *arguments, "--overwrite")[0] == 0
    err = refused(capsys, *arguments, "--overwrite", "--measure")
    assert "and the losses of 60 tokens, 11 times, 0.0 MB. Give fewer --tokens, or fewer of --window" in err


def interrupted_at(monkeypatch, number):
    """Has the user press Ctrl-C at that measurement."""
    calls, measured = [], _Stack.loss_from

    def loss_from(stack, layer):
        calls.append(layer)
        if len(calls) == number:
            raise KeyboardInterrupt
        return measured(stack, layer)

    monkeypatch.setattr(_Stack, "loss_from", loss_from)


def test_what_was_measured_before_an_interrupt_is_written(capsys, llama, text, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    arguments = (llama, "--text", text, "--window", "9", "--window", "5", "--measure", "--most", "9")
    whole = report_of(capsys, *arguments)
    assert all(price["layers_unmeasured"] is None for price in whole["prices"])
    interrupted_at(monkeypatch, 1 + 10 + 1 + 3)  # one to see what can be skipped, a window, the same, two layers
    code, out, err = see_it(capsys, *arguments, "--json", "--out", str(page))
    assert code == 130 and "interrupted; what had been measured before is written" in err
    found = json.loads(out)
    assert found["prices"][0] == whole["prices"][0]
    measured = found["prices"][1]
    assert measured["layers"] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert measured["layers_unmeasured"] == 3 and measured["together"] == []
    assert measured["increase_by_layer"] == whole["prices"][1]["increase_by_layer"][:2]
    assert found["proposal"]["window"] == whole["prices"][0]["window"]
    written = page.read_text(encoding="utf-8")
    assert written.rstrip().endswith("</html>")
    assert "Interrupted: 2 of 5 layers measured, in the order of their calls." in written
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    interrupted_at(monkeypatch, 1 + 2)
    code, out, _ = see_it(capsys, *arguments)
    assert code == 130 and "interrupted: 1 of 5 layers measured, in the order of their calls" in out.splitlines()


def test_an_interrupt_before_the_first_layer_writes_nothing(capsys, llama, text, tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 2)
    page = tmp_path / "page.html"
    code, out, _ = see_it(capsys, llama, "--text", text, "--window", "9", "--measure", "--out", str(page))
    assert (code, out) == (130, "") and list(tmp_path.iterdir()) == []


def test_hostile_tokens_names_and_texts(capsys, tmp_path):
    words = (*tiny_model.WORDS, *HOSTILE)
    folder = tmp_path / "mo\x1b[2Jdel\u202e<img>"
    folder.mkdir()
    config = tiny_model.llama(vocab_size=len(words) + 2, max_position_embeddings=200)
    model = tiny_model.save(config, folder, words=words)
    path = tmp_path / "te\x1bxt\u202e.txt"
    path.write_text(" ".join([*WORDS, *words]))
    page = tmp_path / "page.html"
    arguments = (model, "--text", str(path), "--window", "9", "--measure", "--out", str(page))
    code, out, _ = see_it(capsys, *arguments)
    assert code == 0 and "\x1b" not in out and "\u202e" not in out
    written = page.read_text(encoding="utf-8")
    assert "\x1b" not in written and "\u202e" not in written
    assert written.count("</script>") == 2 and "<img" not in written
    assert data_of(written)["tokens"][60:] == list(words)


def test_either_name_of_the_option_of_sink_tokens(capsys, llama, text):
    one, other = (
        report_of(capsys, llama, "--text", text, "--window", "4", name, "2") for name in ("--sinks", "--sink-tokens")
    )
    assert one == other and one["sink_tokens"] == 2
    for name in ("--sinks", "--sink-tokens"):
        assert main(["convert", llama, "none", "--window", "4", name, "2"]) == 1
        assert (
            "--sink-tokens: a configuration of transformers has windows without sink tokens" in capsys.readouterr().err
        )
