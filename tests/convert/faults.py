"""Breaks a valid checkpoint in seeded ways, and converts it.

Each must be refused with a message, without a traceback, and leave nothing behind. What no reader can tell is not among
them: other bytes in the weights; F16 called BF16; places of tensors of one kind exchanged; and settings that change
what a model computes but no shape (epsilons, the base of a rotation). Tensors that a model does not ask for are let
pass.
"""

import contextlib
import io
import json
import math
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert import models

from qkv.cli import main as qkv

MAX_SECONDS = 10
INDEX = "model.safetensors.index.json"
Fault = Callable[[Path, random.Random], None]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: bytes, weights: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + weights)


def shard(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def in_bytes(change: Callable[[bytes, random.Random], bytes]) -> Fault:
    def fault(folder: Path, draw: random.Random) -> None:
        path = shard(folder, draw)
        path.write_bytes(change(path.read_bytes(), draw))

    return fault


def in_header(change: Callable[[dict[str, Any], str, random.Random], Any]) -> Fault:
    """Changes one entry of a header; the tensor is one that the model has."""

    def fault(folder: Path, draw: random.Random) -> None:
        path = shard(folder, draw)
        header, weights = header_of(path)
        change(header, draw.choice(sorted(header.keys() - {"__metadata__"})), draw)
        write(path, json.dumps(header).encode(), weights)

    return fault


def in_header_text(change: Callable[[str, random.Random], bytes]) -> Fault:
    def fault(folder: Path, draw: random.Random) -> None:
        path = shard(folder, draw)
        header, weights = header_of(path)
        write(path, change(json.dumps(header), draw), weights)

    return fault


def in_json(name: str, change: Callable[[dict[str, Any], random.Random], Any]) -> Fault:
    def fault(folder: Path, draw: random.Random) -> None:
        document = json.loads((folder / name).read_text())
        change(document, draw)
        (folder / name).write_text(json.dumps(document))

    return fault


def in_json_text(name: str, change: Callable[[str, random.Random], str]) -> Fault:
    def fault(folder: Path, draw: random.Random) -> None:
        (folder / name).write_text(change((folder / name).read_text(), draw))

    return fault


def setting(name: str, *values: Any) -> Fault:
    return in_json("config.json", lambda config, draw: config.__setitem__(name, draw.choice(values)))


def entry(key: str, *values: Any) -> Fault:
    return in_header(lambda header, tensor, draw: header[tensor].__setitem__(key, draw.choice(values)))


def move(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    by = draw.choice([-8, -1, 1, 4, 1000, 2**63])
    header[tensor]["data_offsets"] = [offset + by for offset in header[tensor]["data_offsets"]]


def exchange(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    """Two tensors of different sizes."""
    sizes = {n: math.prod(entry["shape"]) for n, entry in header.items() if n != "__metadata__"}
    other = draw.choice([n for n, size in sizes.items() if size != sizes[tensor]])
    header[tensor]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[tensor]["data_offsets"],
    )


def overlap(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    """One tensor is given the place of another of its kind."""
    same = [n for n in header if n not in ("__metadata__", tensor)]
    header["model.intruder"] = dict(header[draw.choice(same)])


def lengthen(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    header[tensor]["shape"][0] += draw.choice([-1, 1, 2**40, 2**62])


def split_shape(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    header[tensor]["shape"] = [*header[tensor]["shape"], 1]


def halve_dtype(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    """As many bytes, but twice as many numbers of half the width."""
    header[tensor]["dtype"] = "BF16"
    header[tensor]["shape"][-1] *= 2


def rename(header: dict[str, Any], tensor: str, draw: random.Random) -> None:
    header[tensor + draw.choice("xyz")] = header.pop(tensor)


def repeat_key(text: str, draw: random.Random) -> str:
    """Says the first key twice, with its value."""
    key = next(iter(json.loads(text)))
    return text.replace("{", "{" + json.dumps(key) + ": " + json.dumps(json.loads(text)[key]) + ", ", 1)


def two_shards(folder: Path, draw: random.Random) -> None:
    """The same tensor in two shards."""
    first, second = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    header, weights = header_of(second)
    theirs, their_weights = header_of(first)
    name = draw.choice(sorted(theirs.keys() - {"__metadata__"}))
    start, stop = theirs[name]["data_offsets"]
    header[name] = theirs[name] | {"data_offsets": [len(weights), len(weights) + stop - start]}
    write(second, json.dumps(header).encode(), weights + their_weights[start:stop])


def map_elsewhere(index: dict[str, Any], draw: random.Random) -> None:
    tensor = draw.choice(sorted(index["weight_map"]))
    own = index["weight_map"][tensor]
    others = sorted(set(index["weight_map"].values()) - {own})
    outside = ["../x.safetensors", "/etc/passwd", "pytorch_model.bin", "none.safetensors", "", 7, None]
    index["weight_map"][tensor] = draw.choice([*others, *outside])


def replace_by_folder(folder: Path, draw: random.Random) -> None:
    path = shard(folder, draw)
    path.unlink()
    path.mkdir()


def to_pickles(folder: Path, draw: random.Random) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


FAULTS: dict[str, Fault] = {
    "truncated": in_bytes(lambda data, draw: data[: draw.randrange(len(data))]),
    "extended": in_bytes(lambda data, draw: data + draw.randbytes(draw.randrange(1, 50))),
    "a piece cut out": in_bytes(
        lambda data, draw: data[: len(data) // 2] + data[len(data) // 2 + draw.randrange(1, 99) :]
    ),
    "length of header": in_bytes(lambda data, draw: draw.randrange(2**64).to_bytes(8, "little") + data[8:]),
    "header too short": in_bytes(lambda data, draw: draw.randrange(200).to_bytes(8, "little") + data[8:]),
    "random bytes": in_bytes(lambda data, draw: draw.randbytes(len(data))),
    "zeros": in_bytes(lambda data, draw: bytes(len(data))),
    "moved": in_header(move),
    "places exchanged": in_header(exchange),
    "overlapping": in_header(overlap),
    "longer": in_header(lengthen),
    "another dimension": in_header(split_shape),
    "other dtype of other width": entry("dtype", "F64", "F16", "I8", "F4", "BOOL"),
    "integers": entry("dtype", "I32", "U32"),
    "half the width": in_header(halve_dtype),
    "unknown dtype": entry("dtype", "F33", "", None, 7, "f32", ["F32"]),
    "wrong shape": entry("shape", None, "64", [-64, 64], [64.0, 64], [True], {}, [[64]], [2**63, 2**63]),
    "wrong offsets": entry("data_offsets", None, [0], [0, 1, 2], ["0", "4"], [8, 0], [0, -1], [0.0, 4.0], {}),
    "entry without": in_header(lambda header, tensor, draw: header[tensor].pop(draw.choice(sorted(header[tensor])))),
    "entry with more": entry("extra", 1),
    "no entry": in_header(lambda header, tensor, draw: header.__setitem__(tensor, draw.choice([None, 3, [], "F32"]))),
    "renamed": in_header(rename),
    "left out": in_header(lambda header, tensor, draw: header.pop(tensor)),
    "metadata": in_header(lambda header, tensor, draw: header.__setitem__("__metadata__", draw.choice([3, {"a": 1}]))),
    "key twice in a header": in_header_text(lambda text, draw: repeat_key(text, draw).encode()),
    "header cut": in_header_text(lambda text, draw: text[: draw.randrange(1, len(text))].encode()),
    "header not UTF-8": in_header_text(
        lambda text, draw: text.replace("model", "\udcff", 1).encode("utf-8", "surrogateescape")
    ),
    "half a surrogate": in_header_text(lambda text, draw: text.replace("model", "\\ud800", 1).encode()),
    "nested": in_header_text(lambda text, draw: b'{"a":' * 100_000),
    "a list": in_header_text(lambda text, draw: b"[" + text.encode() + b"]"),
    "shard missing": lambda folder, draw: shard(folder, draw).unlink(),
    "shard a folder": replace_by_folder,
    "shard empty": in_bytes(lambda data, draw: b""),
    "tensor in two shards": two_shards,
    "only pickles": to_pickles,
    "index missing": lambda folder, draw: (folder / INDEX).unlink(),
    "index elsewhere": in_json(INDEX, map_elsewhere),
    "index without": in_json(
        INDEX, lambda index, draw: index["weight_map"].pop(draw.choice(sorted(index["weight_map"])))
    ),
    "index with more": in_json(
        INDEX, lambda index, draw: index["weight_map"].__setitem__("x", draw.choice(list(index["weight_map"].values())))
    ),
    "index of nothing": in_json(
        INDEX, lambda index, draw: index.__setitem__("weight_map", draw.choice([None, [], {}, 3]))
    ),
    "index cut": in_json_text(INDEX, lambda text, draw: text[: draw.randrange(len(text) - 3)]),
    "key twice in the index": in_json_text(INDEX, repeat_key),
    "configuration missing": lambda folder, draw: (folder / "config.json").unlink(),
    "configuration cut": in_json_text("config.json", lambda text, draw: text[: draw.randrange(len(text) - 3)]),
    "key twice in the configuration": in_json_text("config.json", repeat_key),
    "nested configuration": in_json_text("config.json", lambda text, draw: "[" * 200_000),
    "model_type": setting("model_type", "bert", "", None, 3, ["llama"], "../llama", "mistral3"),
    "layers": setting("num_hidden_layers", 4, 0, -1, 10**9, 2**70, "3", None, 3.5),
    "fewer layers": setting("num_hidden_layers", 2, 1),
    "heads": setting("num_attention_heads", 7, 16, 0, -8, 10**9, "8", None),
    "KV heads": setting("num_key_value_heads", 4, 1, 3, 0, -8, 16, "8", 8.0),
    "width": setting("hidden_size", 32, 63, 0, -64, 10**12, "64"),
    "width of a head": setting("head_dim", 4, 16, 7, -8, 10**12, "8"),
    "vocabulary": setting("vocab_size", 39, 41, 0, -1, 10**15, 2**66, "40"),
    "MLP": setting("intermediate_size", 47, 1, -3, 10**15, "48"),
    "biases": setting("attention_bias", 3, "yes"),
    "classes": setting("architectures", ["BertModel"], ["os"], [3], "LlamaForCausalLM", ["MistralForCausalLM"], [""]),
    "rotation": setting("rope_parameters", 3, "x", [1]),
    "quantised": setting("quantization_config", {"quant_method": "gptq"}, {}),
}


def make_source(folder: Path) -> Path:
    """A valid checkpoint in shards."""
    return models.save(folder, "llama", shards="90KB", tie_word_embeddings=False)


def convert(source: Path, out: Path) -> tuple[int, str]:
    """Exit code and stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = qkv(["convert", str(source), str(out), "--kv-heads", "2"])
    return code, stderr.getvalue()


def refuse(valid: Path, place: Path, kind: str, seed: int) -> str:
    """Breaks a copy and returns the message with which it is refused.

    Raises:
        AssertionError: where it is not refused as it should be.
    """
    source, out = place / "source", place / "out"
    shutil.copytree(valid, source)
    FAULTS[kind](source, random.Random(seed))
    before = models.digest(source)
    signal.alarm(MAX_SECONDS)
    code, stderr = convert(source, out)
    signal.alarm(0)
    what = f"{kind!r} with seed {seed}: {stderr}"
    assert code == 1, f"not refused: {what}"
    message = stderr[stderr.find("qkv: ") :]
    assert message.startswith("qkv: ") and "Traceback" not in stderr, what
    assert str(source) in message or out.name in message, f"the file is not named: {what}"
    assert list(place.iterdir()) == [source], f"something is left: {what}"
    assert models.digest(source) == before, f"the source changed: {what}"
    shutil.rmtree(source)
    return message.strip()
