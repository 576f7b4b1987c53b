"""`qkv see`: what a model attends to on a text, and what windows or fewer KV heads would cost it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qkv.analysis import (
    Against,
    Agreement,
    Price,
    Reach,
    Recording,
    Saving,
    Seen,
    Seven,
    losses,
    price,
    reach,
    record,
    seven,
)
from qkv.analysis.page import page_of
from qkv.analysis.seen import MOST, numbers_of
from qkv.cli.convert import Pool
from qkv.cli.options import MAX_COUNT, Dtype, count_option
from qkv.cli.reports.see import print_mechanisms, print_seen
from qkv.convert import CheckpointError, agreement_by_layer
from qkv.convert.families.registry import find_family
from qkv.convert.families.windows import as_ranges, require_windows, with_windows
from qkv.layer_record import cuts_nothing
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, load, quiet
from qkv.models.output_file import check_output, write_output
from qkv.models.progress import Progress
from qkv.models.source import ModelSource, expand_home, find_model, gguf_source
from qkv.models.text import KING_LEAR, read_text

CHARACTERS = 32
"""that are read of a text for each token"""
TOGETHER = 8
"""Numbers of layers, at most, that are changed together."""


def see(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder written by save_pretrained, GGUF file, name of a model on the Hugging Face Hub, or 'demo' for "
            "that of qkv demo. Without one, the seven mechanisms are shown.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text in UTF-8. Default: a scene of King Lear.", metavar="FILE", show_default=False),
    ] = None,
    tokens: Annotated[int, count_option("Most tokens of the text that are read.", "TOKENS")] = 4096,
    window: Annotated[
        list[int] | None,
        typer.Option(help="Number of keys that a query would see at most; may be given several times.", metavar="KEYS"),
    ] = None,
    sinks: Annotated[
        int, typer.Option(help="First keys that a window shows as well.", metavar="KEYS", min=0, max=MAX_COUNT)
    ] = 0,
    kv_heads: Annotated[
        list[int] | None,
        typer.Option(help="For --measure: number of KV heads; may be given several times.", metavar="HEADS"),
    ] = None,
    pool: Annotated[Pool, typer.Option(help="For --kv-heads: how heads are pooled.")] = Pool.mean,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the loss with each layer changed, and with several.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another model with the same tokens, such as a converted one: compares the losses on the text.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    query: Annotated[
        list[int] | None,
        typer.Option(
            help="Place of a token in the text, from 0, or from the end, from -1: shows which keys it attends to; may "
            "be given several times.",
            metavar="TOKEN",
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a layer whose heads are shown one by one; may be given several times. Default: all on the "
            "page, the middle one for --query in the report.",
            metavar="LAYER",
        ),
    ] = None,
    most: Annotated[
        float, typer.Option(help="Increase of the loss that the proposal may cost.", metavar="NATS", min=0)
    ] = MOST,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the model.")] = Dtype.float32,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML page to write, which needs nothing else.", metavar="FILE", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Show what a model of transformers attends to on a text, and what a window or fewer KV heads would cost it.

    For each layer: the keys that it sees, the number of keys in effect, how far back they are, the weight on the first
    tokens, and the weight that a window would cut. With --measure, the loss if one layer had the window or the heads,
    for each; then with the cheapest layers together, the tokens that pay, and the bytes that it saves. All of it before
    training, on this text alone. What --json prints is what qkv convert --like takes. With --query, the tokens that one
    token attends to, head by head.
    """
    if model is None:
        sources = map(context.get_parameter_source, context.params)
        if any(source is not None and source.name == "COMMANDLINE" for source in sources):
            raise typer.BadParameter("options need a MODEL; without one, the seven mechanisms are shown.")
        print_mechanisms(Console(file=sys.stdout))
        return
    windows, heads = _distinct("--window", window), _distinct("--kv-heads", kv_heads)
    if heads and not measure:
        raise typer.BadParameter("--kv-heads needs --measure.")
    if measure and not (windows or heads):
        raise typer.BadParameter("--measure needs --window or --kv-heads.")
    if out is not None:
        out = expand_home(out)
        check_output(out, overwrite)
        if text is not None and out.exists() and out.samefile(expand_home(text)):
            raise CommandError(f"--out: {out} is the text; give another name.")
    path = KING_LEAR if text is None else text
    words = read_text(path, CHARACTERS * tokens)
    progress = Progress()
    torch_dtype = getattr(torch, dtype.value)
    source, other_source = (None if each is None else _source(each, progress) for each in (model, against))
    assert source is not None
    language_model = load(source, torch_dtype, progress)
    token_ids, left_out = _tokenised(language_model, words, tokens)
    length = token_ids.shape[1]
    for number in windows:
        if number + sinks >= length:
            raise CommandError(f"--window: {cuts_nothing(number, sinks, length)}")
    queries = _places(query or [], length)
    try:
        with progress.step("recording attention"), quiet():
            recording = record(language_model.model, token_ids, windows=windows, sink_tokens=sinks, queries=queries)
        shown = _shown(layer, recording, language_model.name)
        prices = _prices(language_model, token_ids, recording, windows, sinks, heads, pool, progress) if measure else ()
        agreements = _agreements(language_model, prices, pool, progress) if out or as_document else ()
        other = (
            None if other_source is None else _against(language_model, token_ids, other_source, torch_dtype, progress)
        )
        one = None if out is None else _seven(language_model, token_ids, recording, shown, queries, windows, progress)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    pieces = tuple(language_model.tokenizer.decode([token]) for token in token_ids[0].tolist())
    seen = Seen(
        language_model.name,
        path.name,
        pieces,
        left_out,
        torch_dtype.itemsize,
        recording,
        prices,
        against=other,
        shown=shown,
        seven=one,
        agreements=agreements,
    )
    if out is not None:
        seen = seen._replace(reaches=_reaches(language_model, token_ids, seen, most, progress))
        write_output(out, page_of(seen, most), overwrite)
        progress.notify(f"wrote {out}")
    if as_document:
        print(json.dumps(seen.as_json(most), indent=2, allow_nan=False))
    else:
        print_seen(seen, most, _why_not(language_model, seen.proposal(most)), Console(file=sys.stdout))


