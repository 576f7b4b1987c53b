"""`Seen`: what a model attends to on a text, what changes would cost it, and which layers could have a window."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.analysis.pricing import Price
from qkv.analysis.recording import Recording
from qkv.convert.families.windows import as_ranges

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
        together = price.together[-1].loss - price.loss if price.together else price.increase.mean(0)
        return _costly(price.loss, together, count)

    def as_json(self, most: float) -> dict[str, Any]:
        """A document for `json.dumps`, with the proposal that ``qkv convert --like`` takes. None stands for NaN."""
        recording, proposal = self.recording, self.proposal(most)
        cuts = [None if layer.is_cross else layer.cut_by_kv_head()[:, 0] for layer in recording.layers]
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
                    "queries_without_number": int(layer.no_number[0].sum()),
                }
                for layer, cut in zip(recording.layers, cuts, strict=True)
            ],
            "without_heads": list(recording.without_heads),
            "prices": [self._price_as_json(price) for price in self.prices],
            "against": None if self.against is None else self._against_as_json(self.against),
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


def labels(names: Sequence[str]) -> list[str]:
    """Short names of layers: their numbers, where they differ in these alone.

    Example:
        >>> labels(["model.layers.0.self_attn", "model.layers.1.self_attn"])
        ['0', '1']
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(.*)", name) for name in names]
    around = {(part[1], part[3]) for part in parts if part}
    numbers = [part[2] for part in parts if part]
    if len(around) == 1 and len(set(numbers)) == len(names):
        return numbers
    return [name.removeprefix("model.") for name in names]


def labels_of(recording: Recording) -> list[str]:
    """Short names of all layers: their numbers, with the group where there are several.

    Example:
        >>> labels_of(record(t5, text, decoder_input_ids=target))  # doctest: +SKIP
        ['encoder 0', 'encoder 1', 'decoder 0', 'cross 0', 'decoder 1', 'cross 1']
    """
    groups = [layer.group for layer in recording.layers]
    found = [""] * len(groups)
    for group in dict.fromkeys(groups):
        members = [index for index, other in enumerate(groups) if other == group]
        names = [recording.layers[index].name for index in members]
        if len(set(names)) < len(names):  # a module that is called several times, as in ALBERT
            names = [f"{name}, call {call}" for call, name in enumerate(names)]
        for index, label in zip(members, labels(names), strict=True):
            found[index] = label if len(set(groups)) == 1 else f"{group} {label}"
    return found


def listed(labels: Iterable[str]) -> str:
    """Layers by their labels: numbers that follow each other together.

    Example:
        >>> listed(["0", "1", "2", "5"]), listed(["encoder 0", "decoder 0", "decoder 1"]), listed(["a.0", "a.b"])
        ('0-2, 5', 'encoder 0, decoder 0-1', 'a.0, a.b')
    """
    numbers: dict[str, list[int]] = {}
    others: list[str] = []
    for label in labels:
        group, _, number = label.rpartition(" ")
        if number.isdecimal():
            numbers.setdefault(group, []).append(int(number))
        else:
            others.append(label)
    return ", ".join([*(f"{group} {as_ranges(some)}".strip() for group, some in numbers.items()), *others])


def narrow_layers(recording: Recording, window: int) -> str | None:
    """Which layers a window does not change, since they see as few keys already; None if it changes all.

    Example:
        >>> narrow_layers(record(mistral, text), 8192)  # doctest: +SKIP
        'layers 0-31 see 4,096 keys at most'
    """
    found: dict[tuple[int, bool], list[str]] = {}
    for label, layer in zip(labels_of(recording), recording.layers, strict=True):
        if not layer.is_cross and layer.window is not None and layer.window <= window:
            found.setdefault((layer.window, layer.sees_later_keys), []).append(label)
    says = [
        f"{'layer' if len(some) == 1 else 'layers'} {listed(some)} {'sees' if len(some) == 1 else 'see'} "
        f"{own:,} {'key' if own == 1 else 'keys'}{' a side' if is_for_sides else ''} at most"
        for (own, is_for_sides), some in found.items()
    ]
    return "; ".join(says) or None


def without_number(recording: Recording) -> str | None:
    """What the means of a recording leave out, in words; None if nothing."""
    found = [
        f"{count:,} in layer {label}"
        for label, layer in zip(labels_of(recording), recording.layers, strict=True)
        if (count := int(layer.no_number[0].sum())) > 0
    ]
    if not found:
        return None
    return f"Queries of heads that have no number, for NaN or inf, and are left out of the means: {', '.join(found)}."


def numbers_of(names: Sequence[str]) -> list[int]:
    """The numbers of layers in the model, as their names have them; else, their places among these."""
    return [int(label) if label.isdecimal() else index for index, label in enumerate(labels(names))]


def _numbers(values: Tensor) -> list[float | None]:
    """Finite numbers; None for others, which JSON does not have."""
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
