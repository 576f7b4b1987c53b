"""`qkv see`: its document, compared with `record` and `price`; its report, and wrong input."""

import json
import random
import re

import pytest
import torch
from cli import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
)

from qkv.analysis import losses, price, record
from qkv.cli import main
from qkv.convert import agreement_by_layer

NAMES = ["scaled dot-product", "multi-head", "cross", "causal", "sliding-window", "multi-query", "grouped-query"]
WORDS = random.Random(0).choices(tiny_model.WORDS, k=60)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model.save(tiny_model.llama(num_hidden_layers=5), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS))
    return str(path)


def _see(capsys, *arguments):
    code = main(["see", *arguments])
    return code, capsys.readouterr()


def _report(capsys, *arguments):
    code, captured = _see(capsys, *arguments, "--json")
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_without_a_model_the_seven_mechanisms_are_shown(capsys):
    code, captured = _see(capsys)
    assert code == 0 and captured.err == ""
    blocks = captured.out.split("\n\n")[1:8]
    names = [re.sub("^[#. ]*", "", block.splitlines()[0]) for block in blocks]
    assert names == NAMES
    pictures = [[line[2:10].strip() for line in block.splitlines()] for block in blocks]
    assert pictures[3] == ["#" * (i + 1) + "." * (7 - i) for i in range(8)]
    assert pictures[4] == ["".join("#" if i - 3 < j <= i else "." for j in range(8)) for i in range(8)]
    assert pictures[2] == ["####"] * 8
    assert f"{8 * sum(min(i + 1, 512) for i in range(4096)):,} scores, 1.0 MiB" in blocks[4]
    assert max(map(len, captured.out.splitlines())) <= 80


def test_the_document_has_the_numbers_of_record_and_price(capsys, llama, text):
    arguments = ("--window", "9", "--window", "4", "--sinks", "2", "--kv-heads", "1", "--measure", "--most", "9")
    found = _report(capsys, llama, "--text", text, *arguments)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = AutoTokenizer.from_pretrained(llama)(" ".join(WORDS), return_tensors="pt").input_ids
    want = record(model, ids, windows=[4, 9], sink_tokens=2)
    assert (found["text"], found["tokens"], found["tokens_left_out"]) == ("words.txt", 60, 0)
    assert found["windows"] == [4, 9] and found["sink_tokens"] == 2
    for layer, expected in zip(found["layers"], want.layers, strict=True):
        assert (layer["name"], layer["window"], layer["kv_heads"]) == (expected.name, None, 2)
        torch.testing.assert_close(torch.tensor(layer["cut_by_kv_head"]), expected.cut_by_kv_head()[:, 0])
        torch.testing.assert_close(torch.tensor(layer["change_by_head"]), expected.change_by_head()[:, 0])
        torch.testing.assert_close(torch.tensor(layer["keys_in_effect"]), expected.keys_in_effect[0].mean(-1))
    assert [each["change"] for each in found["prices"]] == [
        "a window of 4 tokens and 2 sink tokens",
        "a window of 9 tokens and 2 sink tokens",
        "1 KV head by aligned pooling",
    ]
    expected = price(model, ids, window=9, sink_tokens=2, together=[1, 2, 3, 4, 5])
    measured = found["prices"][1]
    torch.testing.assert_close(torch.tensor(measured["increase_by_layer"]), expected.by_layer)
    assert measured["loss"] == pytest.approx(expected.loss.mean().item())
    assert [tuple(some["layers"]) for some in measured["together"]] == [some.layers for some in expected.together]
    a_token = 2 * 16 * 4
    assert found["cache_bytes"] == 5 * 60 * a_token
    assert [some["cache_bytes"] for some in measured["together"]] == [
        ((5 - k) * 60 + k * 11) * a_token for k in range(1, 6)
    ]
    assert found["prices"][2]["together"][0]["cache_bytes"] == 5 * 60 * a_token // 2
    (agreement,) = found["agreements"]
    of_layers = agreement_by_layer(model.state_dict(), model.config.to_dict(), 1)
    assert agreement["change"] == "1 KV head by aligned pooling"
    for layer, one in zip(agreement["layers"], of_layers, strict=True):
        torch.testing.assert_close(torch.tensor(layer["keys"]), one.keys)
        torch.testing.assert_close(torch.tensor(layer["values"]), one.values)
        assert layer["groups"] == [[0, 1]]
    proposal = found["proposal"]
    assert (proposal["window"], proposal["sink_tokens"], proposal["layers"]) == (4, 2, [0, 1, 2, 3, 4])
    token = measured["costly_tokens"][0]
    increase = (expected.together[-1].loss - expected.loss)[0]
    assert token["position"] == increase.argmax() + 1
    assert token["increase"] == pytest.approx(increase.max().item(), abs=1e-6)
    assert token["token"] == WORDS[token["position"]]


