"""What a page's script takes from a `Seen`: numbers to six digits, and arrays as codes."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkv.analysis.labels import labels, labels_of
from qkv.analysis.page import codes
from qkv.analysis.page.markup import visible
from qkv.analysis.pricing import Price
from qkv.analysis.recording import Recording
from qkv.analysis.seen import Against, Row, Seen
from qkv.analysis.seven import Mechanism, Seven
from qkv.analysis.words import keys_seen
from qkv.layer_record import LayerRecord

STRIP = 128
"""Blocks of keys, at most, in the strip of a mechanism."""
HEAVIEST = 5
"""Keys that are named below a strip."""
ROWS_AT_ONCE = 256
"""Queries whose mask is written out at once: 8 MB for 4096 keys."""


def data_of(seen: Seen, even: Sequence[Tensor]) -> dict[str, Any]:
    """A document for the page's script, with the maps of `even_maps`."""
    index: dict[str, int] = {}  # of each map, in the order in which they are found
    short = labels_of(seen.recording.layers)
    layers = [
        {"label": label, **_layer(layer), **(_heads(seen, layer, one, index) if is_shown else _NO_HEADS)}
        for label, layer, one, is_shown in zip(short, seen.recording.layers, even, seen.is_shown(), strict=True)
    ]
    return {
        "tokens": list(seen.tokens),
        "windows": list(seen.recording.windows),
        "sink_tokens": seen.recording.sink_tokens,
        "layers": layers,
        "even": list(index),
        "prices": [_price(seen, price) for price in seen.prices],
        "against": None if seen.against is None else _against(seen.against),
        "seven": None if seen.seven is None else _seven(seen, seen.seven),
    }


def as_script(document: dict[str, Any]) -> str:
    """JSON in ASCII that no parser of HTML takes for a tag, an entity or the end of a script."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def rounded(number: float) -> float | None:
    """To six digits; None for what JSON does not have."""
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _numbers(numbers: Tensor) -> list[float | None]:
    return [rounded(number) for number in numbers.tolist()]


def _layer(layer: LayerRecord) -> dict[str, Any]:
    return {
        "name": layer.name,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "queries": layer.keys_in_effect.shape[2],
        "keys": None if layer.is_cross else layer.keys_in_effect.shape[2] + layer.offset,
        "keys_in_effect": _numbers(layer.mean(layer.keys_in_effect)[0]),
        "distance": _numbers(layer.mean(layer.distance.mean)[0]),
        "spread": _numbers(layer.mean(layer.distance.spread)[0]),
        "sinks": _numbers(layer.mean(layer.sinks.first + layer.sinks.learned)[0]),
        "cut": [_numbers(row) for row in layer.cut_by_head()[:, 0]],
        "change": [_numbers(row) for row in layer.change_by_head()[:, 0]],
        "is_cross": layer.is_cross,
    }


_NO_HEADS: dict[str, Any] = {"map": None, "map_shape": [0, 0], "even": [], "rows": []}
"""of a layer whose heads are not shown one by one"""


def _heads(seen: Seen, layer: LayerRecord, even: Tensor, index: dict[str, int]) -> dict[str, Any]:
    weights = layer.map.mean[0]
    of_heads = [index.setdefault(codes.share(one, 16), len(index)) for one in even]
    return {
        "map": codes.share(weights, 8),
        "map_shape": list(weights.shape[1:]),
        "map_gaps": weights.isnan().any(2).flatten().nonzero().flatten().tolist(),
        "even": of_heads if len(of_heads) == layer.heads else of_heads * layer.heads,
        "rows": [{"query": query, "heads": list(map(_row, rows))} for query, rows in seen.rows(layer)],
    }


def _row(row: Row) -> dict[str, Any]:
    return {"keys": list(row.keys), "weights": list(map(rounded, row.weights)), "covered": rounded(row.covered)}


def even_maps(recording: Recording) -> list[Tensor]:
    """For each layer, the block map of a head that gives the same weight to all keys that it sees.

    Each is ``(1 or H, query blocks, key blocks)``. Blocks that are hidden are 0.
    """
    found: dict[tuple[Any, ...], Tensor] = {}
    maps = []
    for layer in recording.layers:
        given = layer.mask, layer.offset, layer.is_cross, layer.keys_in_effect.shape[2], *layer.map.mean.shape[2:]
        if given not in found:
            found[given] = _even_map(layer)
        maps.append(found[given])
    return maps


def _even_map(layer: LayerRecord) -> Tensor:
    rows, columns = layer.map.mean.shape[2:]
    if layer.is_cross:  # all of a context, whose length is not known
        return torch.full((1, rows, columns), 1 / columns)
    lq = layer.keys_in_effect.shape[2]
    lk = lq + layer.offset
    of_keys = torch.arange(lk) * columns // lk
    of_queries = torch.arange(lq) * rows // lq
    found = torch.zeros(1, rows, columns, dtype=torch.float64)
    for start in range(0, lq, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, lq)
        sees = layer.mask.select_queries(start, stop).visible(stop - start, lk, layer.offset + start)[0].cpu().double()
        blocks = sees.new_zeros(*sees.shape[:2], columns).index_add_(2, of_keys, sees)
        blocks /= sees.sum(2, keepdim=True).clamp(min=1)
        found = found.expand(len(blocks), -1, -1).clone().index_add_(1, of_queries[start:stop], blocks)
    return found / of_queries.bincount()[:, None]


def _price(seen: Seen, price: Price) -> dict[str, Any]:
    return {
        "change": price.change,
        "labels": labels(price.layers),
        "loss": codes.signed(price.loss[0]),
        "alone": [codes.signed(increase[0]) for increase in price.increase],
        "by_layer": _numbers(price.by_layer),
        "together": [
            {
                "layers": list(saving.layers),
                "increase": rounded(saving.increase),
                "tokens": codes.signed((some.loss - price.loss)[0]),
            }
            for saving, some in zip(seen.savings(price), price.together, strict=True)
        ],
    }


def _seven(seen: Seen, found: Seven) -> dict[str, Any]:
    n, names = len(seen.tokens), [layer.name for layer in seen.recording.layers]
    columns, at = min(STRIP, n), names.index(found.layer)
    block = torch.arange(n) * columns // n

    def mechanism(one: Mechanism) -> dict[str, Any]:
        strip = one.weights.new_zeros(len(one.weights), columns)
        heaviest = one.weights.topk(min(HEAVIEST, one.weights.shape[1]))
        keys = (heaviest.indices + one.first).tolist()
        return {
            "name": one.name,
            "first": one.first,
            "stop": one.stop,
            "scores": one.scores,
            "bytes": one.cache_numbers * seen.bytes_per_number,
            "strip": codes.share(strip.index_add_(1, block[one.first : one.stop], one.weights), 8),
            "keys": keys,
            "weights": [_numbers(row) for row in heaviest.values],
        }

    return {
        "layer": labels(names)[at],
        "own": keys_seen(seen.recording.layers[at]),
        "query": found.query,
        "window": found.window,
        "heads": found.heads,
        "kv_heads": found.kv_heads,
        "groups": found.groups,
        "columns": columns,
        "mechanisms": list(map(mechanism, found.mechanisms)),
    }


def _against(against: Against) -> dict[str, Any]:
    increase = against.loss - against.before
    return {
        "model": visible(against.model),
        "loss": codes.signed(against.before[0]),
        "increase": rounded(increase.nanmean().item()),
        "tokens": codes.signed(increase[0]),
    }
