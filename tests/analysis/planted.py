"""A `Seen` made by hand: no two numbers of it are the same, so that one in the place of another is noticed."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv import Mask, look
from qkv.analysis import Agreement, LayerRecord, Price, Reach, Recording, Seen, Seven, Together
from qkv.analysis.seven import Mechanism
from qkv.convert import LayerAgreement

TOKENS = ("The", " king", " spoke", ",", "\n", "and", " no", " one", " heard", " the", " old", " king")
WINDOWS, SINKS = (7, 3), 1  # not in order
NAMES = "model.layers.0.self_attn", "model.layers.1.self_attn"
QUERIES = 11, 4  # not in order
MECHANISMS = (
    *("scaled dot-product", "multi-head", "cross", "causal", "sliding-window", "multi-query", "grouped-query"),
)
HOSTILE = (
    "</script><img src=x onerror=alert(1)>", '"', "'", "]]>", "<!--", "<script>", "\u2028\u2029", "\u202eabc", "\0",
    "\ud83d", "\udc80", "&lt;&#0;", "{{script}}", "\r\n", "\x1b[31m", "a" * 10_000,
)  # fmt: skip


@dataclass
class Draw:
    """Numbers that differ."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def between(self, least: float, most: float, *shape: int) -> Tensor:
        return least + (most - least) * torch.rand(*shape, generator=self.generator)


def layer_record(
    name: str, mask: Mask, heads: int, kv_heads: int, length: int, blocks: int, draw: Draw, windows: tuple[int, ...]
) -> LayerRecord:
    per_query = 1, heads, length
    weights = draw.between(0, 1, 1, heads, length, length).masked_fill(~mask.visible(length, length), 0)
    weights /= weights.sum(-1, keepdim=True)
    block = torch.arange(length) * blocks // length
    counts = block.bincount()[:, None]
    by_key = torch.zeros(1, heads, length, blocks).index_add_(3, block, weights)
    mean = torch.zeros(1, heads, blocks, blocks).index_add_(2, block, by_key) / counts
    return LayerRecord(
        name=name,
        mask=mask,
        offset=0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=8,
        value_dim=6,
        is_cross=False,
        windows=windows,
        cut=look.WindowCut(draw.between(0, 1, len(windows), *per_query), draw.between(0, 1, len(windows), *per_query)),
        keys_in_effect=draw.between(1, 9, *per_query),
        distance=look.Distance(draw.between(0, 7, *per_query), draw.between(0, 3, *per_query)),
        sinks=look.SinkShare(draw.between(0, 0.4, *per_query), draw.between(0, 0.4, *per_query)),
        map=look.BlockMap(mean, None),
        is_token=None,
        queries=QUERIES if length > max(QUERIES) else (),
        top=top_keys(weights[:, :, list(QUERIES)]) if length > max(QUERIES) else None,
    )


def top_keys(rows: Tensor) -> look.TopKeys:
    """The keys of weights (1, H, queries, keys), one by one."""
    keys, weights = torch.full(rows.shape, -1), torch.zeros(rows.shape)
    for place, row in ((place, rows[place]) for place in itertools.product(*map(range, rows.shape[:3]))):
        total = 0.0
        for n, key in enumerate(sorted(range(len(row)), key=lambda key: -row[key])):
            if total >= 0.9 or row[key] == 0:
                break
            keys[place][n], weights[place][n] = key, row[key]
            total += row[key].item()
    return look.TopKeys(keys, weights, weights.sum(-1))


def planted(tokens: tuple[str, ...] = TOKENS, model: str = "toy", text: str = "king.txt") -> Seen:
    """Two layers of different heads and masks, a head of no numbers, a window and pooled heads with their prices."""
    length = len(tokens)
    draw = Draw(0)
    layers = [
        layer_record(NAMES[0], Mask.causal(), 4, 2, length, 6, draw, WINDOWS),
        layer_record(NAMES[1], Mask.causal(window=5), 3, 1, length, 6, draw, WINDOWS),
    ]
    layers[1].keys_in_effect[:, 2] = torch.nan
    layers[1].distance.mean[:, 2] = torch.nan
    recording, priced = Recording(WINDOWS, SINKS, tuple(layers)), prices(length, draw)
    seen = Seen(model, text, tokens, 40, 2, recording, priced, seven=seven(length, draw))
    return seen._replace(agreements=(agreement(draw),), reaches=(("As it is", reach(length, draw)),))


def reach(length: int, draw: Draw) -> Reach:
    """Of token 1, with windows of 3 and 4 tokens; one hidden state changes that is out of reach."""
    stops = tuple(min(length, stop) for stop in (2, 4, 7))
    change = 10 ** -draw.between(0, 4, 3, length)
    for row, stop in zip(change, stops, strict=True):
        row[:1] = row[stop:] = 0
    change[1, -1] = 0.5
    return Reach(1, (3, 4), stops, change)


def agreement(draw: Draw) -> Agreement:
    """Of two layers with four KV heads each, two of which are pooled, in another order in the first layer."""
    layers = []
    for n, groups in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
        keys, values = draw.between(0, 1, 2, 4, 4)
        keys, values = ((x + x.T) / 2 for x in (keys, values))
        layers.append(LayerAgreement(n, keys.fill_diagonal_(1), values.fill_diagonal_(1), groups))
    return Agreement("2 KV heads by aligned pooling", tuple(layers))


def seven(length: int, draw: Draw) -> Seven:
    """Of layer 0, whose 4 heads share 2 KV heads."""
    half, at = max(1, length // 2), length - 2
    ends = [(0, length), (0, length), (0, half), (0, at + 1), (max(0, at - 3), at + 1), (0, at + 1), (0, at + 1)]
    mechanisms = []
    for n, (name, (first, stop)) in enumerate(zip(MECHANISMS, ends, strict=True)):
        weights = draw.between(0.01, 1, 1 if name == "multi-head" else 4, max(0, stop - first))
        costs = 1000 * (n + 1) + n, 100 * (n + 1)
        mechanisms.append(Mechanism(name, first, max(0, stop), weights / weights.sum(-1, keepdim=True), *costs))
    return Seven(NAMES[0], at, 4, 4, 2, 2, tuple(mechanisms))


def prices(length: int, draw: Draw) -> tuple[Price, ...]:
    loss = draw.between(1, 6, 1, length - 1)
    loss[0, 3] = torch.nan  # a token that nothing predicts
    increase = draw.between(-0.2, 0.6, 2, 1, length - 1) + loss - loss
    together = [Together((1,), loss + draw.between(-0.1, 0.11, 1, length - 1))]
    together += [Together((0, 1), loss + draw.between(-0.5, 2.5, 1, length - 1))]
    window = Price("a window of 3 tokens and 1 sink token", 3, 1, None, NAMES, loss, increase, tuple(together))
    increase = draw.between(-0.2, 3, 2, 1, length - 1) + loss - loss
    pooled = Together((0, 1), loss + draw.between(0, 4, 1, length - 1))
    return window, Price("1 KV head by mean pooling", None, 0, 1, NAMES, loss, increase, (pooled,))