def test_the_report_says_it_in_words(capsys, llama, text):
    code, captured = _see(capsys, llama, "--text", text, "--tokens", "40", "--window", "9", "--measure", "--most", "9")
    assert code == 0
    lines = captured.out.splitlines()
    assert lines[0] == f"{llama} on words.txt: 40 tokens (the first; 20 left out)"
    assert lines[1:3] == ["5 layers of 6 query heads on 2 KV heads of width 8", "25.0 KiB of keys and values"]
    assert _rows(lines, "What layers attend to, in the mean over queries and heads")[0][:3] == ["0", "all", "keys"]
    assert "If one layer had a window of 9 tokens: loss 2." in captured.out
    assert "For 9 nats a token or less: a window of 9 tokens in 5 of 5 layers, 0-4." in lines
    assert "With --json, qkv convert MODEL OUT --like REPORT.json writes that." in lines
    assert max(map(len, lines[1:])) <= 80
    _, captured = _see(capsys, llama, "--text", text, "--window", "9", "--measure", "--most", "0", "--sinks", "1")
    assert "for 0 nats a token or less; see --most." in captured.out or "qkv.SlidingKVCache has them." in captured.out


def _rows(lines, start):
    """The words of the rows below a title and a heading, up to the first line that is no row of it."""
    first = lines.index(start) + 2
    found = []
    for line in lines[first:]:
        if not re.match(r" *\d+ ", line):
            break
        found.append(line.split())
    return found


def test_layers_come_in_the_order_of_their_change_before_all_else(capsys, llama, text):
    windows = ("--window", "20", "--window", "4", "--window", "9")
    code, captured = _see(capsys, llama, "--text", text, *windows, "--sinks", "1")
    assert code == 0
    lines = captured.out.splitlines()
    assert lines[4] == "What windows of 4 and 9 would change, the least by 4 first"
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = AutoTokenizer.from_pretrained(llama)(" ".join(WORDS), return_tensors="pt").input_ids
    want = record(model, ids, windows=[4, 9, 20], sink_tokens=1)
    change = torch.stack(
        [layer.cut.change[n, 0, :, w:].mean(-1).max() for n, w in enumerate((4, 9, 20)) for layer in want.layers]
    )
    change, cut = change.view(3, 5), want.cut_by_layer().T
    for start, shown in ((lines[4], (0, 1)), ("What a window of 20 would change, the least first", (2,))):
        rows = _rows(lines, start)
        order = change[shown[0]].argsort().tolist()
        assert [int(row[0]) for row in rows] == order != sorted(order)
        for row in rows:
            numbers = [x for n in shown for x in (change[n, int(row[0])], cut[n, int(row[0])])]
            assert row[1:] == [f"{100 * x:.1f}%" for x in numbers]
    assert "cut: the weight on keys that a window hides (it shows 1 sink token), of the KV" in lines
    assert len(_rows(lines, "What layers attend to, in the mean over queries and heads")) == 5


def test_agreement_and_reach_are_in_the_report_and_in_the_document(capsys, llama, text):
    arguments = (llama, "--text", text, "--window", "9", "--kv-heads", "1", "--measure", "--most", "9")
    code, captured = _see(capsys, *arguments)
    assert code == 0
    lines = captured.out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    of_layers = agreement_by_layer(model.state_dict(), model.config.to_dict(), 1)
    rows = _rows(lines, "How alike KV heads are, for 1 KV head by aligned pooling: 1 for the same")
    numbers = [n for layer in of_layers for n in (layer.keys[0, 1].item(), layer.values[0, 1].item())]
    assert [row[:2] for row in rows] == [[str(n), kind] for n in range(5) for kind in ("keys", "values")]
    assert [row[2:] for row in rows] == [["0,", "1", f"{n:.3f}", f"{n:.3f}"] for n in numbers]
    mean = [sum(numbers[kind::2]) / 5 for kind in range(2)]
    words = f"agree by {mean[0]:.2f} in keys and {mean[1]:.2f} in values"
    assert words in " ".join(captured.out.split())
    rows = _rows(lines, "The proposal: how many tokens token 7 reaches")
    assert rows == [["0", "1", "1"], *([str(n), "9", str(1 + 8 * n), str(1 + 8 * n)] for n in range(1, 6))]
    (reach,) = _report(capsys, *arguments)["reaches"]
    assert (reach["what"], reach["position"], reach["windows"]) == ("The proposal", 7, [9] * 5)
    assert reach["allowed"] == reach["measured"] == [1 + 8 * n for n in range(6)]


