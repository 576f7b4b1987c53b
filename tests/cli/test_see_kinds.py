"""`qkv see` of encoders and encoder-decoders: groups of layers, what is read of texts, and prices of decoders."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from cli import tiny_model
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from qkv.analysis import record
from qkv.cli import main

WORDS = random.Random(0).choices(tiny_model.WORDS, k=60)
TARGET = random.Random(1).choices(tiny_model.WORDS, k=20)
SIZES = {**tiny_model.SIZES, "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 6}
IDS = {"bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 1}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SIZES, max_position_embeddings=64),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, max_position_embeddings=64),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=15, dim=48, n_layers=2, n_heads=6, hidden_dim=40, max_position_embeddings=64, pad_token_id=1
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, **IDS, max_position_embeddings=64, local_attention=8, global_attn_every_n_layers=2
    ),
}
T5 = {"vocab_size": 15, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 6, "pad_token_id": 1}
BART = {"vocab_size": 15, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40}
BART |= {"decoder_ffn_dim": 40, "encoder_attention_heads": 6, "decoder_attention_heads": 6}
BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
BOTH = {
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
    "bart": lambda: transformers.BartConfig(**BART),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            auto = "AutoModelForSeq2SeqLM" if name in BOTH else "AutoModelForMaskedLM"
            path = tmp_path_factory.mktemp(name)
            made[name] = tiny_model.save({**ENCODERS, **BOTH}[name](), path, auto=auto, has_ends=True)
        return made[name]

    return of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    (path / "words.txt").write_text(" ".join(WORDS))
    (path / "target.txt").write_text(" ".join(TARGET))
    return str(path / "words.txt"), str(path / "target.txt")


def _report(capsys, *arguments):
    code = main(["see", *arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_recorded_as_in_python(capsys, folder, texts, name):
    found = _report(capsys, folder(name), "--text", texts[0], "--window", "4")
    model = AutoModel.from_pretrained(folder(name)).eval()
    ids = AutoTokenizer.from_pretrained(folder(name))(" ".join(WORDS), return_tensors="pt").input_ids
    assert ids.shape == (1, 62) and (found["tokens"], found["tokens_left_out"]) == (62, 0)
    want = record(model, ids, windows=[4])
    assert [layer["group"] for layer in found["layers"]] == ["encoder"] * 2
    for layer, expected in zip(found["layers"], want.layers, strict=True):
        torch.testing.assert_close(torch.tensor(layer["keys_in_effect"]), expected.keys_in_effect[0].mean(-1))
        torch.testing.assert_close(torch.tensor(layer["cut_by_kv_head"]), expected.cut_by_kv_head()[:, 0])
    assert found["cache_bytes"] == 0 and found["proposal"] is None


def test_the_report_and_the_page_of_an_encoder_are_without_a_cache(capsys, folder, texts, tmp_path):
    page = tmp_path / "page.html"
    assert main(["see", folder("modernbert"), "--text", texts[0], "--window", "4", "--out", str(page)]) == 0
    captured = capsys.readouterr()
    assert "of keys and values" not in captured.out
    lines = captured.out.splitlines()
    rows = [line.split() for line in lines]
    first = lines.index("What layers attend to, in the mean over queries and heads") + 2
    assert rows[first][:3] == ["0", "all", "keys"] and rows[first + 1][:5] == ["1", "5", "keys", "a", "side"]
    assert "What a window of 4 would change, the least first" in captured.out
    written = page.read_text(encoding="utf-8")
    assert "An encoder keeps no keys." in written
    assert "a query (down) sees 5 keys to each side, its own counted, at most (across)" in written


def test_a_window_of_an_encoder_that_has_windows(capsys, folder, texts):
    assert main(["see", folder("modernbert"), "--text", texts[0], "--window", "9"]) == 0
    assert "--window 9 hides nothing more where layer 1 sees 5 keys a side at most" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--measure", "--window", "4"], ["--against", "{other}"]])
def test_an_encoder_has_no_price(capsys, folder, texts, options):
    options = [option.format(other=folder("bert")) for option in options]
    assert main(["see", folder("bert"), "--text", texts[0], *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "loading the model" not in captured.err
    assert "--measure and --against need the loss of each token by those before it" in captured.err
    assert f"{folder('bert')} predicts none" in captured.err


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_text_of_an_encoder_is_cut_before_its_last_special_token(capsys, folder, texts, tmp_path, name):
    long = tmp_path / "long.txt"
    long.write_text(" ".join(WORDS * 2))
    model = folder(name)
    limit = {"bert": 64, "roberta": 62}[name]  # positions of RoBERTa start after that of padding
    assert _report(capsys, model, "--text", str(long))["tokens_left_out"] == 122 - limit
    page = tmp_path / "page.html"
    assert main(["see", model, "--text", str(long), "--tokens", "9", "--out", str(page)]) == 0
    assert capsys.readouterr().out.startswith(f"{model} on long.txt: 9 tokens (the first; the rest left out)")
    data = json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert data["tokens"] == ["<unknown>", *WORDS[:7], "<end>"]
    assert main(["see", model, "--text", str(long), "--tokens", "100"]) == 1
    assert f"--tokens must fit into the context of {model}, {limit} tokens; got 100" in capsys.readouterr().err


def test_a_model_without_a_head_is_recorded_and_has_no_price(capsys, texts, tmp_path):
    model = tiny_model.save(tiny_model.llama(), tmp_path, auto="AutoModel")
    assert [layer["group"] for layer in _report(capsys, model, "--text", texts[0])["layers"]] == ["decoder"] * 3
    assert main(["see", model, "--text", texts[0], "--window", "4", "--measure"]) == 1
    assert "as an encoder or a model without a head" in capsys.readouterr().err


def test_an_encoder_decoder_without_its_head_is_refused(capsys, texts, tmp_path):
    config = transformers.BartConfig(**BART, tie_word_embeddings=False)
    model = tiny_model.save(config, tmp_path, auto="AutoModel")
    assert main(["see", model, "--text", texts[0], "--target", texts[1]]) == 1
    says = "must have all weights of BartForConditionalGeneration; it lacks lm_head.weight. Give a complete"
    assert says in capsys.readouterr().err


def _expected(folder, changed=None, window=None):
    """Losses of the target by eager attention, with a window in a layer of the decoder, in fp64."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ".join(WORDS), return_tensors="pt").input_ids
    labels = tokenizer(text_target=" ".join(TARGET), return_tensors="pt").input_ids
    shifted = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1)

    def narrow(module, args, kwargs):
        name = "mask" if "mask" in kwargs else "attention_mask"
        mask = kwargs[name]
        query, key = (torch.arange(n) for n in mask.shape[2:])
        hidden = key <= query[:, None] - window
        return args, {**kwargs, name: mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    if changed is not None:
        model.get_submodule(changed).register_forward_pre_hook(narrow, with_kwargs=True)
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=shifted, use_cache=False).logits
    return F.cross_entropy(logits[0], labels[0], reduction="none")


