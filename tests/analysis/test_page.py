"""The page of a `Seen`, without a browser: its numbers, its safety and its size. In one: test_page_in_browser.py."""

import base64
import hashlib
import itertools
import json
import math
import re
import struct
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from analysis.planted import HOSTILE, NAMES, TOKENS, WINDOWS, Draw, layer_record, planted, prices
from families.small import build
from torch import Tensor

from qkv import Mask, look
from qkv.analysis import Against, Reach, Recording, Seen, Seven, price, record
from qkv.analysis.page import charts, document, page_of
from qkv.analysis.page.data import even_maps
from qkv.byte_sizes import unit_of, written_round

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

MOST = 0.05


class Parsed(HTMLParser):
    """Elements in order with their attributes, and the text in each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.declarations: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def policy(self) -> dict[str, list[str]]:
        (given,) = [meta["content"] for meta in self.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        assert given is not None
        directives = [directive.split() for directive in given.split(";")]
        return {name: values for name, *values in directives}


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def decoded(coded: dict[str, Any]) -> list[float]:
    raw = base64.b64decode(coded["codes"])
    codes = struct.unpack(f"<{len(raw) // 2}h", raw)
    return [math.nan if code == -32768 else code * coded["step"] for code in codes]


def check_codes(coded: dict[str, Any], expected: Tensor) -> None:
    found = decoded(coded)
    assert len(found) == expected.numel() > 0
    for got, wanted in zip(found, expected.flatten().tolist(), strict=True):
        if math.isnan(wanted):
            assert math.isnan(got)
        else:
            assert abs(got - wanted) <= 0.51 * coded["step"]
    most = expected.nan_to_num().abs().max().item()
    assert coded["step"] <= (most / 32_000 if most else 1)


def mean(numbers: Tensor) -> float | None:
    known = [number for number in numbers.tolist() if not math.isnan(number)]
    return sum(known) / len(known) if known else None


def check_layer(found: dict[str, Any], layer: Any) -> None:
    """Numbers of a layer, averaged here one by one."""
    assert (found["name"], found["heads"], found["kv_heads"]) == (layer.name, layer.heads, layer.kv_heads)
    sinks = layer.sinks.first + layer.sinks.learned
    for name, numbers in {
        "keys_in_effect": layer.keys_in_effect,
        "distance": layer.distance.mean,
        "spread": layer.distance.spread,
        "sinks": sinks,
    }.items():
        assert found[name] == [
            None if m is None else pytest.approx(m, rel=1e-5, abs=1e-6) for m in map(mean, numbers[0])
        ]
    for n, window in enumerate(layer.windows):
        expected = [mean(head[window:]) for head in layer.cut.mass[n, 0]]  # query i has i + 1 keys
        assert found["cut"][n] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        expected = [mean(head[window:]) for head in layer.cut.change[n, 0]]
        assert found["change"][n] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert [row["query"] for row in found["rows"]] == list(layer.queries)
    for n, row in enumerate(found["rows"]):
        assert len(row["heads"]) == layer.heads
        for head, given in enumerate(row["heads"]):
            keys = [key for key in layer.top.keys[0, head, n].tolist() if key >= 0]
            assert given["keys"] == keys
            assert given["weights"] == pytest.approx(layer.top.weights[0, head, n, : len(keys)].tolist(), rel=1e-5)
            assert given["covered"] == pytest.approx(layer.top.covered[0, head, n].item(), rel=1e-5)
    codes = base64.b64decode(found["map"])
    heads, rows, columns = layer.map.mean.shape[1:]
    assert found["map_shape"] == [rows, columns] and len(codes) == heads * rows * columns
    for code, weight in zip(codes, layer.map.mean.flatten().tolist(), strict=True):
        assert abs((code / 255) ** 2 - weight) <= 0.0041
        assert (code == 0) == (weight == 0)


def check_data(page: str, seen: Seen) -> None:
    data = data_of(page)
    assert data["tokens"] == list(seen.tokens)
    assert data["windows"] == list(seen.recording.windows)
    assert data["sink_tokens"] == seen.recording.sink_tokens
    for found, layer in zip(data["layers"], seen.recording.layers, strict=True):
        check_layer(found, layer)
    for found, given in zip(data["prices"], seen.prices, strict=True):
        assert found["change"] == given.change
        check_codes(found["loss"], given.loss[0])
        for coded, increase in zip(found["alone"], given.increase, strict=True):
            check_codes(coded, increase[0])
        assert found["by_layer"] == pytest.approx([mean(row[0]) for row in given.increase], rel=1e-5)
        for some, together in zip(found["together"], given.together, strict=True):
            assert some["layers"] == list(together.layers)
            check_codes(some["tokens"], (together.loss - given.loss)[0])
            assert some["increase"] == pytest.approx(mean((together.loss - given.loss)[0]), rel=1e-5)


def test_the_script_gets_the_numbers_of_seen() -> None:
    seen = planted()
    check_data(page_of(seen, MOST), seen)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_page_of_a_model_that_was_recorded_and_priced(name: str) -> None:
    model = build(name)
    token_ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    recording = record(model, token_ids, windows=[9, 5], sink_tokens=2, queries=[30, -1])
    window = price(model, token_ids, window=5, sink_tokens=2, together=[0, 1, 2])
    tokens = tuple(f" t{index}" for index in token_ids[0].tolist())
    seen = Seen("a/b", "text", tokens, 0, 4, recording, (window,))
    page = page_of(seen, MOST)
    check_data(page, seen)
    assert len(page) <= 250_000
    if name == "gemma2":
        assert "a query (down) sees 7 keys at most (across)" in page


MASKS = {
    "causal": Mask.causal(),
    "window": Mask.causal(window=6),
    "window and sinks": Mask.causal(window=6, sink_tokens=2),
    "full": Mask.full(),
    "chunks": Mask.causal() & Mask.chunked(8),
    "documents": Mask.causal() & Mask.documents(torch.arange(23)[None] // 9),
    "padding": Mask.causal() & Mask.padding((torch.arange(23) >= 5)[None]),
    "dense, by head": Mask.dense(torch.rand(1, 3, 23, 23, generator=torch.Generator().manual_seed(1)) > 0.6),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows_at_once", [4, 256])
def test_an_even_map_is_that_of_equal_scores(name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkv.analysis.page.data.ROWS_AT_ONCE", rows_at_once)
    q = torch.zeros(1, 3, 23, 8)
    layer = layer_record("x", Mask.causal(), 3, 1, 23, 5, Draw(0), ())._replace(mask=MASKS[name])
    (found,) = even_maps(Recording((), 0, (layer,)))
    expected = look.block_map(q, q, blocks=5, mask=MASKS[name]).mean[0]
    torch.testing.assert_close(found.expand(3, -1, -1), expected.double(), atol=1e-6, rtol=0)
    assert torch.equal(found.expand(3, -1, -1) == 0, expected == 0)


def test_even_maps_of_heads_and_layers_are_found_by_their_numbers() -> None:
    seen = planted()
    dense = MASKS["dense, by head"]
    assert dense.allow is not None
    by_head = seen.recording.layers[1]._replace(mask=Mask.dense(dense.allow[:, :, :12, :12]))
    seen = seen._replace(recording=seen.recording._replace(layers=(seen.recording.layers[0], by_head)))
    data = data_of(page_of(seen, MOST))
    for layer, one in zip(data["layers"], even_maps(seen.recording), strict=True):
        assert len(layer["even"]) == layer["heads"]
        for head, index in enumerate(layer["even"]):
            codes = struct.unpack("<36H", base64.b64decode(data["even"][index]))
            expected = one[head if len(one) > 1 else 0].flatten().tolist()
            assert [(code / 65535) ** 2 for code in codes] == pytest.approx(expected, abs=1e-4)
            assert [code == 0 for code in codes] == [share == 0 for share in expected]
    assert len(data["even"]) == 4


def rows_of(page: str, caption: str) -> list[list[str]]:
    (body,) = re.findall(rf"<caption>{re.escape(caption)}</caption>(.*?)</table>", page)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]


def test_the_table_of_savings_is_that_of_seen() -> None:
    seen = planted()
    _, now, *rows = rows_of(page_of(seen, MOST), "What changes save and cost on this text, before training")
    # 12 tokens in layer 0 on 2 KV heads, 5 in layer 1 on 1, of width 8 + 6 in 2 bytes
    assert now == ["as it is", "0", "", "+0.0000", f"{(12 * 2 + 5) * 14 * 2:,}", "100%"]
    found = [saving for price in seen.prices for saving in seen.savings(price)]
    # A window of 3 and a sink token: 4 tokens a layer. Pooled heads: 1 instead of 2.
    expected_bytes = [(12 * 2 + 4) * 28, (4 * 2 + 4) * 28, (12 + 5) * 28]
    for row, saving, count in zip(rows, found, expected_bytes, strict=True):
        assert row[:3] == [saving.price.change, str(len(saving.layers)), "0-1" if len(saving.layers) == 2 else "1"]
        assert row[3:] == [f"{saving.increase:+.4f}", f"{count:,}", f"{count / (29 * 28):.0%}"]


def marks_of(page: str, label: str) -> list[tuple[float, float, str]]:
    """Places and titles of the marks of a chart."""
    (chart,) = re.findall(rf'<svg class="chart"[^>]*aria-label="{re.escape(label)}.*?</svg>', page)
    found = re.findall(r'<g><path class="mark[^>]*translate\(([\d.]+) ([\d.]+)\)"/><title>(.*?)</title>', chart)
    return [(float(x), float(y), title) for x, y, title in found]


def test_marks_of_savings_stand_at_their_bytes_and_in_the_order_of_their_loss() -> None:
    seen = planted()
    marks = marks_of(page_of(seen, MOST), "Savings against price")
    now = seen.cache_bytes({})
    points = [(s.cache_bytes, s.increase) for price in seen.prices for s in seen.savings(price)] + [(now, 0.0)]
    assert len(marks) == len(points) == 4
    for (x, _, _), (count, _) in zip(marks, points, strict=True):
        assert x == pytest.approx(60 + count / (1.04 * now) * (360 - 60 - 14), abs=0.06)
    assert sorted(range(4), key=lambda n: -marks[n][1]) == sorted(range(4), key=lambda n: points[n][1])
    assert "+0.0123" not in marks[0][2] and f"{points[0][1]:+.4f} nats" in marks[0][2]


def test_bars_are_as_long_as_their_prices() -> None:
    seen = planted()
    page = page_of(seen, MOST)
    for given in seen.prices:
        title = f"If one layer had {given.change}"
        (chart,) = re.findall(rf'<svg class="chart"[^>]*aria-label="{re.escape(title)}.*?</svg>', page)
        bars = re.findall(r'<rect class="bar (more|less)"[^>]*?height="([\d.]+)"/><title>layer (\d): (.*?) nats', chart)
        costs = [mean(row[0]) for row in given.increase]
        assert [int(layer) for *_, layer, _ in bars] == [0, 1]
        assert [text for *_, text in bars] == [f"{cost:+.4f}" for cost in costs]
        assert float(bars[0][1]) / float(bars[1][1]) == pytest.approx(costs[0] / costs[1], rel=1e-2)
        rows = rows_of(page, f"{title}, before training")[1:]
        assert rows == [[str(n), NAMES[n], f"{cost:+.4f}"] for n, cost in enumerate(costs)]


def test_the_tables_of_layers_and_cuts() -> None:
    seen = planted()
    page = page_of(seen, MOST)
    layers = seen.recording.layers
    worst = [
        [max(mean(head[window:]) for head in layer.cut.mass[n, 0]) for n, window in enumerate(WINDOWS)]
        for layer in layers
    ]
    head, *rows = rows_of(page, "Weight cut from the KV head of a layer that loses most")
    assert head == ["layer", "window of 3", "window of 7"]
    assert rows == [[str(n), f"{100 * cuts[1]:.1f}%", f"{100 * cuts[0]:.1f}%"] for n, cuts in enumerate(worst)]
    caption = "What layers attend to, in the mean over heads and queries; cut: of the KV head that loses most"
    head, *rows = rows_of(page, caption)
    assert head[-2:] == ["cut by 7", "cut by 3"]
    for n, (row, layer) in enumerate(zip(rows, layers, strict=True)):
        keys, distance = mean(layer.keys_in_effect.flatten()), mean(layer.distance.mean.flatten())
        sinks = 100 * mean((layer.sinks.first + layer.sinks.learned).flatten())
        shown = [f"{keys:.1f}", f"{distance:.1f}", f"{sinks:.1f}%", *(f"{100 * cut:.1f}%" for cut in worst[n])]
        assert row == [str(n), NAMES[n], ["4", "3"][n], ["2", "1"][n], ["all keys", "5 keys"][n], *shown]


def test_queries_without_numbers_are_counted() -> None:
    says = "Queries of heads that have no number, for NaN or inf, and are left out of the means: 12 in layer 1."
    assert says in page_of(planted(), MOST)
    seen = planted()
    seen = seen._replace(recording=seen.recording._replace(layers=seen.recording.layers[:1]), prices=())
    assert "have no number, for NaN" not in page_of(seen, MOST)


def test_the_mask_in_effect_is_drawn_block_by_block() -> None:
    page = page_of(planted(), MOST)
    full, window = re.findall(r'<path class="seen" d="(.*?)"/>', page)
    high = 64 / 6
    assert full.startswith(f"M0 0h{high:g}v{high:g}h{-high:g}zM0 {high:g}h{2 * high:g}v")
    # Blocks of two tokens, a window of 5: the query block 5 (tokens 10 and 11) sees tokens 6 to 11, the blocks 3 to 5.
    assert window.endswith(f"M{3 * high:g} {5 * high:g}h{3 * high:g}v{high:g}h{-3 * high:g}z")


def test_the_cache_grows_by_its_own_rule() -> None:
    seen = planted()
    head, *rows = rows_of(page_of(seen, MOST), "Bytes of keys and values")
    window, heads = "a window of 3 tokens and 1 sink token in all layers", "1 KV head by mean pooling in all layers"
    assert head[:4] == ["tokens", "as it is", window, heads]
    assert [row[0] for row in rows] == [f"{1 << n:,}" for n in range(6, 18)]
    for row in rows:
        count = int(row[0].replace(",", ""))
        assert row[1:4] == [f"{(2 * count + 5) * 28:,}", f"{4 * 3 * 28:,}", f"{(count + 5) * 28:,}"]


def test_layers_have_their_numbers_in_the_model() -> None:
    """As in models whose other layers keep no keys."""
    names = "model.layers.3.self_attn", "model.layers.7.self_attn"
    seen = planted()
    records = tuple(layer._replace(name=name) for layer, name in zip(seen.recording.layers, names, strict=True))
    found = tuple(price._replace(layers=names) for price in seen.prices)
    page = page_of(seen._replace(recording=seen.recording._replace(layers=records), prices=found, seven=None), 10.0)
    data = data_of(page)
    assert [layer["label"] for layer in data["layers"]] == ["3", "7"]
    assert [price["labels"] for price in data["prices"]] == [["3", "7"]] * 2
    rows = rows_of(page, "What changes save and cost on this text, before training")[2:]
    assert [row[2] for row in rows] == ["7", "3, 7", "3, 7"]
    assert "in 2 layers (3, 7), 336 B instead of 812 B" in page
    for caption in (
        "Weight cut from the KV head of a layer that loses most",
        "If one layer had 1 KV head by mean pooling, before training",
    ):
        assert [row[0] for row in rows_of(page, caption)[1:]] == ["3", "7"]
    for words in ("Layer 3 in effect", "Layer 7 in effect", "<title>layer 7: ", "means: 12 in layer 7."):
        assert words in page
    head, first, *_ = rows_of(page, "Bytes of keys and values")
    assert head[4] == "the proposal" and first[2] == first[4] == "336"


def test_another_model_is_compared_token_by_token() -> None:
    seen = planted()
    before = seen.prices[0].loss
    other = Against('<b>"\u202e', before, before + Draw(3).between(-1, 2, *before.shape))
    page = page_of(seen._replace(against=other, prices=()), MOST)
    increase = (other.loss - before)[0]
    after = mean(other.loss[0])
    assert (
        f"&lt;b&gt;&quot;\\u202e has a loss of {after:.4f} nats a token where toy has {mean(before[0]):.4f}: " in page
    )
    assert f": {mean(increase):+.4f}. Its tokens" in page
    found = data_of(page)["against"]
    assert found["model"] == '<b>"\\u202e'
    assert found["increase"] == pytest.approx(mean(increase), rel=1e-5)
    check_codes(found["loss"], before[0])
    check_codes(found["tokens"], increase)
    assert data_of(page_of(seen, MOST))["against"] is None


def test_the_proposal_is_said_with_its_numbers_and_the_limit() -> None:
    seen = planted()
    proposal = seen.proposal(10.0)
    assert proposal is not None
    page = page_of(seen, 10.0)
    says = (
        "The measured windows that save most for at most 10 nats a token, before training: a window of 3 tokens and 1 "
        f"sink token in 2 layers (0-1), 336 B instead of 812 B, {proposal.increase:+.4f} nats."
    )
    assert f"{says} Configurations of transformers have no sink tokens; qkv.SlidingKVCache has them." in page
    assert page.count('class="ring"') == 1
    without = seen.prices[0]._replace(sink_tokens=0)
    page_without = page_of(seen._replace(prices=(without,)), 10.0)
    assert "nats. With the JSON report of qkv see, qkv convert --like writes that." in page_without
    page = page_of(seen, -1.0)
    assert "No measured window saves bytes for at most -1 nats a token." in page
    assert 'class="ring"' not in page
    page = page_of(seen._replace(prices=seen.prices[1:]), MOST)
    assert "No window was measured, so that none is proposed." in page


def test_every_figure_says_what_it_shows_and_what_it_does_not() -> None:
    page = page_of(planted(), MOST)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == page.count("<figure") >= 10
    for caption in captions:
        assert re.search(r'<span class="not">.*?</span>', caption)
    for title in ("Shows what the cheapest", "If one layer had", "Weight that windows", "In the mean over queries"):
        assert title in page
    for words in ("What changes save and cost on this text, before training", " together, before training`"):
        assert words in page


def test_it_is_one_document_that_asks_for_nothing_else() -> None:
    page = page_of(planted(), MOST)
    parsed = Parsed(page)
    assert parsed.declarations == ["DOCTYPE html"] and not parsed.comments
    assert [len(parsed.all(tag)) for tag in ("html", "head", "body", "style")] == [1, 1, 1, 1]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "video", "audio"} & {
        tag for tag, _ in parsed.elements
    }
    loading = {"src", "srcset", "action", "data", "xlink:href", "style", "ping", "poster", "background"}
    for tag, attributes in parsed.elements:
        assert not loading & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#main") == "#main"
    assert "http" not in page.replace("http-equiv", "")
    loading = r"url\(|@import|fetch|XMLHttp|import\("
    writing = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\("
    for name in ("page.css", "page.js"):
        assert not re.search(f"{loading}|{writing}", document._source(name))


def test_the_policy_allows_the_two_sources_in_the_file_by_their_hashes() -> None:
    page = page_of(planted(), MOST)
    parsed = Parsed(page)

    def hash_of(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (style,), (data, script) = ([t for t in parsed.texts_of(tag) if t.strip()] for tag in ("style", "script"))
    json.loads(data)
    assert [attributes.get("type") for attributes in parsed.all("script")] == ["application/json", None]
    assert parsed.policy == {
        "default-src": ["'none'"],
        "script-src": [hash_of(script)],
        "style-src": [hash_of(style)],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    names = [next(iter(attributes)) for attributes in parsed.all("meta")]
    assert names == ["charset", "http-equiv", "name", "name"]  # the policy before all that it is about


def test_hostile_tokens_are_data_alone() -> None:
    plain = Parsed(page_of(planted(tuple("x" * len(HOSTILE))), MOST))
    page = page_of(planted(HOSTILE), MOST)
    parsed = Parsed(page)
    assert parsed.elements == plain.elements and not parsed.comments
    assert data_of(page)["tokens"] == list(HOSTILE)
    page.encode("utf-8")
    assert all(character.isprintable() or character == "\n" for character in page)
    assert page.count("onerror") == 1 and "<img" not in page


def test_hostile_names_are_text_that_can_be_seen() -> None:
    name = '"><script>alert(1)</script>\u202e\ud800\0&amp;{{data}}'
    page = page_of(planted(model=name, text=name), MOST)
    assert [tag for tag, _ in Parsed(page).elements] == [tag for tag, _ in Parsed(page_of(planted(), MOST)).elements]
    shown = '"><script>alert(1)</script>\\u202e\\ud800\\x00&amp;{{data}}'
    parsed = Parsed(page)
    for tag in ("title", "h1"):
        assert "".join(parsed.texts_of(tag)).split("\n")[0] == f"{shown} on {shown}"
    page.encode("utf-8")


def test_the_same_seen_gives_the_same_bytes_and_another_one_others() -> None:
    page = page_of(planted(), MOST)
    assert page == page_of(planted(), MOST)
    assert page != page_of(planted(), 2 * MOST)
    assert page != page_of(planted((*TOKENS[:-1], " queen")), MOST)


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    seen = planted(HOSTILE)
    parsed = Parsed(seen._repr_html_())
    ((tag, attributes),) = parsed.elements
    assert tag == "iframe" and attributes["srcdoc"] == page_of(seen, 0.01)
    assert attributes["sandbox"] == "allow-scripts" and attributes["title"]
    assert not parsed.texts


def test_a_recording_without_prices_windows_or_tokens_beyond_the_first() -> None:
    seen = planted()
    page = page_of(seen._replace(prices=()), MOST)
    assert "No price was measured" in page and "Which layers pay?" not in page and "What would windows hide?" in page
    bare = build("llama")
    for length in (1, 2):
        ids = torch.ones(1, length, dtype=torch.long)
        page = page_of(Seen("m", "t", ("x",) * length, 0, 4, record(bare, ids), ()), MOST)
        assert "What would windows hide?" not in page and f"{length} token" in page
        check_data(page, Seen("m", "t", ("x",) * length, 0, 4, record(bare, ids), ()))


def test_the_reach_of_a_token_is_drawn_as_measured_within_its_outline() -> None:
    seen = planted()
    ((_, found),) = seen.reaches
    page = page_of(seen, MOST)
    (chart,) = re.findall(r'<svg class="chart"[^>]*aria-label="As it is: reach of token 1.*?</svg>', page)
    across, down = 286 / 12, 188 / 3
    drawn = {}
    for shade, box in re.findall(r'<rect class="change c(\d)" (.*?)/>', chart):
        x, width, y, height = (float(number) for number in re.findall(r'="([\d.]+)"', box))
        assert (width, height) == (pytest.approx(across, abs=0.02), pytest.approx(down, abs=0.02))
        drawn[round(2 - (y - 12) / down), round((x - 60) / across)] = int(shade)
    cells = {
        (row, at): next(n for n, least in enumerate((0.1, 0.01, 0.001, 0)) if change >= least)
        for row, numbers in enumerate(found.change.tolist())
        for at, change in enumerate(numbers)
        if change
    }
    assert drawn == cells and set(cells.values()) == {0, 1, 2, 3}
    (line,) = re.findall(r'<path class="line" d="(.*?)"/>', chart)
    points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)]
    edge = [(1, 0), (2, 0), (2, 1), (4, 1), (4, 2), (7, 2), (7, 3), (1, 3), (1, 0)]
    assert points == [
        (pytest.approx(60 + x * across, abs=0.06), pytest.approx(200 - y * down, abs=0.06)) for x, y in edge
    ]
    assert "Of 26 hidden states out of reach, 1 change: this model computes some tokens together." in page
    rows = rows_of(page, "As it is: tokens that one token reaches")[1:]
    assert rows == [["0", "", "1", "1"], ["1", "3", "3", "11"], ["2", "4", "6", "6"]]
    found.change[1, -1] = 0
    assert "Of 26 hidden states out of reach, all are equal in bits." in page_of(
        seen._replace(reaches=(("As it is", found),)), MOST
    )
    assert "How far does one token reach?" not in page_of(seen._replace(reaches=()), MOST)


def test_the_agreement_of_heads_in_the_order_of_their_groups() -> None:
    seen = planted()
    page = page_of(seen, MOST)
    (found,) = seen.agreements
    rows = rows_of(page, "Agreement of KV heads, for 2 KV heads by aligned pooling")[1:]
    pictures = re.findall(r'<svg viewBox="0 0 62 128"[^>]*>(.*?)</svg>', page)
    assert len(pictures) == 2 and len(rows) == 4
    for n, (layer, picture) in enumerate(zip(found.layers, pictures, strict=True)):
        groups = [[0, 2], [1, 3]] if n == 0 else [[0, 1], [2, 3]]
        order = [*groups[0], *groups[1]]
        matrices = re.findall(r"<g transform.*?</g>", picture)
        for at, (kind, numbers) in enumerate((("keys", layer.keys), ("values", layer.values))):
            one, two = (numbers[a, b].item() for a, b in groups)
            others = [numbers[a, b].item() for a in groups[0] for b in groups[1]]
            written = f"{groups[0][0]}, {groups[0][1]} | {groups[1][0]}, {groups[1][1]}"
            shown = [f"{(one + two) / 2:.3f}", f"{min(one, two):.3f}", f"{sum(others) / 4:.3f}"]
            assert rows[2 * n + at] == [str(n), kind, written, *shown]
            drawn = torch.full((4, 4), -1)
            for path, opacity in re.findall(r'<path class="shade" d="(.*?)" fill-opacity="([\d.]+)"/>', matrices[at]):
                for x, y in re.findall(r"M([\d.]+) ([\d.]+)h15.00v", path):
                    drawn[int(float(y) // 15), int(float(x) // 15)] = round(10 * float(opacity))
            assert torch.equal(drawn, (10 * numbers[order][:, order]).round().int())
            outlines = re.findall(r'<rect class="group" x="(\d+)" y="(\d+)" width="30" height="30"/>', matrices[at])
            assert outlines == [("0", "0"), ("30", "30")]
    assert "Which KV heads are alike?" not in page_of(seen._replace(agreements=()), MOST)


def test_the_seven_mechanisms_are_summed_in_blocks() -> None:
    for tokens in (TOKENS, tuple(f"t{n}" for n in range(300))):
        seen = planted(tokens)
        found, given, n = data_of(page_of(seen, MOST))["seven"], seen.seven, len(tokens)
        assert given is not None and found["columns"] == min(128, n)
        assert (found["layer"], found["own"], found["query"]) == ("0", "all keys before it and its own", n - 2)
        for one, expected in zip(found["mechanisms"], given.mechanisms, strict=True):
            assert (one["name"], one["first"], one["stop"]) == expected[:3]
            assert (one["scores"], one["bytes"]) == (expected.scores, 2 * expected.cache_numbers)
            raw = base64.b64decode(one["strip"])
            for head, weights in enumerate(expected.weights.tolist()):
                sums = [0.0] * found["columns"]
                for key, weight in enumerate(weights, expected.first):
                    sums[key * found["columns"] // n] += weight
                codes = raw[head * found["columns"] : (head + 1) * found["columns"]]
                assert [(code / 255) ** 2 for code in codes] == pytest.approx(sums, abs=0.0041)
                order = sorted(range(len(weights)), key=lambda key, weights=weights: -weights[key])[:5]
                assert one["keys"][head] == [key + expected.first for key in order]
                assert one["weights"][head] == pytest.approx([weights[key] for key in order], rel=1e-5)
            assert len(one["keys"]) == len(expected.weights) and len(raw) == len(expected.weights) * found["columns"]


def test_layers_that_are_not_shown_keep_their_numbers_alone() -> None:
    seen = planted()
    page = page_of(seen._replace(shown=(1,)), MOST)
    one, other = data_of(page)["layers"]
    full = data_of(page_of(seen, MOST))["layers"]
    assert (one["map"], one["map_shape"], one["even"], one["rows"]) == (None, [0, 0], [], [])
    for name in ("keys_in_effect", "distance", "spread", "sinks", "cut", "change", "label"):
        assert one[name] == full[0][name]
    assert other["map"] == full[1]["map"] and other["rows"] == full[1]["rows"] and len(other["rows"]) == 2
    assert len(data_of(page)["even"]) == 1 and len(page) < len(page_of(seen, MOST))
    table = "What layers attend to, in the mean over heads and queries; cut: of the KV head that loses most"
    assert rows_of(page, table) == rows_of(page_of(seen, MOST), table)


def test_layers_of_a_context() -> None:
    model = build("bart")
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    recording = record(model, ids, decoder_input_ids=ids[:, :9], windows=[4])
    page = page_of(Seen("bart", "t", tuple("x" * 12), 0, 4, recording, ()), MOST)
    assert "sees a context (across)" in page and "sees all keys (across)" in page
    layers = data_of(page)["layers"]
    assert [layer["cut"] == [] for layer in layers] == [layer.is_cross for layer in recording.layers]
    assert [layer["queries"] for layer in layers] == [12, 12, 9, 9, 9, 9]
    assert [layer["keys"] for layer in layers] == [12, 12, 9, None, 9, None]


def test_prices_that_are_not_numbers_are_named_so() -> None:
    seen = planted()
    nothing = torch.full_like(seen.prices[0].loss, torch.nan)
    lost = seen.prices[0]._replace(increase=torch.stack([nothing, seen.prices[0].increase[1]]))
    lost = lost._replace(together=tuple(some._replace(loss=nothing) for some in lost.together))
    page = page_of(seen._replace(prices=(lost,)), MOST)
    title = "If one layer had a window of 3 tokens and 1 sink token, before training"
    assert rows_of(page, title)[1][2] == "no number"
    shown = re.sub(r"(?s)<script.*?</script>|for NaN or inf", "", page)
    assert "nan" not in shown.lower()
    assert len(marks_of(page, "Savings against price")) == 1


@pytest.mark.parametrize("costs", [(0.0, 0.0), (1e-9, -1e-9), (-3.0, -2.0), (1e5, 1e-5)])
def test_charts_of_any_size_of_numbers(costs: tuple[float, float]) -> None:
    seen = planted()
    given = seen.prices[0]
    increase = torch.tensor(costs)[:, None, None].expand_as(given.increase)
    together = tuple(some._replace(loss=given.loss + cost) for some, cost in zip(given.together, costs, strict=True))
    page = page_of(seen._replace(prices=(given._replace(increase=increase, together=together),)), 0.0)
    for number in re.findall(r' (?:[xy][12]?|height|width|cx|cy)="([^"]*)"', page):
        assert math.isfinite(float(number.removesuffix("%")))
        assert -1 <= float(number.removesuffix("%")) <= 800
    check_codes(data_of(page)["prices"][0]["alone"][0], increase[0, 0])


@pytest.mark.parametrize("most", [40, 900, 5_000, 3_500_000, 7 << 30])
def test_ticks_of_bytes_are_round_in_the_unit_that_they_are_written_in(most: int) -> None:
    ticks = charts.linear("bytes", 0, most, written_round, unit_of(most)).ticks
    units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    assert 3 <= len(ticks) <= 7 and ticks[0] == (0, "0 B")
    for at, text in ticks[1:]:
        number, unit = text.split()
        assert units[unit] * float(number) == pytest.approx(at, rel=1e-9)
        assert units[unit] <= at < 1024 * units[unit]
        assert len(number) <= 3


def test_a_page_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "LARGEST", 10_000)
    with pytest.raises(
        ValueError, match=r"page_of: the page would have \d\d,\d\d\d characters, and 10,000 are allowed"
    ):
        page_of(planted(), MOST)


def linear_light(colour: str) -> Tensor:
    """Red, green and blue as amounts of light, IEC 61966-2-1."""
    value = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)], dtype=torch.float64)
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(light: Tensor) -> float:
    return float(light @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


# Machado, Oliveira and Fernandes 2009, of severity 1.
SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(light: Tensor) -> Tensor:
    """CIELAB under D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    white = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    t = torch.tensor(to_xyz, dtype=torch.float64) @ light.clamp(0, 1) / white
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-9) ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_differ_for_all_eyes_and_from_the_paper(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", document._source("page.css"), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): #(\w+);", blocks[scheme]))
    colours = {name: "".join(c * 2 for c in code) if len(code) == 3 else code for name, code in colours.items()}
    paper = luminance(linear_light(colours["paper"]))
    for name, least in {"ink": 7, "soft": 4.5, "s0": 3, "s1": 3, "s2": 3, "s3": 3}.items():
        dark, bright = sorted([paper, luminance(linear_light(colours[name]))])
        assert (bright + 0.05) / (dark + 0.05) >= least, name
    for sight, matrix in SIGHT.items():
        seen = [lab(torch.tensor(matrix, dtype=torch.float64) @ linear_light(colours[f"s{n}"])) for n in range(4)]
        for n, one in enumerate(seen):
            for m, other in enumerate(seen[:n]):
                assert float((one - other).norm()) > 10, f"s{n} and s{m} with {sight}"