def test_what_a_token_attends_to(capsys, llama, text):
    arguments = ("--text", text, "--query", "41", "--query", "-1", "--query", "59")
    layers = _report(capsys, llama, *arguments, "--layer", "3", "--layer", "1")["layers"]
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(llama)(" ".join(WORDS), return_tensors="pt").input_ids
    eager = model(ids, output_attentions=True).attentions
    for n, layer in enumerate(layers):
        assert [row["position"] for row in layer["queries"]] == ([41, 59] if n in (1, 3) else [])
        for row in layer["queries"]:
            assert row["token"] == WORDS[row["position"]] and len(row["heads"]) == 6
            for head, found in enumerate(row["heads"]):
                weights = eager[n][0, head, row["position"]]
                assert found["weights"] == pytest.approx(weights[found["keys"]].tolist(), abs=1e-5)
                assert found["tokens"] == [WORDS[key] for key in found["keys"]]
                most = weights.sort(descending=True).values[: len(found["keys"])].sum().item()
                assert found["covered"] == pytest.approx(most, abs=1e-5)
    code, captured = _see(capsys, llama, *arguments, "--layer", "3")
    lines = captured.out.splitlines()
    assert code == 0 and max(map(len, lines[1:])) <= 80
    first = lines.index(f"What token 41, [{WORDS[41]}], attends to in layer 3")
    head, count, share, weight, token, key = lines[first + 3].split()[:6]
    found = layers[3]["queries"][0]["heads"][1]
    assert (head, int(count), share) == ("1", len(found["keys"]), f"{100 * found['covered']:.1f}%")
    assert (weight, token, int(key)) == (
        f"{100 * found['weights'][0]:.1f}%",
        f"[{found['tokens'][0]}]",
        found["keys"][0],
    )
    assert "in layer 1" not in captured.out and "--layer shows other layers." not in lines
    lines = _see(capsys, llama, *arguments)[1].out.splitlines()
    assert f"What token 59, [{WORDS[59]}], attends to in layer 2" in lines and "--layer shows other layers." in lines


def test_the_page_is_written_whole_or_not_at_all(capsys, llama, text, tmp_path):
    out = tmp_path / "page.html"
    arguments = (llama, "--text", text, "--window", "9", "--measure", "--out", str(out))
    code, captured = _see(capsys, *arguments)
    assert code == 0 and f"wrote {out}" in captured.err and "If one layer had a window of 9" in captured.out
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "words.txt" in page and "default-src 'none'" in page
    assert "Which KV heads are alike?" not in page
    code, captured = _see(capsys, *arguments)
    assert (code, captured.out) == (1, "")
    assert captured.err == f"qkv: --out: {out} exists; give another name, or --overwrite.\n"
    out.write_text("old")
    assert _see(capsys, *arguments, "--overwrite")[0] == 0
    assert out.read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_has_all_pictures_of_what_was_asked(capsys, llama, text, tmp_path):
    out = tmp_path / "page.html"
    arguments = ("--query", "30", "--layer", "1", "--kv-heads", "1", "--most", "9", "--out", str(out))
    code, captured = _see(capsys, llama, "--text", text, "--window", "9", "--window", "6", "--measure", *arguments)
    assert code == 0 and "not measured" not in captured.err
    page = out.read_text(encoding="utf-8")
    rows = re.search(r"<caption>The proposal: tokens that one token reaches</caption>(.*?)</table>", page)
    assert rows is not None and "<caption>As it is: tokens" not in page
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", rows[1])]
    assert [row[2:] for row in found[1:]] == [[str(1 + 5 * n)] * 2 for n in range(6)]
    assert "reach of token 7." in page and "hidden states out of reach, all are equal in bits." in page
    assert "Agreement of KV heads, for 1 KV head by aligned pooling" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    seven, layers = data["seven"], data["layers"]
    assert (seven["layer"], seven["query"], seven["window"], seven["columns"]) == ("1", 30, 6, 60)
    assert [layer["map"] is not None for layer in layers] == [n == 1 for n in range(5)]
    assert [row["query"] for row in layers[1]["rows"]] == [30] and layers[0]["rows"] == []


