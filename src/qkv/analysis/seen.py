"""`Seen`: what a model attends to on a text, what changes would cost it, and which layers could have a window."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.analysis.labels import numbers_in, numbers_of
from qkv.analysis.pricing import Price
from qkv.analysis.reach import Reach
from qkv.analysis.recording import Recording
from qkv.analysis.seven import Seven
from qkv.convert import LayerAgreement
from qkv.layer_record import LayerRecord

COSTLY = 20
"""Number of tokens in a document."""
MOST = 0.01
"""Nats a token that a proposal may cost, unless told otherwise."""


class Saving(NamedTuple):
    """What a change of some layers costs and saves."""

    price: Price
    layers: tuple[int, ...]
    """their numbers in the model"""
    increase: float
    """of the mean loss, in nats a token"""
    cache_bytes: int
    """of keys and values of the text, in all layers"""


class CostlyToken(NamedTuple):
    """A token whose loss a change increases."""

    position: int
    loss: float
    """before the change"""
    increase: float


class Against(NamedTuple):
    """Another model on the same text."""

    model: str
    before: Tensor
    """(1, L - 1), the losses of the first"""
    loss: Tensor
    """(1, L - 1), its own"""

    def costly(self, count: int) -> list[CostlyToken]:
        """The tokens whose loss is higher in the other model, by most."""
        return _costly(self.before, self.loss - self.before, count)


class Context(NamedTuple):
    """The text that the encoder of an encoder-decoder reads."""

    text: str
    """its name"""
    tokens: int
    tokens_left_out: int | None


class Agreement(NamedTuple):
    """How alike KV heads are that a change would make one."""

    change: str
    """as a `Price` names it"""
    layers: tuple[LayerAgreement, ...]


class Row(NamedTuple):
    """The heaviest keys of a query in one head, in order."""

    keys: tuple[int, ...]
    weights: tuple[float, ...]
    covered: float
    """the sum of these weights"""


def rows_of(layer: LayerRecord, n: int) -> list[Row]:
    """What the n-th of the chosen queries attends to, by query head."""
    assert layer.top is not None
    keys, weights, covered = (number[0, :, n] for number in layer.top)
    counts = (keys >= 0).sum(-1).tolist()
    heads = zip(keys.tolist(), weights.tolist(), covered.tolist(), counts, strict=True)
    return [Row(tuple(some[:count]), tuple(of_some[:count]), share) for some, of_some, share, count in heads]


class Seen(NamedTuple):
    """What was found of a model on a text of one row; of an encoder-decoder, on the text that its decoder reads."""

    model: str
    text: str
    """its name"""
    tokens: tuple[str, ...]
    """each as it reads"""
    tokens_left_out: int | None
    """of the text, beyond those; None if there were more than were counted"""
    bytes_per_number: int
    """of keys and values in the cache"""
    recording: Recording
    prices: tuple[Price, ...]
    against: Against | None = None
    context: Context | None = None
    shown: tuple[int, ...] | None = None
    """numbers of the layers whose heads are shown one by one; None for all"""
    seven: Seven | None = None
    """one query under the masks and groupings of the seven mechanisms"""
    agreements: tuple[Agreement, ...] = ()
    """for each change to fewer KV heads"""
    reaches: tuple[tuple[str, Reach], ...] = ()
    """how far a token has an influence, each with what it is of"""

    def is_shown(self) -> list[bool]:
        """For each layer of the recording, whether its heads are shown one by one."""
        return [self.shown is None or number in self.shown for number in numbers_in(self.recording.layers)]

    def rows(self, layer: LayerRecord) -> list[tuple[int, list[Row]]]:
        """The queries that were chosen in the text, and what each attends to; none of the encoder's own text."""
        if layer.group == "encoder" and self.context is not None:
            return []
        return [(query, rows_of(layer, n)) for n, query in enumerate(layer.queries)]

    def cache_bytes(self, changed: Mapping[str, Price], tokens: int | None = None) -> int:
        """Bytes of the keys and values of the text or of so many tokens.

        Of all layers but those of encoders, which keep none; some, by name, are changed as priced.
        """
        count, total = len(self.tokens) if tokens is None else tokens, 0
        for layer in self.recording.layers:
            if layer.group == "encoder":
                continue
            price = changed.get(layer.name)
            heads, length = layer.kv_heads, count
            if layer.is_cross and self.context is not None:
                length = self.context.tokens
            if layer.window is not None:
                length = min(length, layer.window)
            if price is not None and price.window is not None:
                length = min(length, price.window + price.sink_tokens)
            if price is not None and price.kv_heads is not None:
                heads = price.kv_heads
            total += length * heads * (layer.head_dim + layer.value_dim)
        return total * self.bytes_per_number

    def savings(self, price: Price) -> list[Saving]:
        """One for each number of layers that were changed together."""
        numbers = numbers_of(price.layers)
        return [
            Saving(
                price,
                tuple(numbers[index] for index in some.layers),
                (some.loss - price.loss).nanmean().item(),
                self.cache_bytes({price.layers[index]: price for index in some.layers}),
            )
            for some in price.together
        ]

    def proposal(self, most: float) -> Saving | None:
        """The windows that save most, of those whose loss increases by at most ``most`` nats; None if none saves."""
        possible = [
            saving
            for price in self.prices
            if price.window is not None
            for saving in self.savings(price)
            if saving.increase <= most and saving.cache_bytes < self.cache_bytes({})
        ]
        return min(possible, key=lambda saving: (saving.cache_bytes, saving.increase), default=None)

    def costly(self, price: Price, count: int) -> list[CostlyToken]:
        """The tokens whose loss increases most with the most layers changed together, or all in turn."""
        return _costly(price.loss, price.by_token, count)

    def as_json(self, most: float) -> dict[str, Any]:
        """A document for ``json.dumps``, with the proposal that ``qkv convert --like`` takes. None stands for NaN."""
        recording, proposal = self.recording, self.proposal(most)
        cuts = [None if layer.is_cross else layer.cut_by_kv_head()[:, 0] for layer in recording.layers]
        changes = [None if layer.is_cross else layer.change_by_head()[:, 0] for layer in recording.layers]
        return {
            "model": self.model,
            "text": self.text,
            "tokens": len(self.tokens),
            "tokens_left_out": self.tokens_left_out,
            "context": None if self.context is None else self.context._asdict(),
            "cache_bytes": self.cache_bytes({}),
            "windows": list(recording.windows),
            "sink_tokens": recording.sink_tokens,
            "layers": [
                {
                    "name": layer.name,
                    "mask": str(layer.mask),
                    "window": layer.window,
                    "is_cross": layer.is_cross,
                    "group": layer.group,
                    "heads": layer.heads,
                    "kv_heads": layer.kv_heads,
                    "keys_in_effect": _numbers(layer.mean(layer.keys_in_effect)[0]),
                    "distance": _numbers(layer.mean(layer.distance.mean)[0]),
                    "sinks": _numbers(layer.mean(layer.sinks.first + layer.sinks.learned)[0]),
                    "cut_by_kv_head": None if cut is None else [_numbers(row) for row in cut],
                    "change_by_head": None if change is None else [_numbers(row) for row in change],
                    "queries": self._rows_as_json(layer) if is_shown else [],
                    "queries_without_number": int(layer.no_number[0].sum()),
                }
                for layer, cut, change, is_shown in zip(recording.layers, cuts, changes, self.is_shown(), strict=True)
            ],
            "without_heads": list(recording.without_heads),
            "prices": [self._price_as_json(price) for price in self.prices],
            "against": None if self.against is None else self._against_as_json(self.against),
            "agreements": [
                {
                    "change": agreement.change,
                    "layers": [
                        {
                            "layer": layer.layer,
                            "keys": [_numbers(row) for row in layer.keys],
                            "values": [_numbers(row) for row in layer.values],
                            "groups": [list(group) for group in layer.groups],
                        }
                        for layer in agreement.layers
                    ],
                }
                for agreement in self.agreements
            ],
            "reaches": [
                {
                    "what": title,
                    "position": reach.position,
                    "windows": list(reach.windows),
                    "allowed": reach.allowed(),
                    "measured": reach.measured(),
                }
                for title, reach in self.reaches
            ],
            "proposal": None
            if proposal is None
            else {
                "window": proposal.price.window,
                "sink_tokens": proposal.price.sink_tokens,
                "layers": list(proposal.layers),
                "increase": proposal.increase,
                "cache_bytes": proposal.cache_bytes,
            },
        }

    def _repr_html_(self) -> str:
        """The page of `qkv.analysis.page`, in a frame of its own."""
        from qkv.analysis.page import frame, page_of

        return frame(page_of(self, MOST))

    def _rows_as_json(self, layer: LayerRecord) -> list[dict[str, Any]]:
        """The heaviest keys of the queries of a layer; tokens of another sequence have no text here."""
        return [
            {
                "position": at,
                "token": self.tokens[at],
                "heads": [
                    {
                        "covered": _number(row.covered),
                        "keys": list(row.keys),
                        "tokens": None if layer.is_cross else [self.tokens[key] for key in row.keys],
                        "weights": [_number(weight) for weight in row.weights],
                    }
                    for row in rows
                ],
            }
            for at, rows in self.rows(layer)
        ]

    def _price_as_json(self, price: Price) -> dict[str, Any]:
        return {
            "change": price.change,
            "window": price.window,
            "sink_tokens": price.sink_tokens,
            "kv_heads": price.kv_heads,
            "loss": _number(price.loss.nanmean().item()),
            "layers": list(price.layers),
            "layers_unmeasured": price.unmeasured,
            "increase_by_layer": _numbers(price.by_layer),
            "together": [
                {"layers": list(saving.layers), "increase": _number(saving.increase), "cache_bytes": saving.cache_bytes}
                for saving in self.savings(price)
            ],
            "costly_tokens": self._tokens_as_json(self.costly(price, COSTLY)),
        }

    def _against_as_json(self, against: Against) -> dict[str, Any]:
        return {
            "model": against.model,
            "loss_before": _number(against.before.nanmean().item()),
            "loss": _number(against.loss.nanmean().item()),
            "costly_tokens": self._tokens_as_json(against.costly(COSTLY)),
        }

    def _tokens_as_json(self, tokens: list[CostlyToken]) -> list[dict[str, Any]]:
        return [
            {
                "position": token.position,
                "token": self.tokens[token.position],
                "loss": _number(token.loss),
                "increase": _number(token.increase),
            }
            for token in tokens
        ]


def _costly(loss: Tensor, increase: Tensor, count: int) -> list[CostlyToken]:
    """The tokens of the largest increase, of those that increase."""
    found = increase[0].masked_fill(increase[0].isnan(), -torch.inf).topk(min(count, increase.shape[1]))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [CostlyToken(at + 1, loss[0, at].item(), more) for at, more in pairs if more > 0]


def _numbers(values: Tensor) -> list[float | None]:
    """Finite numbers; None for others, which JSON does not have."""
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
