"""`qkv inspect`: the attention and KV cache of a model, also with fewer KV heads, without loading weights."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import qkv
from qkv.cli.options import Dtype, count_option
from qkv.cli.printing import counted, print_line, print_table
from qkv.cli.reports.layers import DTYPES, LENGTH, describe_kinds, kv_bytes, kv_bytes_in_int8, layers_as_json
from qkv.convert import CheckpointError, Inspection, inspect_checkpoint
from qkv.convert.files.fields import TENSOR, find_fault
from qkv.convert.files.json_document import read_document
from qkv.convert.files.safetensors import make_spec
from qkv.convert.inspect.checkpoint import inspect_tensors
from qkv.convert.inspect.modules import inspect_config
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import quiet
from qkv.models.source import expand_home, require_hub_name

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, config.json, safetensors or GGUF file, or name of a model on the Hugging Face Hub.",
            metavar="MODEL",
        ),
    ],
    length: Annotated[int, count_option("Sequence length for the size of the KV cache.", "TOKENS")] = LENGTH,
    batch: Annotated[int, count_option("Batch size for the size of the KV cache.", "SEQUENCES")] = 1,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the KV cache. Default: that of the model, or bfloat16 where a cache has none like it.",
            show_default=False,
        ),
    ] = None,
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Describe a model's attention and KV cache from its headers.

    Loads no weights. Prints mechanism, heads, widths, window, biases and rotary embedding of each kind of layer; then
    parameters and size of the KV cache, in --dtype and in int8, for the model and for each number of KV heads that qkv
    convert can give it. Takes any model of transformers: decoders, and encoders of texts, images and speech, which keep
    no cache.
    """
    try:
        with quiet():
            found = _inspect(model)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    name = _cache_dtype(found) if dtype is None else dtype.value
    sizes = [_sizes_row(choice, length, batch, NUM_BYTES[name]) for choice in _choices(found)]
    if as_document:
        print(json.dumps(_as_json(model, found, length, batch, name, sizes), indent=2, allow_nan=False))
    else:
        _print(model, found, length, batch, name, sizes, Console(file=sys.stdout))


def _cache_dtype(found: Inspection) -> str:
    """The dtype of a cache of the model as it is stored."""
    name = DTYPES.get(found.dtype, found.dtype)
    return name if name in NUM_BYTES else Dtype.bfloat16.value


def _inspect(model: str) -> Inspection:
    """Inspects a local path or a Hub name."""
    path = expand_home(Path(model))
    if path.exists():
        return inspect_checkpoint(path)
    require_hub_name(model)
    return _inspect_hub(model)


def _inspect_hub(name: str) -> Inspection:
    """Inspects a model on the Hub; downloads its configuration and, if it has safetensors, their headers."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        config = read_document(Path(hf_hub_download(name, "config.json")))
        try:
            files = get_safetensors_metadata(name).files_metadata.values()
        except NotASafetensorsRepoError:
            return inspect_config(name, config)
    except CheckpointError:
        raise
    except Exception as error:
        raise CommandError(
            f"could not fetch the headers of {name!r} from the Hub. {type(error).__name__}: {error!s:.400}\n"
            "Check the name and the network, or give a local folder or file."
        ) from error
    tensors = {}
    for file in files:
        for tensor, info in file.tensors.items():
            shape = list(info.shape)
            spec = find_fault({"dtype": info.dtype, "shape": shape}, TENSOR) or make_spec(info.dtype, shape)
            if isinstance(spec, str):
                raise CheckpointError(f"{name}: tensor {tensor!r}: {spec}.")
            tensors[tensor] = spec
    return inspect_tensors(name, config, tensors)


def _choices(found: Inspection) -> list[Inspection]:
    """The model, and the model with each other possible number of KV heads."""
    if not found.is_convertible or not found.layers:
        return [found]
    others = (found.with_kv_heads(heads) for heads in found.possible_kv_heads)
    return [found, *(other for other in others if other.layers != found.layers)]


def _sizes_row(found: Inspection, length: int, batch: int, bytes_per_number: int) -> dict[str, Any]:
    """Parameters and KV cache sizes of a model: one row of the table."""
    return {
        "num_kv_heads": sorted({layer.num_kv_heads for layer in found.layers}, reverse=True),
        "parameters": found.parameters,
        "attention_parameters": found.attention_parameters,
        "kv_bytes_per_token": kv_bytes(found, 1, 1, bytes_per_number),
        "kv_bytes": kv_bytes(found, length, batch, bytes_per_number),
        "kv_bytes_in_int8": kv_bytes_in_int8(found, length, batch, bytes_per_number),
    }


def _as_json(
    model: str, found: Inspection, length: int, batch: int, dtype: str, sizes: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "versions": {"qkv": qkv.__version__},
        "model": model,
        "model_type": found.model_type,
        "stored_dtype": found.dtype,
        "parameters": found.parameters,
        "encoder": layers_as_json(found.encoder),
        "layers": layers_as_json(found.layers),
        "is_convertible": found.is_convertible,
        "kv_cache": {"length": length, "batch": batch, "dtype": dtype, "sizes": sizes},
    }


def _print(
    model: str,
    found: Inspection,
    length: int,
    batch: int,
    dtype: str,
    sizes: list[dict[str, Any]],
    console: Console,
) -> None:
    stored = "keys and values stored in" if found.layers else "stored in"
    where = f"{stored} {found.dtype}" if found.is_stored else f"{found.dtype} by its configuration"
    print_line(f"{model} ({found.model_type}), {found.parameters:,} parameters, {where}", console, "bold")
    in_encoder, in_decoder = (" in the encoder", " in the decoder") if found.encoder and found.layers else ("", "")
    for place, layers in ((in_encoder, found.encoder), (in_decoder, found.layers)):
        for line in describe_kinds(layers, place):
            print_line(f"  {line}", console)
    console.print()
    if not found.layers:
        print_line(f"{sizes[0]['attention_parameters']:,} of the parameters are in attention.", console)
        print_line("It keeps no keys and values, since each call reads its whole input.", console)
        return
    _print_sizes(found, length, batch, dtype, sizes, console)
    if not found.is_convertible:
        console.print()
        print_line("qkv convert does not take this model.", console)


def _print_sizes(
    found: Inspection, length: int, batch: int, dtype: str, sizes: list[dict[str, Any]], console: Console
) -> None:
    sequences = f"{counted(batch, 'sequence')} of {counted(length, 'token')}"
    if found.encoder and any(layer.cross for layer in found.layers):
        sequences += " (encoded and generated)"
    table = Table(box=None, pad_edge=False)
    for column in ("KV heads", "parameters", "in attention", "a token", "cache", "int8", "of now"):
        table.add_column(column, justify="left" if column == "KV heads" else "right", no_wrap=True)
    for row, size in enumerate(sizes):
        heads = ", ".join(map(str, size["num_kv_heads"]))
        in_int8 = size["kv_bytes_in_int8"]
        table.add_row(
            f"{heads} (now)" if row == 0 else heads,
            f"{size['parameters']:,}",
            f"{size['attention_parameters']:,}",
            readable_bytes(size["kv_bytes_per_token"]),
            readable_bytes(size["kv_bytes"]),
            "-" if in_int8 is None else readable_bytes(in_int8),
            f"{size['kv_bytes'] / sizes[0]['kv_bytes']:.1%}",
        )
    print_table(f"Parameters, and the KV cache of {sequences} in {dtype} and in int8", table, console)
