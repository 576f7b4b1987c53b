"""Texts as a model of `qkv see` reads them, and what is refused before its weights are loaded."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from qkv.analysis import Recording
from qkv.analysis.changes import check_kv_heads
from qkv.analysis.labels import numbers_in
from qkv.analysis.page.document import LARGEST, least_size
from qkv.analysis.words import narrow_layers
from qkv.cli.convert import Pool
from qkv.convert import CheckpointError
from qkv.convert.families.windows import as_ranges
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, Opened, quiet
from qkv.models.progress import Progress
from qkv.models.source import ModelSource, find_model, gguf_source

CHARACTERS = 32
"""that are read of a text for each token"""
TOGETHER = 8
"""Numbers of layers, at most, that are changed together."""


class Sample(NamedTuple):
    """A text as a model reads it."""

    text: str
    """its name"""
    token_ids: torch.Tensor
    """(1, L)"""
    left_out: int | None
    """Tokens beyond those; None if there were more than were counted."""


def source_of(model: str, progress: Progress) -> ModelSource:
    """The model of `qkv demo` by its name, unless there is a file or folder of this name; else as `find_model`."""
    if model == "demo" and not Path(model).exists():
        return gguf_source(cached_weights(SMOLLM2_135M, progress))
    return find_model(model)


def read(
    language_model: LanguageModel, option: str, name: str, text: str, tokens: int, most_tokens: int | None
) -> Sample:
    """The tokens of a text that a model reads; ``most_tokens`` are those that the user asked for."""
    is_target = option == "--target"
    with quiet():
        given = {"text_target": text} if is_target else {"text": text}
        token_ids: torch.Tensor = language_model.tokenizer(**given, return_tensors="pt").input_ids
    if token_ids.numel():
        language_model.check_vocabulary(token_ids)
    if is_target:
        token_ids = language_model.after_start(token_ids)
    count, limit = token_ids.shape[1], language_model.context_length
    if limit is not None and most_tokens is not None and limit < min(count, most_tokens):
        raise CommandError(
            f"--tokens must fit into the context of {language_model.name}, {limit} tokens; got {most_tokens}. Give "
            f"{limit} or fewer."
        )
    kept = min(count, tokens, limit or count)
    if kept < 2:
        remedy = "Give a longer text." if kept == count else "Give more --tokens."
        raise CommandError(f"{option}: the text must have at least two tokens; got {kept}. {remedy}")
    is_whole = len(text) < CHARACTERS * tokens
    first = token_ids[:, :kept] if is_target else language_model.first(token_ids, kept)
    return Sample(name, first, count - kept if is_whole else None)


def check_kind(opened: Opened, target: Path | None, needs_loss: bool, heads: list[int]) -> None:
    """Raises a CommandError for options that a model of this kind does not have."""
    name, kind = opened.source.name, opened.kind
    if kind == "encoder" and needs_loss:
        raise CommandError(
            f"--measure and --against need the loss of each token by those before it; {name} predicts none, as an "
            "encoder or a model without a head. Leave them out."
        )
    if kind == "encoder-decoder" and target is None:
        raise CommandError(
            f"--target: {name} is an encoder-decoder, which reads --text and writes another text; give that as well."
        )
    if kind != "encoder-decoder" and target is not None:
        raise CommandError(f"--target is for encoder-decoders; {name} is not one. Leave it out.")
    if kind == "encoder-decoder" and heads:
        raise CommandError(
            f"--kv-heads: {name} is an encoder-decoder, whose layers of all kinds have as many KV heads. Convert it, "
            "and compare the whole: qkv convert --kv-heads, then qkv see --against."
        )


def check_heads(opened: Opened, heads: list[int], pool: Pool) -> None:
    """Raises a CommandError for KV heads that the model cannot have, before its weights are loaded."""
    if not heads:
        return
    model = opened.without_weights()
    try:
        for number in heads:
            check_kv_heads("--kv-heads", model, number, pool.value)
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error


def check_size(config: Any, length: int, windows: int, heads: int, measure: bool) -> None:
    """Raises a CommandError for a page that would be too large, as far as its size is known before the work."""
    config = config.get_text_config()
    layers, query_heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int) or not isinstance(query_heads, int):
        return
    passes = (layers + 1 + min(layers, TOGETHER)) * windows + (layers + 2) * heads if measure else 0
    maps, losses_ = least_size(layers, query_heads, length, passes)
    if maps + losses_ > LARGEST:
        measured = f", and the losses of {length:,} tokens, {passes} times, {losses_ / 1e6:.1f} MB" if passes else ""
        raise CommandError(
            f"--out: the page would have {(maps + losses_) / 1e6:.1f} MB or more, and {LARGEST / 1e6:.0f} MB are "
            f"allowed: maps of {layers} layers of {query_heads} heads take {maps / 1e6:.1f} MB{measured}. Give fewer "
            "--tokens, or fewer of --window and --kv-heads; --json has all numbers without a page."
        )


def check_windows(recording: Recording, windows: list[int]) -> None:
    """Raises a CommandError for a window that changes no layer."""
    for window in windows:
        own = [layer.window for layer in recording.layers if not layer.is_cross]
        if all(each is not None and each <= window for each in own):
            raise CommandError(f"--window {window}: {narrow_layers(recording.layers, window)}; give a smaller window.")


def places(queries: list[int], length: int) -> list[int]:
    """The places of tokens from the first one."""
    for query in queries:
        if not -length <= query < length:
            raise CommandError(
                f"--query: it must be the place of one of the {length:,} tokens that are read, {-length} to "
                f"{length - 1}; got {query}. Give another, or more --tokens."
            )
    return list(dict.fromkeys(query % length for query in queries))


def layers_shown(layers: list[int] | None, recording: Recording, name: str) -> tuple[int, ...] | None:
    """The numbers of layers that are shown head by head; None for all."""
    if not layers:
        return None
    known = sorted(set(numbers_in(recording.layers)))
    for layer in layers:
        if layer not in known:
            raise CommandError(
                f"--layer: it must be the number of a layer of {name} that attends, {as_ranges(known)}; got {layer}."
            )
    return tuple(sorted(set(layers)))
