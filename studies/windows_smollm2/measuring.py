"""`measured`: what a window hides from each layer of a model, what it costs by layer, and of the cheapest together."""

from collections.abc import Sequence
from typing import Any

from settings import Settings
from torch import Tensor

from qkv.analysis import Recording, Seen, losses, price, record
from qkv.analysis.changes import Window


def measured(model: Any, token_ids: Tensor, sinks: int, settings: Settings) -> dict[str, Any]:
    """Screens and prices of all layers on a text, and the loss with some of them changed, chosen by each."""
    window = settings.window
    recording = record(model, token_ids, windows=[window], sink_tokens=sinks)
    count = len(recording.layers)
    numbers = sorted({-(-count * part // settings.parts) for part in range(1, settings.parts + 1)})
    priced = price(model, token_ids, window=window, sink_tokens=sinks, together=numbers)
    loss, screened = priced.loss.nanmean().item(), screens(recording)
    seen = Seen("", "", ("",) * token_ids.shape[1], 0, 2, recording, (priced,))
    together = []
    for number, saving in zip(numbers, seen.savings(priced), strict=True):
        chosen = cheapest(screened[SCREEN], number)
        with Window(window, sinks).of({name: model.get_submodule(name) for name in (priced.layers[n] for n in chosen)}):
            by_screen = losses(model, token_ids).nanmean().item() - loss
        together.append(
            {
                "layers": list(saving.layers),
                "increase": saving.increase,
                "cache_bytes": saving.cache_bytes,
                "layers_by_screen": chosen,
                "increase_by_screen": by_screen,
            }
        )
    return {
        "layers": list(priced.layers),
        "loss": loss,
        "cache_bytes": seen.cache_bytes({}),
        "price": priced.by_layer.tolist(),
        "screens": screened,
        "together": together,
    }


SCREEN = "weight cut, largest of KV heads"
"""The screen by which layers are chosen: what `qkv see` ranked them by when the study was made."""


def screens(recording: Recording) -> dict[str, list[float]]:
    """Numbers by layer, of one pass, that may tell what a window would cost."""
    layers = recording.layers
    return {
        SCREEN: recording.cut_by_layer()[:, 0].tolist(),
        "weight cut, mean of heads": [layer.cut_by_head()[0].mean().item() for layer in layers],
        "change of output, largest of heads": [layer.change_by_head()[0].max().item() for layer in layers],
        "change of output, mean of heads": [layer.change_by_head()[0].mean().item() for layer in layers],
        "distance": [layer.mean(layer.distance.mean).mean().item() for layer in layers],
        "keys in effect": [layer.mean(layer.keys_in_effect).mean().item() for layer in layers],
        "number of the layer": [float(number) for number in range(len(layers))],
    }


def cheapest(numbers: Sequence[float], count: int) -> list[int]:
    """The layers of the smallest numbers, in the order of the model."""
    return sorted(sorted(range(len(numbers)), key=numbers.__getitem__)[:count])