def _why_not(language_model: LanguageModel, proposal: Saving | None) -> str | None:
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


def _source(model: str, progress: Progress) -> ModelSource:
    """The model of `qkv demo` by its name, unless there is a file or folder of this name; else as `find_model`."""
    if model == "demo" and not Path(model).exists():
        return gguf_source(cached_weights(SMOLLM2_135M, progress))
    return find_model(model)


def _against(
    language_model: LanguageModel, token_ids: torch.Tensor, other: ModelSource, dtype: torch.dtype, progress: Progress
) -> Against:
    with progress.step("predicting the text"), quiet():
        before = losses(language_model.model, token_ids)
    loaded = load(other, dtype, progress)
    vocabulary = loaded.vocabulary
    if token_ids.max() >= vocabulary:
        raise CommandError(
            f"--against: {loaded.name} must have the tokens of {language_model.name}; it has {vocabulary}, and the "
            f"text has token {token_ids.max()}."
        )
    with progress.step("predicting the text with the other model"), quiet():
        return Against(loaded.name, before, losses(loaded.model, token_ids))


def _distinct(option: str, numbers: list[int] | None) -> list[int]:
    """The numbers of an option, in order."""
    found = numbers or []
    for number in found:
        if number < 1:
            raise typer.BadParameter(f"it must be at least 1; got {number}.", param_hint=option)
    return sorted(set(found))


def _places(queries: list[int], length: int) -> list[int]:
    """The places of tokens from the first one."""
    for query in queries:
        if not -length <= query < length:
            raise CommandError(
                f"--query: it must be the place of one of the {length:,} tokens that are read, {-length} to "
                f"{length - 1}; got {query}. Give another, or more --tokens."
            )
    return list(dict.fromkeys(query % length for query in queries))


