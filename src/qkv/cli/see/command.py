"""`qkv see`: what a model attends to on a text, and what windows or fewer KV heads would cost it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qkv.analysis import Price, Seen, record
from qkv.analysis.page import page_of
from qkv.analysis.seen import MOST, Context
from qkv.cli.convert import Pool
from qkv.cli.options import MAX_COUNT, SINK_TOKENS, Dtype, count_option
from qkv.cli.reports.see import print_mechanisms, print_seen
from qkv.cli.see.measuring import against_other, agreements_of, measure_prices, reaches_of, seven_of, why_not
from qkv.cli.see.reading import (
    CHARACTERS,
    check_heads,
    check_kind,
    check_size,
    check_windows,
    layers_shown,
    places,
    read,
    source_of,
)
from qkv.convert import CheckpointError
from qkv.layer_record import cuts_nothing
from qkv.models.errors import CommandError
from qkv.models.language_model import open_model, quiet
from qkv.models.output_file import check_output, write_output
from qkv.models.progress import Progress
from qkv.models.source import expand_home
from qkv.models.text import KING_LEAR, read_text
from qkv.starting import INTERRUPTED


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
    pool: Annotated[Pool, typer.Option(help="For --kv-heads: how heads are pooled.")] = Pool.aligned,
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

    For each layer: the keys that it sees, the number of keys in effect, how far back they are, and the weight on the
    first tokens. With --window, first how far its output would move and the weight that would be cut, layers in the
    order of the change. With --measure, the loss if one layer had the window or the heads,
    for each; then with the cheapest layers together, the tokens that pay, and the bytes that it saves. All of it before
    training, on this text alone. What --json prints is what qkv convert --like takes. With --query, the tokens that one
    token attends to, head by head.

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
    source, other_source = (None if each is None else source_of(each, progress) for each in (model, against))
    assert source is not None
    opened = open_model(source, progress)
    check_kind(opened, target, measure or against is not None, heads)
    other_opened = None if other_source is None else open_model(other_source, progress)
    if other_opened is not None and other_opened.kind != opened.kind:
        raise CommandError(
            f"--against: {against} must be of the kind of {model}, {opened.kind}; got {other_opened.kind}."
        )
    with quiet():
        check_heads(opened, heads, pool)
    language_model = opened.load(torch_dtype, progress)
    most_tokens = tokens if _is_given(context, "tokens") else None
    sample = read(language_model, "--text", path.name, words, tokens, most_tokens)
    predicted, inputs = sample, dict[str, Any](input_ids=sample.token_ids)
    if target is not None and target_words is not None:
        predicted = read(language_model, "--target", target.name, target_words, tokens, most_tokens)
        inputs["decoder_input_ids"] = predicted.token_ids
    length = predicted.token_ids.shape[1]
    for number in windows:
        longest = length if measure else max(length, sample.token_ids.shape[1])
        if number + sink_tokens >= longest:
            raise CommandError(f"--window: {cuts_nothing(number, sink_tokens, longest)}")
    if out is not None:
        check_size(opened.config, length, len(windows), len(heads), measure)
    queries = places(query or [], length)
    interrupted = False
    try:
        with progress.step("recording attention"), quiet():
            options: dict[str, Any] = {"windows": windows, "sink_tokens": sink_tokens, "queries": queries}
            recording = record(language_model.model, **options, **inputs)
        shown = layers_shown(layer, recording, language_model.name)
        prices: tuple[Price, ...] = ()
        check_windows(recording, windows)
        if measure:
            prices, interrupted = measure_prices(
                language_model, inputs, recording, windows, sink_tokens, heads, pool, progress
            )
        agreements = agreements_of(language_model, prices, pool, progress)
        other = None
        if other_opened is not None and not interrupted:
            other = against_other(language_model, inputs, other_opened, torch_dtype, progress)
        one = None
        if out is not None and not interrupted:
            one = seven_of(language_model, predicted.token_ids, recording, shown, queries, windows, progress)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    pieces = language_model.pieces(predicted.token_ids)
    seen = Seen(
        language_model.name,
        predicted.text,
        pieces,
        predicted.left_out,
        torch_dtype.itemsize,
        recording,
        prices,
        against=other,
        context=None if target is None else Context(sample.text, sample.token_ids.shape[1], sample.left_out),
        shown=shown,
        seven=one,
        agreements=agreements,
    )
    if (measure or out is not None) and not interrupted:
        seen = seen._replace(reaches=reaches_of(language_model, predicted.token_ids, seen, most, progress))
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
        print_seen(seen, most, why_not(language_model, seen.proposal(most)), Console(file=sys.stdout))
    if interrupted:
        progress.notify("qkv: interrupted; what had been measured before is written.")
        raise typer.Exit(INTERRUPTED)


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _distinct(option: str, numbers: list[int] | None) -> list[int]:
    """The numbers of an option, in order."""
    found = numbers or []
    for number in found:
        if number < 1:
            raise typer.BadParameter(f"it must be at least 1; got {number}.", param_hint=option)
    return sorted(set(found))