@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_decoder_has_three_groups_and_prices_of_its_decoder(capsys, folder, texts, name):
    model = folder(name)
    options = ["--text", texts[0], "--target", texts[1]]
    found = _report(capsys, model, *options, "--window", "4", "--measure", "--most", "9")
    assert (found["text"], found["tokens"]) == (
        "target.txt",
        23,
    )  # what decoders start with, and what the tokenizer puts around 20 words
    assert found["context"] == {"text": "words.txt", "tokens": 62, "tokens_left_out": 0}
    assert [layer["group"] for layer in found["layers"]] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    a_token = 6 * 16 * 4
    assert found["cache_bytes"] == 2 * (23 + 62) * a_token
    (measured,) = found["prices"]
    want = _expected(model)
    assert measured["loss"] == pytest.approx(want.mean().item(), abs=1e-5)
    assert len(measured["layers"]) == 2
    for layer, increase in zip(measured["layers"], measured["increase_by_layer"], strict=True):
        expected = (_expected(model, layer, 4) - want).mean().item()
        assert abs(expected) > 1e-5 and increase == pytest.approx(expected, abs=2e-6)
    assert found["proposal"]["layers"] == [0, 1]
    assert found["proposal"]["cache_bytes"] == 2 * (4 + 62) * a_token
    # A window longer than the target hides keys of the encoder alone; with prices, none.
    cuts = [layer["cut_by_kv_head"] for layer in _report(capsys, model, *options, "--window", "30")["layers"]]
    assert all(cut > 0 for layer in cuts[:2] for cut in layer[0])
    assert cuts[2] == [[0] * 6] and cuts[3] is None
    assert main(["see", model, *options, "--window", "30", "--measure"]) == 1
    assert "--window: a window of 30 cuts nothing of 23 tokens" in capsys.readouterr().err