def test_the_ramp_grows_brighter_for_all_eyes() -> None:
    (found,) = re.findall(r"const RAMP = \[(.*?)\]", document._source("page.js"))
    colours = re.findall(r'"(\w{6})"', found)
    assert len(colours) == 11
    for matrix in SIGHT.values():
        lightness = [float(lab(torch.tensor(matrix, dtype=torch.float64) @ linear_light(c))[0]) for c in colours]
        assert all(b - a > 3 for a, b in itertools.pairwise(lightness))


def test_code_and_pages_are_small() -> None:
    code = sum(len(document._source(name).encode()) for name in ("page.html", "page.css", "page.js"))
    assert code <= 80_000
    assert len(page_of(planted(), MOST).encode()) <= 150_000


def test_the_page_of_30_layers_and_4096_tokens_is_below_8_mb() -> None:
    """As SmolLM2-135M has them, with two windows and pooled heads, each priced for eight numbers of layers."""
    length, layers, draw = 4096, 30, Draw(0)
    small = layer_record("model.layers.0.self_attn", Mask.causal(), 9, 3, 128, 64, draw, (32, 64))
    large = {
        "keys_in_effect": small.keys_in_effect.repeat(1, 1, 32),
        "distance": look.Distance(*(numbers.repeat(1, 1, 32) for numbers in small.distance)),
        "sinks": look.SinkShare(*(numbers.repeat(1, 1, 32) for numbers in small.sinks)),
        "cut": look.WindowCut(*(numbers.repeat(1, 1, 1, 32) for numbers in small.cut)),
        "queries": tuple(range(0, length, 256)),
        "top": look.TopKeys(
            torch.randint(length, (1, 9, 16, 32)), draw.between(0, 0.1, 1, 9, 16, 32), draw.between(0, 1, 1, 9, 16)
        ),
    }
    recording = Recording((256, 512), 4, (small._replace(**large, windows=(256, 512)),) * layers)
    found = []
    for given in prices(length, draw) + prices(length, draw)[:1]:
        together = tuple(given.together[0]._replace(layers=tuple(range(4 * n))) for n in range(1, 8))
        increase = given.increase[:1].expand(layers, -1, -1)
        found.append(given._replace(layers=tuple(map(str, range(layers))), increase=increase, together=together))
    seen = Seen("smol", "text", tuple(f" token{n % 997}" for n in range(length)), 0, 4, recording, tuple(found))
    every = Reach(0, (None,) * layers, (length,) * (layers + 1), torch.ones(layers + 1, length))
    mechanisms = tuple(
        one._replace(first=0, stop=length, weights=draw.between(0, 0.1, 9, length))
        for one in planted().seven.mechanisms  # type: ignore[union-attr]
    )
    seven = Seven(small.name, length - 1, 256, 9, 3, 3, mechanisms)
    seen = seen._replace(seven=seven, reaches=(("As it is", every), ("The proposal", every)))
    assert 2_000_000 < len(page_of(seen, MOST).encode()) < 8_000_000
