"""What `qkv see` measures of a model on a text."""

from typing import Any

import torch

from qkv.analysis import (
    Against,
    Agreement,
    Price,
    PriceInterrupted,
    Reach,
    Recording,
    Saving,
    Seen,
    Seven,
    losses,
    price,
    reach,
    seven,
)
from qkv.analysis.labels import numbers_of
from qkv.cli.convert import Pool
from qkv.cli.see.reading import TOGETHER
from qkv.convert import CheckpointError, agreement_by_layer
from qkv.convert.families.registry import find_family
from qkv.convert.families.windows import require_windows, with_windows
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, Opened, quiet
from qkv.models.progress import Progress


def measure_prices(
    language_model: LanguageModel,
    inputs: dict[str, Any],
    recording: Recording,
    windows: list[int],
    sinks: int,
    heads: list[int],
    pool: Pool,
    progress: Progress,
) -> tuple[tuple[Price, ...], bool]:
    """The prices, and whether they are not all since the user interrupted it."""
    own = {layer.name: layer.window for layer in recording.layers if layer.group == "decoder"}
    changes: list[tuple[str, int, list[int], dict[str, Any]]] = []
    for number in windows:
        count = sum(window is None or window > number for window in own.values())
        some = sorted({-(-count * part // TOGETHER) for part in range(1, TOGETHER + 1)})
        changes.append((f"a window of {number}", count, some, {"window": number, "sink_tokens": sinks}))
    every = len(own)
    changes += [(f"KV heads: {n}", every, [every], {"kv_heads": n, "pooling": pool.value}) for n in heads]
    found: list[Price] = []
    try:
        for name, count, some, change in changes:
            with progress.step(f"measuring {name}", count + len(some), "passes") as on_progress, quiet():
                found.append(price(language_model.model, together=some, on_progress=on_progress, **change, **inputs))
    except PriceInterrupted as interrupt:
        return (*found, interrupt.price), True
    except KeyboardInterrupt:
        if not found:
            raise
        return tuple(found), True
    return tuple(found), False


def against_other(
    language_model: LanguageModel,
    inputs: dict[str, Any],
    other: Opened,
    dtype: torch.dtype,
    progress: Progress,
) -> Against:
    """The losses of another model on the same text."""
    with progress.step("predicting the text"), quiet():
        before = losses(language_model.model, **inputs)
    loaded = other.load(dtype, progress)
    vocabulary, largest = loaded.vocabulary, max(int(token_ids.max()) for token_ids in inputs.values())
    if largest >= vocabulary:
        raise CommandError(
            f"--against: {loaded.name} must have the tokens of {language_model.name}; it has {vocabulary}, and the "
            f"text has token {largest}."
        )
    with progress.step("predicting the text with the other model"), quiet():
        return Against(loaded.name, before, losses(loaded.model, **inputs))


def agreements_of(
    language_model: LanguageModel, prices: tuple[Price, ...], pool: Pool, progress: Progress
) -> tuple[Agreement, ...]:
    """How alike the KV heads are that changes pool; none for families of which that is not known."""
    state, config = language_model.model.state_dict(), language_model.model.config.to_dict()
    found = []
    for each in prices:
        if each.kv_heads is None or find_family("qkv see", config).layout is None:
            continue
        with progress.step("comparing KV heads"), quiet():
            layers = agreement_by_layer(state, config, each.kv_heads, how=pool.value)
        found.append(Agreement(each.change, tuple(layers)))
    return tuple(found)


def seven_of(
    language_model: LanguageModel,
    token_ids: torch.Tensor,
    recording: Recording,
    shown: tuple[int, ...] | None,
    queries: list[int],
    windows: list[int],
    progress: Progress,
) -> Seven | None:
    """The seven mechanisms in the middle one of the layers that are shown; None for other models than decoders."""
    names = [layer.name for layer in recording.layers]
    chosen = [name for name, number in zip(names, numbers_of(names), strict=True) if shown is None or number in shown]
    if any(layer.group != "decoder" for layer in recording.layers):
        return None
    # Not the last token, before which all keys lie: with a causal mask it sees as many as without.
    query = queries[0] if queries else token_ids.shape[1] * 3 // 4
    options = {"query": query, "window": min(windows, default=None)}
    with progress.step("trying the seven mechanisms"), quiet():
        return seven(language_model.model, token_ids, layer=chosen[len(chosen) // 2], **options)  # type: ignore[arg-type]


def reaches_of(
    language_model: LanguageModel, token_ids: torch.Tensor, seen: Seen, most: float, progress: Progress
) -> tuple[tuple[str, Reach], ...]:
    """How far a token reaches in a causal model with windows, and with those that are proposed."""
    layers = seen.recording.layers
    if any(layer.group != "decoder" for layer in layers):
        return ()
    kinds: list[tuple[str, dict[str, int]]] = []
    if any(layer.window is not None for layer in layers):
        kinds.append(("As it is", {}))
    proposal = seen.proposal(most)
    if proposal is not None and proposal.price.window is not None:
        names = zip(numbers_of(proposal.price.layers), proposal.price.layers, strict=True)
        window = proposal.price.window
        kinds.append(("The proposal", {name: window for number, name in names if number in proposal.layers}))
    if not kinds:
        return ()
    try:
        with progress.step("following one token"), quiet():
            position = token_ids.shape[1] // 8
            found = [
                (title, reach(language_model.model, token_ids, position, windows=windows)) for title, windows in kinds
            ]
    except ValueError as error:
        progress.notify(f"the reach was not measured: {error}")
        return ()
    return tuple(found)


def why_not(language_model: LanguageModel, proposal: Saving | None) -> str | None:
    """Why `qkv convert` could not write the windows that are proposed; None if it could."""
    if proposal is None or proposal.price.window is None:
        return None
    if proposal.price.sink_tokens:
        return "Configurations of transformers have no sink tokens; qkv.SlidingKVCache has them."
    config = language_model.model.config.to_dict()
    try:
        family = find_family("qkv convert", config)
        require_windows("qkv convert", family, config["model_type"])
        count = len(language_model.model.state_dict())
        with_windows("qkv convert", family, config, proposal.price.window, list(proposal.layers), count)
    except CheckpointError as error:
        return f"No configuration for it: {error}"
    return None
