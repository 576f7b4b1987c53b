"""`qkv see`: what a model attends to on a text, and what windows or fewer KV heads would cost it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from qkv.analysis import Against, Price, PriceInterrupted, Recording, Saving, Seen, losses, price, record
from qkv.analysis.changes import check_kv_heads
from qkv.analysis.page import page_of
from qkv.analysis.page.document import LARGEST, least_size
from qkv.analysis.seen import MOST, Context, narrow_layers
from qkv.cli.convert import Pool
from qkv.cli.options import MAX_COUNT, SINK_TOKENS, Dtype, count_option
from qkv.cli.reports.see import print_mechanisms, print_seen
from qkv.convert import CheckpointError
from qkv.convert.families.registry import find_family
from qkv.convert.families.windows import require_windows, with_windows
from qkv.layer_record import cuts_nothing
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.errors import CommandError
from qkv.models.language_model import LanguageModel, Opened, open_model, quiet
from qkv.models.output_file import check_output, write_output
from qkv.models.progress import Progress
from qkv.models.source import ModelSource, expand_home, find_model, gguf_source
from qkv.models.text import KING_LEAR, read_text

CHARACTERS = 32
"""that are read of a text for each token"""
TOGETHER = 8
"""Numbers of layers, at most, that are changed together."""
INTERRUPTED = 130
"""Exit code, as shells have it."""


class Sample(NamedTuple):
    """A text as a model reads it."""

    text: str
    """its name"""
    token_ids: torch.Tensor
    """(1, L)"""
    left_out: int | None
    """Tokens beyond those; None if there were more than were counted."""


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
    target: Annotated[
        Path | None,
        typer.Option(
            help="For an encoder-decoder: the text that its decoder writes, such as a translation.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, count_option("Most tokens of each text that are read.", "TOKENS")] = 4096,
    window: Annotated[
        list[int] | None,
        typer.Option(help="Number of keys that a query would see at most; may be given several times.", metavar="KEYS"),
    ] = None,
    sink_tokens: Annotated[
        int,
        typer.Option(
            *SINK_TOKENS, help="First tokens that a window shows as well.", metavar="TOKENS", min=0, max=MAX_COUNT
        ),
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
    training, on this text alone. What --json prints is what qkv convert --like takes.

    Encoders such as BERT have no price, since they predict no next token. Encoder-decoders such as T5 need --target;
    the price is that of windows in the layers of its decoder, by the loss of that text.
    """
    if model is None:
        if any(_is_given(context, parameter) for parameter in context.params):
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
        for option, file in (("text", text), ("target", target)):
            if file is not None and out.exists() and out.samefile(expand_home(file)):
                raise CommandError(f"--out: {out} is the {option}; give another name.")
    path = KING_LEAR if text is None else text
    words = read_text(path, CHARACTERS * tokens)
    target_words = None if target is None else read_text(target, CHARACTERS * tokens, "--target")
    progress = Progress()
    torch_dtype = getattr(torch, dtype.value)
    source, other_source = (None if each is None else _source(each, progress) for each in (model, against))
    assert source is not None
    opened = open_model(source, progress)
    _check_kind(opened, target, measure or against is not None, heads)
    other_opened = None if other_source is None else open_model(other_source, progress)
    if other_opened is not None and other_opened.kind != opened.kind:
        raise CommandError(
            f"--against: {against} must be of the kind of {model}, {opened.kind}; got {other_opened.kind}."
        )
    with quiet():
        _check_heads(opened, heads, pool)
    language_model = opened.load(torch_dtype, progress)
    most_tokens = tokens if _is_given(context, "tokens") else None
    sample = _read(language_model, "--text", path.name, words, tokens, most_tokens)
    read, inputs = sample, dict[str, Any](input_ids=sample.token_ids)
    if target is not None and target_words is not None:
        read = _read(language_model, "--target", target.name, target_words, tokens, most_tokens)
        inputs["decoder_input_ids"] = read.token_ids
    length = read.token_ids.shape[1]
    for number in windows:
        longest = length if measure else max(length, sample.token_ids.shape[1])
        if number + sink_tokens >= longest:
            raise CommandError(f"--window: {cuts_nothing(number, sink_tokens, longest)}")
    if out is not None:
        _check_size(opened.config, length, len(windows), len(heads), measure)
    interrupted = False
    try:
        with progress.step("recording attention"), quiet():
            recording = record(language_model.model, windows=windows, sink_tokens=sink_tokens, **inputs)
        prices: tuple[Price, ...] = ()
        _check_windows(recording, windows)
        if measure:
            prices, interrupted = _prices(
                language_model, inputs, recording, windows, sink_tokens, heads, pool, progress
            )
        other = None
        if other_opened is not None and not interrupted:
            other = _against(language_model, inputs, other_opened, torch_dtype, progress)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    pieces = language_model.pieces(read.token_ids)
    seen = Seen(
        language_model.name,
        read.text,
        pieces,
        read.left_out,
        torch_dtype.itemsize,
        recording,
        prices,
        other,
        None if target is None else Context(sample.text, sample.token_ids.shape[1], sample.left_out),
    )
    if out is not None:
        try:
            page = page_of(seen, most)
        except ValueError as error:
            raise CommandError(f"--out: {error}") from error
        write_output(out, page, overwrite)
        progress.notify(f"wrote {out}")
    if as_document:
        print(json.dumps(seen.as_json(most), indent=2, allow_nan=False))
    else:
        print_seen(seen, most, _why_not(language_model, seen.proposal(most)), Console(file=sys.stdout))
    if interrupted:
        progress.notify("qkv: interrupted; what had been measured before is written.")
        raise typer.Exit(INTERRUPTED)


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _check_kind(opened: Opened, target: Path | None, needs_loss: bool, heads: list[int]) -> None:
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


def _check_heads(opened: Opened, heads: list[int], pool: Pool) -> None:
    """Raises a CommandError for KV heads that the model cannot have, before its weights are loaded."""
    if not heads:
        return
    model = opened.without_weights()
    try:
        for number in heads:
            check_kv_heads("--kv-heads", model, number, pool.value)
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error


def _check_windows(recording: Recording, windows: list[int]) -> None:
    """Raises a CommandError for a window that changes no layer."""
    for window in windows:
        own = [layer.window for layer in recording.layers if not layer.is_cross]
        if all(each is not None and each <= window for each in own):
            raise CommandError(f"--window {window}: {narrow_layers(recording, window)}; give a smaller window.")


def _check_size(config: Any, length: int, windows: int, heads: int, measure: bool) -> None:
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
    language_model: LanguageModel,
    inputs: dict[str, Any],
    other: Opened,
    dtype: torch.dtype,
    progress: Progress,
) -> Against:
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


def _distinct(option: str, numbers: list[int] | None) -> list[int]:
    """The numbers of an option, in order."""
    found = numbers or []
    for number in found:
        if number < 1:
            raise typer.BadParameter(f"it must be at least 1; got {number}.", param_hint=option)
    return sorted(set(found))


def _prices(
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


def _read(
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