def test_another_model_is_compared_on_the_text(capsys, llama, text, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(llama)
    torch.nn.init.normal_(other.model.layers[1].self_attn.v_proj.weight)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    found = _report(capsys, llama, "--text", text, "--against", str(tmp_path))["against"]
    ids = AutoTokenizer.from_pretrained(llama)(" ".join(WORDS), return_tensors="pt").input_ids
    before, after = (losses(model.eval(), ids) for model in (AutoModelForCausalLM.from_pretrained(llama), other))
    assert (found["model"], found["loss_before"]) == (str(tmp_path), pytest.approx(before.mean().item()))
    assert found["loss"] == pytest.approx(after.mean().item())
    assert found["costly_tokens"][0]["position"] == (after - before).argmax() + 1
    _, captured = _see(capsys, llama, "--text", text, "--against", str(tmp_path))
    assert f"Against {tmp_path}: loss {before.mean():.4f} to {after.mean():.4f}" in captured.out
    assert "Tokens that it predicts worse, in nats" in captured.out
    small = tiny_model.save(tiny_model.llama(vocab_size=12), tmp_path / "small")
    code, captured = _see(capsys, llama, "--text", text, "--against", small)
    assert code == 1 and "--against" in captured.err and "it has 12, and the text has token 14" in captured.err


def test_a_proposal_is_converted_and_costs_what_the_report_says(capsys, llama, text, tmp_path):
    arguments = ("--text", text, "--window", "9", "--measure")
    increases = [some["increase"] for some in _report(capsys, llama, *arguments)["prices"][0]["together"]]
    found = _report(capsys, llama, *arguments, "--most", str(max(0.0, sorted(increases)[2])))
    report, out = tmp_path / "report.json", str(tmp_path / "out")
    report.write_text(json.dumps(found))
    assert main(["convert", llama, out, "--like", str(report)]) == 0
    capsys.readouterr()
    assert _report(capsys, out, "--text", text)["cache_bytes"] == found["proposal"]["cache_bytes"]
    loss = _report(capsys, llama, "--text", text, "--against", out)["against"]
    assert loss["loss"] - loss["loss_before"] == pytest.approx(found["proposal"]["increase"], abs=1e-5)
    windows = [layer["window"] for layer in _report(capsys, out, "--text", text)["layers"]]
    assert [index for index, window in enumerate(windows) if window == 9] == found["proposal"]["layers"]
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(out)(" ".join(WORDS), return_tensors="pt").input_ids
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    assert loss["loss"] == pytest.approx(-logits.gather(1, ids[0, 1:, None]).mean().item(), abs=1e-5)


def test_windows_that_a_model_has_already(capsys, text, tmp_path):
    def mistral(layers, **changes):
        config = tiny_model.llama(num_hidden_layers=layers).to_dict() | {"sliding_window": 7, **changes}
        config.pop("model_type")
        return tiny_model.save(MistralConfig(**config), tmp_path / str(layers))

    model = mistral(2)
    found = _report(capsys, model, "--text", text, "--window", "4", "--measure", "--most", "9")
    assert [layer["window"] for layer in found["layers"]] == [7, 7]
    assert found["cache_bytes"] == 2 * 7 * 2 * 16 * 4
    assert found["proposal"]["layers"] == [0, 1]
    code, captured = _see(capsys, model, "--text", text, "--window", "9", "--measure")
    assert code == 1 and "--window 9: layers 0-1 see 7 keys at most; give a smaller window." in captured.err
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
    sizes = {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
    config = Gemma2Config(**tiny_model.SIZES | {"num_hidden_layers": 5}, **sizes, layer_types=kinds, sliding_window=7)
    model = tiny_model.save(config, tmp_path / "gemma")
    found = _report(capsys, model, "--text", text, "--window", "9", "--measure", "--most", "9")
    assert [some["layers"] for some in found["prices"][0]["together"]][-1] == [1, 3, 4]
    assert found["proposal"]["layers"] == [1, 3, 4]
    assert found["proposal"]["cache_bytes"] == (2 * 7 + 3 * 9) * 2 * 16 * 4
    assert _see(capsys, model, "--text", text, "--window", "9", "--measure", "--kv-heads", "1")[0] == 0


def test_the_report_says_whether_convert_can_write_it(capsys, text, tmp_path, llama):
    def end(model, *arguments):
        code, captured = _see(capsys, model, "--text", text, "--measure", "--most", "9", *arguments)
        assert code == 0 and max(map(len, captured.out.splitlines()[1:])) <= 80
        return " ".join(captured.out.partition("Keys and values:")[2].split())

    assert end(llama, "--window", "9").endswith("With --json, qkv convert MODEL OUT --like REPORT.json writes that.")
    assert end(llama, "--window", "9", "--sinks", "1").endswith("qkv.SlidingKVCache has them.")
    assert "window must be an integer, at least 2" in end(llama, "--window", "1")
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 15,
        "num_attention_heads": 6,
        "intermediate_size": 40,
    }
    neox = tiny_model.save(GPTNeoXConfig(**sizes), tmp_path / "neox")
    assert "the configuration of a gpt_neox model cannot express a window" in end(neox, "--window", "9")


def test_numbers_that_are_not_finite_are_null(capsys, llama, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    found = _report(capsys, llama, "--text", text, "--against", str(tmp_path))["against"]
    assert found["loss"] is None and found["costly_tokens"][0]["increase"] is None
    code, captured = _see(capsys, str(tmp_path), "--text", text, "--window", "9", "--measure", "--json")
    assert (code, captured.out) == (1, "") and "must have a finite loss at each token; 59 are not" in captured.err


def test_letters_of_tokens_that_would_move_the_cursor_are_escaped(capsys, llama, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS) + "\x1b[2J ‮ </script>")
    code, captured = _see(capsys, llama, "--text", str(path), "--window", "9", "--measure")
    assert code == 0 and "\x1b" not in captured.out and "‮" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{llama}", "--text", "{text}", "--window", "60"], 1, "--window: a window of 60 cuts nothing of 60 tokens"),
        (["{llama}", "--text", "{text}", "--window", "0"], 2, "it must be at least 1; got 0"),
        (["{llama}", "--text", "{text}", "--measure"], 2, "--measure needs --window or --kv-heads"),
        (["{llama}", "--text", "{text}", "--kv-heads", "1"], 2, "--kv-heads needs --measure"),
        (["{llama}", "--text", "{text}", "--kv-heads", "4", "--measure"], 1, "divide the model's 2 KV heads (2, 1)"),
        (["{llama}", "--text", "none.txt"], 1, "--text: cannot read none.txt: No such file or directory"),
        (["{llama}", "--text", "{empty}"], 1, "must contain a text; got none"),
        (["{llama}", "--text", "{bytes}"], 1, "must be UTF-8; got invalid start byte at byte 0"),
        (["{llama}", "--text", "{text}", "--tokens", "1"], 1, "the text must have at least two tokens; got 1"),
        (["none", "--text", "{text}", "--bogus"], 2, "No such option"),
        (["{mamba}", "--text", "{text}"], 1, "must have heads of keys that queries attend to"),
        (["--window", "4"], 2, "options need a MODEL"),
        (["--most", "4"], 2, "options need a MODEL"),
        (["{llama}", "--text", "{text}", "--query", "60"], 1, "60 tokens that are read, -60 to 59; got 60."),
        (["{llama}", "--text", "{text}", "--query", "-61"], 1, "60 tokens that are read, -60 to 59; got -61."),
        (["{llama}", "--text", "{text}", "--query", "1", "--layer", "5"], 1, "that attends, 0-4; got 5."),
        (["{llama}", "--text", "{text}", "--window", "4", "--sinks", "56"], 1, "56 sink tokens cuts nothing of 60"),
        (["{llama}", "--text", "{text}", "--sinks", "9" * 20], 2, "Input should be less than or equal to"),
        (["{llama}", "--text", "{text}", "--against", "none!"], 1, "'none!' is not an existing file or folder"),
        (["{llama}", "--text", "{text}", "--out", "{text}", "--overwrite"], 1, "is the text; give another name"),
        (["{llama}", "--text", "{text}", "--out", "/proc/page.html"], 1, "--out: cannot write into /proc"),
    ],
)  # fmt: skip
def test_wrong_input(capsys, tmp_path, llama, text, arguments, code, message):
    files = {"llama": llama, "text": text}
    for name, content in {"empty": b" \n", "bytes": b"\xff"}.items():
        (tmp_path / name).write_bytes(content)
        files[name] = str(tmp_path / name)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 15}
    if "{mamba}" in arguments:
        files["mamba"] = tiny_model.save(MambaConfig(**sizes), tmp_path / "mamba")
    found, captured = _see(capsys, *(argument.format(**files) for argument in arguments))
    assert found == code
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == "" and "Traceback" not in captured.err
