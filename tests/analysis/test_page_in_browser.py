"""The page of a `Seen` in Chromium: its requests, its numbers as drawn, hostile tokens, the keyboard and the reader."""

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis.browser import axe, chromium, is_here
from analysis.planted import HOSTILE, TOKENS, WINDOWS, Draw, planted
from families.small import build

from qkv.analysis import Against, Seen, record
from qkv.analysis.page import document, page_of
from qkv.analysis.page.data import even_maps
from qkv.analysis.seen import Context

if not is_here():
    pytest.skip("needs playwright, axe-playwright-python and Chromium", allow_module_level=True)

long = pytest.mark.long

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a `Seen`; afterwards, it has asked for itself alone and nothing went wrong in it."""
    contexts, wrong, asked = [], [], []

    def open_page(seen: Seen | str, offline: bool = False, **options: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(seen if isinstance(seen, str) else page_of(seen, 0.05), encoding="utf-8")
        contexts.append(browser.new_context(offline=offline, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert asked == [(tmp_path / "page.html").as_uri()] * len(contexts)


@pytest.mark.parametrize("offline", [False, True])
def test_it_opens_from_a_file_and_asks_for_nothing_else(opened: Open, offline: bool) -> None:
    page = opened(planted(), offline=offline)
    assert page.locator("#text span").count() == len(TOKENS)
    assert page.locator("#grid td").count() == 4 + 3
    assert page.locator("noscript p").count() == 0


@long
def test_cells_of_heads_say_the_numbers_of_seen(opened: Open) -> None:
    page, seen = opened(planted()), planted()
    layers = seen.recording.layers
    means: dict[str, Callable[[Any], torch.Tensor]] = {
        "keys in effect": lambda layer: layer.mean(layer.keys_in_effect)[0],
        "distance": lambda layer: layer.mean(layer.distance.mean)[0],
        "weight on sinks": lambda layer: 100 * layer.mean(layer.sinks.first + layer.sinks.learned)[0],
    }
    for n, window in enumerate(WINDOWS):
        for name, part in (("cut", "mass"), ("change", "change")):
            means[f"{name} by a window of {window}, 1 sink token kept"] = lambda layer, n=n, window=window, part=part: (
                100 * getattr(layer.cut, part)[n, 0, :, window:].mean(1)
            )
    assert page.locator("#number option").all_inner_texts() == list(means)
    for name, number in means.items():
        page.select_option("#number", label=name)
        labels = [cell.get_attribute("aria-label") for cell in page.locator("#grid td").all()]
        expected = []
        for n, layer in enumerate(layers):
            for head, value in enumerate(number(layer).tolist()):
                share = "%" if name[:3] in ("cut", "cha", "wei") else ""
                written = f"{value:.1f}{share}" if value == value else "no number"
                expected.append(f"Layer {n}, head {head}: {name} {written}")
        assert labels == expected
        has_none = [name in ("keys in effect", "distance") and n == 6 for n in range(7)]
        assert ["none" in (cell.get_attribute("class") or "") for cell in page.locator("#grid td").all()] == has_none


def ramp() -> list[list[int]]:
    (found,) = re.findall(r"const RAMP = \[(.*?)\]", document._source("page.js"))
    return [[int(text[at : at + 2], 16) for at in (0, 2, 4)] for text in re.findall(r'"(\w{6})"', found)]


def colour_of(part: float) -> list[float]:
    colours = ramp()
    place = min(1.0, max(0.0, part)) * (len(colours) - 1)
    left = min(int(place), len(colours) - 2)
    pairs = zip(colours[left], colours[left + 1], strict=True)
    return [a + (place - left) * (b - a) for a, b in pairs]


PIXELS = """() => { const map = document.getElementById("map"), copy = document.createElement("canvas");
    [copy.width, copy.height] = [map.width, map.height];
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(map, 0, 0);
    return [map.width, map.height, [...context.getImageData(0, 0, map.width, map.height).data]]; }"""


@long
def test_the_map_of_a_head_is_drawn_as_its_numbers(opened: Open) -> None:
    page, seen = opened(planted()), planted()
    even = even_maps(seen.recording)
    for n, head, row in ((0, 3, 3), (1, 1, 5)):
        page.locator("#grid td").nth(row).click()
        assert page.inner_text("#head-name").startswith(f"Layer {n}, head {head} (model.layers.{n}.self_attn")
        width, height, pixels = page.evaluate(PIXELS)
        assert (width, height) == (6, 6)
        page.locator("#map-details summary").click()
        page.wait_for_selector("#map-table td")
        cells = page.locator("#map-table td").all_inner_texts()
        weights = seen.recording.layers[n].map.mean[0, head].flatten().tolist()
        for at, (weight, uniform) in enumerate(zip(weights, even[n][0].flatten().tolist(), strict=True)):
            pixel = pixels[4 * at : 4 * at + 4]
            if uniform == 0:
                assert pixel[3] == 0 and cells[at] == "hidden"
                continue
            assert pixel[3] == 255
            code = round(weight**0.5 * 255)
            drawn = (code / 255) ** 2
            part = (torch.tensor(drawn / uniform).log2().item() + 4) / 8
            assert pixel[:3] == pytest.approx(colour_of(part), abs=2)
            assert cells[at] == f"{100 * drawn:.1f}%"


@long
def test_blocks_of_queries_without_a_number_are_not_drawn(opened: Open) -> None:
    seen = planted()
    seen.recording.layers[0].map.mean[0, 2, 4] = torch.nan
    page = opened(seen)
    page.locator("#grid td").nth(2).click()
    assert "hidden, or no number" in page.inner_text("#map-legend")
    width, _, pixels = page.evaluate(PIXELS)
    drawn = [pixels[4 * n + 3] == 255 for n in range(width * width)]
    assert drawn == [column <= row != 4 for row in range(6) for column in range(6)]
    page.locator("#map-box").focus()
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#map-now") == "Queries 8\u20139, keys 0\u20131: no number"
    page.locator("#map-details summary").click()
    assert page.locator("#map-table tbody tr").nth(4).locator("td").all_inner_texts() == ["no number"] * 6
    page.locator("#grid td").nth(1).click()
    assert "no number" not in page.inner_text("#map-legend")


@long
@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_groups_of_an_encoder_decoder_and_an_encoder_without_a_cache(opened: Open) -> None:
    model, encoder = build("bart"), build("bert")
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    found = record(model, ids, decoder_input_ids=ids[:, :9])
    page = opened(Seen("bart", "text", TOKENS[:9], 0, 4, found, (), None, Context("source", 12, 0)))
    names = ["encoder 0", "encoder 1", "decoder 0", "cross 0", "decoder 1", "cross 1"]
    assert page.locator("#grid tbody th").all_inner_texts() == names
    page = opened(Seen("bert", "text", TOKENS, 0, 4, record(encoder, ids, windows=[3]), ()))
    assert page.get_by_text("An encoder keeps no keys.").count() == 1
    page.locator("#grid td").first.click()
    assert page.inner_text("#head-name").startswith("Layer 0, head 0 (encoder.layer.0")


@long
@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_layers_of_a_context_have_maps_without_a_length(opened: Open) -> None:
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    recording = record(build("bart"), ids, decoder_input_ids=ids[:, :9], windows=[4])
    page = opened(Seen("bart", "t", tuple("x" * 12), 0, 4, recording, ()))
    assert not page.is_visible("#tokens")
    page.select_option("#number", label="cut by a window of 4")
    assert page.locator("#grid td").nth(3 * 6).get_attribute("aria-label").endswith("no number")
    page.locator("#grid td").nth(3 * 6).click()
    page.locator("#map-box").press("ArrowUp")
    weight = f"{100 * round(recording.layers[3].map.mean[0, 0, 7, 0].item() ** 0.5 * 255) ** 2 / 255**2:.1f}%"
    assert page.inner_text("#map-now").startswith(f"Queries 7, keys of block 0 of 12: weight {weight}, ")


@long
def test_costly_tokens_are_those_of_seen_with_their_context(opened: Open) -> None:
    seen = planted()
    before = seen.prices[0].loss
    seen = seen._replace(against=Against("<b>", before, before + Draw(3).between(-1, 2, *before.shape)))
    page = opened(seen)
    names = page.locator("#change option").all_inner_texts()
    window, pooled = (price.change for price in seen.prices)
    assert names == [
        f"{window} in 2 layers together, before training",
        f"{window} in 1 layer together, before training",
        *(f"{window} in layer {n} alone, before training" for n in range(2)),
        f"{pooled} in 2 layers together, before training",
        *(f"{pooled} in layer {n} alone, before training" for n in range(2)),
        "the other model, <b>",
    ]
    cases = [
        (names[0], seen.costly(seen.prices[0], 20), seen.prices[0].together[-1].loss - before),
        (names[4], seen.costly(seen.prices[1], 20), seen.prices[1].together[-1].loss - before),
        (names[7], seen.against.costly(20), seen.against.loss - before),
    ]
    for name, costly, all_increases in cases:
        page.select_option("#change", label=name)
        lines = page.locator("#costly button").all_inner_texts()
        assert len(lines) == len(costly) > 3
        for line, token in zip(lines, costly, strict=True):
            said = re.match(r"([+-][\d.]+) nats, of ([\d.]+), token (\d+): ", line)
            assert said and int(said[3]) == token.position
            assert float(said[1]) == pytest.approx(token.increase, abs=8e-4)
            assert float(said[2]) == pytest.approx(token.loss, abs=8e-4)
        marks = page.locator("#costly mark").all_inner_texts()
        assert [mark.replace("\u2423", " ").replace("\u23ce", "\n") for mark in marks] == [
            seen.tokens[token.position] for token in costly
        ]
        underlined = page.eval_on_selector_all("#text span", "all => all.map((one) => one.matches('.costly'))")
        assert {at for at, is_costly in enumerate(underlined) if is_costly} == {token.position for token in costly}
        backgrounds = page.eval_on_selector_all("#text span", "all => all.map((one) => one.style.backgroundColor)")
        increase = all_increases[0].tolist()
        known = [more for more in increase if more == more]
        assert f"The mean is {sum(known) / len(known):+.4f} nats a token" in page.inner_text("#tokens-say")
        assert backgrounds[0] == "" and backgrounds[4] == ""  # nothing predicts these
        for at, more in enumerate(increase):
            if more == more:
                assert backgrounds[at + 1].startswith("rgba(213, 94, 0" if more > 0 else "rgba(0, 114, 178")


def test_hostile_tokens_are_shown_as_text(opened: Open) -> None:
    page = opened(planted(HOSTILE))
    count = "document.querySelectorAll('img, #text *').length"
    assert page.evaluate(count) == len(HOSTILE)
    shown = page.eval_on_selector_all(
        "#text span", "all => all.map((one) => [...one.textContent].map((c) => c.codePointAt(0)))"
    )
    assert shown == [[ord(character) for character in token] for token in HOSTILE]
    for at in range(len(HOSTILE)):
        page.locator("#text").press("ArrowRight" if at else "Home")
        assert f"Token {at}," in page.inner_text("#token")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@long
def test_the_keys_of_a_token_are_those_of_seen(opened: Open) -> None:
    page, seen = opened(planted()), planted()
    assert page.locator("#row-layer option").all_inner_texts() == ["0", "1"]
    assert page.locator("#query option").all_inner_texts() == ["11: \u2423king", "4: \u23ce"]
    for n, at, head in ((1, 0, 2), (0, 1, 3), (0, 0, 3)):
        layer, query = seen.recording.layers[n], seen.recording.layers[n].queries[at]
        page.select_option("#row-layer", str(n))
        page.select_option("#query", str(query))
        page.select_option("#row-head", str(head))
        top = layer.top
        assert top is not None
        keys = [key for key in top.keys[0, head, at].tolist() if key >= 0]
        weights = top.weights[0, head, at].tolist()
        said = page.inner_text("#row-say")
        covered = top.covered[0, head, at].item()
        assert said.startswith(f"Shows token {query}, layer {n}, head {head}: the fewest keys with 90% of the weight")
        some = f"{len(keys)} key{'s' * (len(keys) != 1)} with {100 * covered:.1f}% of its weight"
        assert f"{some}; {100 * (1 - covered):.1f}% is left" in said
        lines = page.locator("#row-keys li").all_inner_texts()
        marks = page.locator("#row-keys mark").all_inner_texts()
        assert len(lines) == len(marks) == len(keys) > 1
        for line, mark, key, weight in zip(lines, marks, keys, weights, strict=False):
            back = "itself" if key == query else f"{query - key} token{'s' * (query - key > 1)} back"
            assert line.startswith(f"{100 * weight:.1f}%, key {key}, {back}: ")
            assert mark.replace("\u2423", " ").replace("\u23ce", "\n") == TOKENS[key]
        arcs = page.locator("#arcs .arc")
        for arc, key, weight in zip(arcs.all(), keys, weights, strict=False):
            numbers = [float(x) for x in re.findall(r"[\d.]+", arc.get_attribute("d") or "")]
            assert numbers[0] == pytest.approx(10 + 700 * query / 11, abs=0.06)
            assert numbers[6] == pytest.approx(10 + 700 * key / 11, abs=0.06)
            assert float(arc.get_attribute("stroke-width") or 0) == pytest.approx(0.75 + 7 * weight**0.5, abs=0.01)
        assert arcs.count() == len(keys)
        rows = page.locator("#row-table tbody tr").all()
        assert len(rows) == layer.heads
        first = int(top.keys[0, head, at, 0])
        shown = TOKENS[first].replace(" ", "\u2423").replace("\n", "\u23ce")
        cells = rows[head].locator("td").all_text_contents()
        assert cells[0] == str(len(keys)) and cells[1] == f"{100 * covered:.1f}%"
        assert shown in cells[2] and cells[2].startswith(str(first)) and cells[3] == f"{100 * weights[0]:.1f}%"


@long
def test_the_seven_mechanisms_are_drawn_as_their_numbers(opened: Open) -> None:
    page, seen = opened(planted()), planted()
    given = seen.seven
    assert given is not None
    for chosen in ("0", "3"):
        page.select_option("#seven-head", chosen)
        rows = page.locator("#seven-rows > div").all()
        for row, one in zip(rows, given.mechanisms, strict=True):
            weights = one.weights[int(chosen) if len(one.weights) > 1 else 0].tolist()
            assert row.locator("strong").inner_text() == one.name
            pixels = row.locator("canvas").evaluate(
                "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data]"
            )
            assert len(pixels) == 4 * len(TOKENS)
            for key in range(len(TOKENS)):
                pixel = pixels[4 * key : 4 * key + 4]
                if not one.first <= key < one.stop:
                    assert pixel[3] == 0
                    continue
                drawn = (round(weights[key - one.first] ** 0.5 * 255) / 255) ** 2
                part = (torch.tensor(drawn * (one.stop - one.first)).log2().item() + 4) / 8
                assert pixel[3] == 255 and pixel[:3] == pytest.approx(colour_of(part), abs=2)
            heaviest = max(range(len(weights)), key=weights.__getitem__)
            shown = TOKENS[heaviest + one.first].replace(" ", "\u2423").replace("\n", "\u23ce")
            says = row.locator("p").inner_text()
            assert says.startswith(f"{100 * weights[heaviest]:.1f}% {shown} {heaviest + one.first}, ")
            size = (
                f"{2 * one.cache_numbers / 1024:.1f} KiB" if one.cache_numbers >= 512 else f"{2 * one.cache_numbers} B"
            )
            assert says.endswith(f"Of the text: {one.scores:,} scores, {size} of keys and values.")
    assert f"token {given.query} lies in layer 0, query head 3" in page.inner_text("#seven-say")


@long
def test_a_layer_without_its_map_says_so(opened: Open) -> None:
    page = opened(planted()._replace(shown=(1,)))
    page.locator("#grid td").first.click()
    assert "Its map was left out" in page.inner_text("#head-numbers") and not page.is_visible("#map")
    page.locator("#grid td").nth(4).click()
    assert page.is_visible("#map") and "left out" not in page.inner_text("#head-numbers")
    assert page.locator("#row-layer option").all_inner_texts() == ["1"]


FOCUS = """() => { const focus = document.activeElement;
    focus.dataset.times = Number(focus.dataset.times ?? 0) + 1;
    return [focus.id || focus.tagName, Number(focus.dataset.times), getComputedStyle(focus).outlineStyle]; }"""


@long
def test_the_keyboard_reaches_everything(opened: Open) -> None:
    page = opened(planted())
    reached: list[str] = []
    while True:
        page.keyboard.press("Tab")
        name, times, outline = page.evaluate(FOCUS)
        if name == "BODY":
            break
        assert times == 1 and outline != "none", name
        reached.append(name)
    assert len(reached) > 15 and {"change", "text", "number"} <= set(reached)
    assert reached.count("TD") == 1

    page.locator("#grid td").first.focus()
    walked = []
    for key in (
        "ArrowRight",
        "ArrowDown",
        "End",
        "ArrowRight",
        "ArrowUp",
        "ArrowRight",
        "Home",
        "Control+End",
        "ArrowDown",
    ):
        page.keyboard.press(key)
        said = re.match(r"Layer (\d), head (\d): keys in effect", page.inner_text("#head-now"))
        assert said
        walked.append((int(said[1]), int(said[2])))
    assert walked == [(0, 1), (1, 1), (1, 2), (1, 2), (0, 2), (0, 3), (0, 0), (1, 2), (1, 2)]
    assert page.eval_on_selector_all("#grid td", "all => all.map((cell) => cell.tabIndex)") == [-1] * 6 + [0]
    page.keyboard.press("Enter")
    assert page.is_visible("#head") and page.evaluate("document.activeElement.id") == "head"
    page.locator("#map-box").focus()
    page.keyboard.press("ArrowRight")
    weight = planted().recording.layers[1].map.mean[0, 2, 5, 1].item()
    assert weight == 0 and page.inner_text("#map-now") == "Queries 10\u201311, keys 2\u20133: hidden"
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert re.fullmatch(
        r"Queries 10\u201311, keys 6\u20137: weight [\d.]+%, [\d.]+ times an even one", page.inner_text("#map-now")
    )
    page.keyboard.press("Escape")
    assert not page.is_visible("#head")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Layer 1, head 2:")


@long
@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark", "forced"])
def test_axe_finds_nothing_wrong(opened: Open, scheme: str, width: int) -> None:
    media = {"forced_colors": "active"} if scheme == "forced" else {"color_scheme": scheme}
    page = opened(planted(), viewport={"width": width, "height": 800}, reduced_motion="reduce", **media)
    page.locator("#grid td").nth(1).click()
    for summary in page.locator("summary").all():
        summary.click()
    page.evaluate(axe())
    found = page.evaluate("axe.run().then((found) => found.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))")
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@long
def test_print_shows_tables_whole_and_no_controls(opened: Open) -> None:
    page = opened(planted())
    page.emulate_media(media="print")
    assert not page.is_visible("#change") and not page.is_visible(".skip")
    assert page.is_visible("#text") and page.is_visible(".chart >> nth=0")


@long
def test_without_javascript_the_charts_and_tables_stand(opened: Open) -> None:
    page = opened(planted(), java_script_enabled=False)
    for n in range(page.locator(".chart").count()):
        assert page.locator(".chart").nth(n).is_visible()
    assert page.locator(".chart").count() == 6
    assert page.locator(".mask").count() == 2 and page.locator(".sharing").count() == 2
    assert page.locator("table").first.is_visible()
    assert page.locator("noscript").is_visible()
    assert not page.is_visible("#tokens") and not page.is_visible("#heads")


@long
def test_two_frames_of_a_notebook_do_not_meet(opened: Open) -> None:
    first, second = planted(), planted(model="other <model>")
    page = opened(f"<!DOCTYPE html><title>host</title><p id=text>mine</p>{first._repr_html_()}{second._repr_html_()}")
    for frame, model in zip(page.frames[1:], ("toy", "other <model>"), strict=True):
        frame.wait_for_selector("#grid td")
        assert frame.inner_text("h1") == f"{model} on king.txt"
        assert frame.locator("#text span").count() == len(TOKENS)
    assert page.inner_text("#text") == "mine"


@long
def test_the_policy_stops_what_would_be_fetched_or_run(browser: Any, tmp_path: Path) -> None:
    path, context = tmp_path / "page.html", browser.new_context()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        more = f"<img src='{address}'><script>document.title = 'run'</script></body>"
        path.write_text(page_of(planted(), 0.05).replace("</body>", more), encoding="utf-8")
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        assert page.title() == "toy on king.txt"
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
        page.goto("about:blank")
        page.set_content(f"<img src='{address}'>", wait_until="commit")
        server.settimeout(10)
        server.accept()[0].close()  # a page without the policy does call
    context.close()