def test_the_report_of_an_encoder_decoder(capsys, folder, texts, tmp_path):
    page, model = tmp_path / "page.html", folder("t5")
    options = ["--text", texts[0], "--target", texts[1], "--window", "4", "--measure", "--out", str(page)]
    assert main(["see", model, *options, "--most", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{model} on target.txt: 23 tokens, after words.txt: 62 tokens"
    titles = [line.strip() for line in lines if "what layers attend to" in line]
    assert [title.partition(":")[0] for title in titles] == ["Encoder", "Decoder", "Cross-attention"]
    below = [lines[n + 2].split()[:3] for n, line in enumerate(lines) if "what layers attend to" in line]
    assert below == [["0", "all", "keys"], ["0", "all", "keys"], ["0", "a", "context"]]
    changes = [line.partition(":")[0] for line in lines if "what a window of 4 would change" in line]
    assert changes == ["Encoder", "Decoder"]
    assert "For 9 nats a token or less: a window of 4 tokens in 2 of 2 layers, 0-1." in lines
    end = " ".join(" ".join(lines[-4:]).split())
    assert "cannot express a window" in end or "must be one of" in end
    written = page.read_text(encoding="utf-8")
    assert "23 tokens of the text, and 62 tokens of words.txt for the encoder" in written
    assert '"label":"cross 1"' in written and "Layers encoder 0-1 in effect" in written


@pytest.mark.parametrize("name", BOTH)
def test_encoder_decoders_are_compared_by_their_targets(capsys, folder, texts, tmp_path, name):
    other = AutoModelForSeq2SeqLM.from_pretrained(folder(name))
    torch.manual_seed(0)
    for parameter in other.get_decoder().parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder(name)).save_pretrained(tmp_path)
    options = ["--text", texts[0], "--target", texts[1], "--against", str(tmp_path)]
    found = _report(capsys, folder(name), *options)["against"]
    assert found["loss_before"] == pytest.approx(_expected(folder(name)).mean().item(), abs=1e-5)
    assert found["loss"] == pytest.approx(_expected(tmp_path).mean().item(), abs=1e-5)
    assert found["loss"] != pytest.approx(found["loss_before"], abs=1e-4)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("t5", [], "--target: {t5} is an encoder-decoder, which reads --text and writes another text"),
        ("bert", ["--target", "{target}"], "--target is for encoder-decoders; {bert} is not one"),
        ("t5", ["--target", "{target}", "--kv-heads", "2", "--measure"], "--kv-heads: {t5} is an encoder-decoder"),
        ("t5", ["--target", "none.txt"], "--target: cannot read none.txt"),
        ("t5", ["--target", "{empty}"], "--target: {empty} must contain a text; got none"),
        (
            "t5",
            ["--target", "{target}", "--against", "{bert}"],
            "must be of the kind of {t5}, encoder-decoder; got enc",
        ),
        ("t5", ["--target", "{target}", "--out", "{target}", "--overwrite"], "--out: {target} is the target"),
        ("t5", ["--target", "{target}", "--window", "62"], "a window of 62 cuts nothing of 62 tokens"),
    ],
)
def test_options_that_do_not_belong_to_a_kind(capsys, folder, texts, tmp_path, model, options, message):
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    files = {"t5": folder("t5"), "bert": folder("bert"), "target": texts[1], "empty": str(empty)}
    assert main(["see", files[model], "--text", texts[0], *(option.format(**files) for option in options)]) == 1
    captured = capsys.readouterr()
    assert message.format(**files) in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert "recording" not in captured.err


@pytest.mark.parametrize("name", BOTH)
def test_a_token_of_the_target_has_keys_in_the_layers_of_the_decoder(capsys, folder, texts, tmp_path, name):
    options = [folder(name), "--text", texts[0], "--target", texts[1], "--query", "3", "--layer", "1"]
    page = tmp_path / "page.html"
    found = _report(capsys, *options, "--out", str(page))
    groups = {kind: [] for kind in ("encoder", "decoder", "cross")}
    for layer in found["layers"]:
        groups[layer["group"]].append(layer["queries"])
    assert groups["encoder"] == [[], []] and groups["decoder"][0] == groups["cross"][0] == []
    own, cross = groups["decoder"][1], groups["cross"][1]
    assert [query["position"] for query in own] == [query["position"] for query in cross] == [3]
    for head in own[0]["heads"]:
        assert {*head["keys"]} <= {0, 1, 2, 3}
        assert len(head["tokens"]) == len(head["keys"]) > 0
    assert all(head["tokens"] is None and max(head["keys"]) < 62 for head in cross[0]["heads"])
    assert main(["see", *options]) == 0
    out = capsys.readouterr().out
    assert "attends to in layer decoder 1\n" in out and "attends to in layer cross 1\n" in out
    assert "attends to in layer encoder" not in out
    data = json.loads(page.read_text(encoding="utf-8").split('type="application/json" id="data">')[1].split("</")[0])
    assert [len(layer["rows"]) for layer in data["layers"]] == [0, 0, 0, 0, 1, 1]