def _shown(layers: list[int] | None, recording: Recording, name: str) -> tuple[int, ...] | None:
    """The numbers of layers that are shown head by head; None for all."""
    if not layers:
        return None
    known = numbers_of([layer.name for layer in recording.layers])
    for layer in layers:
        if layer not in known:
            raise CommandError(
                f"--layer: it must be the number of a layer of {name} that attends, {as_ranges(known)}; got {layer}."
            )
    return tuple(sorted(set(layers)))


def _seven(
    language_model: LanguageModel,
    token_ids: torch.Tensor,
    recording: Recording,
    shown: tuple[int, ...] | None,
    queries: list[int],
    windows: list[int],
    progress: Progress,
) -> Seven | None:
    """The seven mechanisms in the middle one of the layers that are shown; None where some attend to a context."""
    names = [layer.name for layer in recording.layers]
    chosen = [name for name, number in zip(names, numbers_of(names), strict=True) if shown is None or number in shown]
    if any(layer.is_cross for layer in recording.layers):
        return None
    # Not the last token, before which all keys lie: with a causal mask it sees as many as without.
    query = queries[0] if queries else token_ids.shape[1] * 3 // 4
    options = {"query": query, "window": min(windows, default=None)}
    with progress.step("trying the seven mechanisms"), quiet():
        return seven(language_model.model, token_ids, layer=chosen[len(chosen) // 2], **options)  # type: ignore[arg-type]


def _prices(
    language_model: LanguageModel,
    token_ids: torch.Tensor,
    recording: Recording,
    windows: list[int],
    sinks: int,
    heads: list[int],
    pool: Pool,
    progress: Progress,
) -> tuple[Price, ...]:
    own = {layer.name: layer.window for layer in recording.layers}
    changes: list[tuple[str, int, list[int], dict[str, Any]]] = []
    for number in windows:
        count = sum(window is None or window > number for window in own.values())
        if not count:
            raise CommandError(
                f"--window {number} changes no layer of {language_model.name}: each sees as few keys already."
            )
        some = sorted({-(-count * part // TOGETHER) for part in range(1, TOGETHER + 1)})
        changes.append((f"a window of {number}", count, some, {"window": number, "sink_tokens": sinks}))
    every = len(own)
    changes += [(f"KV heads: {n}", every, [every], {"kv_heads": n, "pooling": pool.value}) for n in heads]
    found = []
    for name, count, some, change in changes:
        with progress.step(f"measuring {name}", count + len(some), "passes") as on_progress, quiet():
            found.append(price(language_model.model, token_ids, together=some, on_progress=on_progress, **change))
    return tuple(found)


def _reaches(
    language_model: LanguageModel, token_ids: torch.Tensor, seen: Seen, most: float, progress: Progress
) -> tuple[tuple[str, Reach], ...]:
    """How far a token reaches in a causal model with windows, and with those that are proposed."""
    layers = seen.recording.layers
    if any(layer.is_cross or layer.mask.shows_later_keys(1) for layer in layers):
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
        progress.notify(f"no picture of the reach: {error}")
        return ()
    return tuple(found)


def _agreements(
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


def _tokenised(language_model: LanguageModel, text: str, most: int) -> tuple[torch.Tensor, int]:
    """The tokens of a text ``(1, L)``, at most so many, and the number of those left out."""
    with quiet():
        token_ids: torch.Tensor = language_model.tokenizer(text, return_tensors="pt").input_ids
    count = token_ids.shape[1]
    kept = min(count, most, language_model.context_length or count)
    if kept < 2:
        raise CommandError(f"--text: the text must have at least two tokens; got {kept}. Give a longer text.")
    language_model.check_vocabulary(token_ids)
    return token_ids[:, :kept], count - kept
