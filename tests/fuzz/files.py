"""Damaged files for the readers of checkpoints: ``PYTHONPATH=tests python -m fuzz.files --seconds 600``.

Four fifths of the time go to a coverage-guided fuzzer (libFuzzer through atheris, ``pip install atheris``), which
changes small files and keeps what reaches new lines of ``qkv.convert``; the rest to the faults of whole checkpoints
that ``convert/faults.py`` knows. A file must be described, or refused with a `CheckpointError` that names it.

What fails is kept in ``corpus/files``, whose files are ordinary tests (``test_files.py``).
"""

import argparse
import io
import itertools
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus") / "files"
MAX_SECONDS = 30
"""Of one file; on an idle machine, hundredths of one."""
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**39, 10**50, 0.5, -0.0, 1e308, "", "x", "1"),
    *([], [0], [1, 2], ["x"], [None], [[1]], {}, {"x": 1}, {"full_attention": 3}, ["LlamaForCausalLM"], "llama"),
)
"""What a field may be instead."""


class Reader:
    """One kind of file: where it is put, and which are read well."""

    def __init__(self, name: str, seeds: Callable[[], Iterator[bytes]]) -> None:
        self.name, self.seeds = name, seeds

    def put(self, folder: Path, data: bytes) -> Path:
        """Writes the file into a folder where all else is right, and returns what is to be inspected."""
        path = folder / self.name
        if path.suffix == ".gguf":
            path.write_bytes(data + bytes(2048))  # the header is changed, and the file is long enough for its tensors
            return path
        shard = folder / "model-00001-of-00001.safetensors"
        files = {"config.json": as_json(LLAMA), shard.name: weights(tensors_of(SIZES))}
        files["model.safetensors.index.json"] = as_json({"weight_map": dict.fromkeys(tensors_of(SIZES), shard.name)})
        for name, content in (files | {self.name: data}).items():
            (folder / name).write_bytes(content)
        return folder


def as_json(document: object) -> bytes:
    return json.dumps(document).encode()


def tensors_of(sizes: dict[str, int]) -> dict[str, list[int]]:
    """Names and shapes of a Llama of one layer."""
    width, inner, words = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    own = {f"self_attn.{part}_proj.weight": [width, width] for part in "qkvo"}
    own |= {f"mlp.{part}_proj.weight": [inner, width] for part in ("gate", "up", "down")}
    own |= {f"{part}_layernorm.weight": [width] for part in ("input", "post_attention")}
    layers = {f"model.layers.0.{name}": shape for name, shape in own.items()}
    ends = {"model.embed_tokens.weight": [words, width], "model.norm.weight": [width], "lm_head.weight": [words, width]}
    return ends | layers


def weights(tensors: dict[str, list[int]]) -> bytes:
    """A safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in tensors.items():
        start, stop = stop, stop + 4 * int(torch_size(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = as_json(entries)
    return len(text).to_bytes(8, "little") + text + bytes(stop)


def torch_size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def gguf(fields: dict[str, Any], tensors: dict[str, list[int]]) -> bytes:
    """A GGUF file of 32-bit numbers, without its weights."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def plain(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, str):
            return 8, text(value)
        return (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))

    def typed(value: Any) -> bytes:
        if not isinstance(value, list):
            kind, content = plain(value)
            return struct.pack("<I", kind) + content
        kind = plain(value[0])[0]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(plain(item)[1] for item in value)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    body = b"".join(text(name) + typed(value) for name, value in fields.items())
    for name, shape in tensors.items():
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, 0)
    return head + body


def gguf_seeds() -> Iterator[bytes]:
    own = {"block_count": 1, "embedding_length": 8, "attention.head_count": 2, "rope.dimension_count": 4}
    tensors = {f"blk.0.attn_{part}.weight": [8, 8] for part in "qkv"}
    more = {"rope.freq_base": 10000.0, "attention.head_count_kv": [2], "attention.key_length": 4}
    window = {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True], "attention.value_length": 4}
    for fields in (own, own | more, own | more | window):
        named = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in fields.items()}
        yield gguf(named | {"tokenizer.ggml.tokens": ["a", "b"]}, tensors)
    packed = {"blk.0.attn_qkv.weight": [24, 8], "blk.0.attn_q_norm.weight": []}
    yield gguf({"general.architecture": "x", "x.block_count": 1}, packed)


def config_seeds() -> Iterator[bytes]:
    yield as_json(LLAMA)
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}
    yield as_json(LLAMA | {"rope_parameters": rope, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": None})
    kinds = {"layer_types": ["full_attention"], "no_rope_layers": [1], "is_encoder_decoder": False}
    yield as_json(LLAMA | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], **kinds})
    gemma = {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}, "head_dim": 4, "sliding_window": 4}
    yield as_json(LLAMA | gemma | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]})
    yield as_json({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 8, "n_positions": 8})
    yield as_json({"model_type": "t5", "d_model": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1})
    yield as_json({"model_type": "bart", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1})


def header_seeds() -> Iterator[bytes]:
    yield weights(tensors_of(SIZES))
    yield weights({})


def index_seeds() -> Iterator[bytes]:
    yield as_json({"metadata": {"total_size": 9}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}})


READERS = (
    Reader("model-00001-of-00001.safetensors", header_seeds),
    Reader("model.gguf", gguf_seeds),
    Reader("config.json", config_seeds),
    Reader("model.safetensors.index.json", index_seeds),
)
"""By the first byte of an input; the rest is the file."""


def check(data: bytes, folder: Path) -> str:
    """Puts a file into ``folder``, inspects it, and returns the report or the error message.

    Raises:
        AssertionError, or whatever else goes wrong: where it is neither described nor refused as it should be.
    """
    from rich.console import Console

    from qkv.cli import inspect
    from qkv.convert import CheckpointError, inspect_checkpoint

    reader = READERS[data[0] % len(READERS)]
    place = reader.put(folder, data[1:])
    try:
        found = inspect_checkpoint(place)
    except CheckpointError as error:
        message = str(error)
        if str(folder) not in message or len(message) > 2000 + 3 * len(str(folder)):
            raise AssertionError("the message must name the file, and be short") from error
        return message
    sizes = [inspect._sizes_row(choice, 4096, 1, 2) for choice in inspect._choices(found)]
    json.dumps(inspect._as_json("", found, 4096, 1, "float32", sizes), allow_nan=False)
    inspect._print("", found, 4096, 1, "float32", sizes, Console(file=(shown := io.StringIO())))
    return shown.getvalue()


def mutate(data: bytes, most: int, seed: int, by_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Half of the time changes a value of a JSON document, where there is one; else bytes."""
    draw = random.Random(seed)
    head, body = data[:1], data[1:]
    rest = b""
    if body[8:9] == b"{":  # A safetensors file, whose header is to stay as long as it says.
        length = int.from_bytes(body[:8], "little")
        body, rest = body[8 : 8 + length], body[8 + length :]
    try:
        document = json.loads(body) if draw.random() < 0.5 else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not document:
        return by_bytes(data, most)
    holder: Any = document
    key = draw.choice(list(holder))
    while isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.7:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    text = as_json(document)
    changed = head + (len(text).to_bytes(8, "little") + text + rest if data[9:10] == b"{" else text)
    return changed if len(changed) <= most else by_bytes(data, most)


def fuzz(arguments: list[str]) -> None:
    """Runs libFuzzer in this process, which it ends."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["qkv.convert"]):
        import qkv.convert.inspect.checkpoint  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        for kind, reader in enumerate(READERS):
            for seed in reader.seeds():
                check(bytes([kind]) + seed, place)  # What is imported late is imported by now.

        def one(data: bytes) -> None:
            if data:
                check(data, place)

        atheris.Setup(
            [sys.argv[0], *arguments], one, custom_mutator=lambda d, most, seed: mutate(d, most, seed, atheris.Mutate)
        )
        atheris.Fuzz()


def guided(seconds: float) -> tuple[int, int, list[Path]]:
    """Fuzzes until the time is over, again after each finding: executions, lines and branches reached, findings."""
    executions, coverage, findings, until = 0, 0, [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for kind, reader in enumerate(READERS):
            for number, seed in enumerate(reader.seeds()):
                Path(folder, f"seed-{kind}-{number}").write_bytes(bytes([kind]) + seed)
        while (left := until - time.monotonic()) > 1:
            known = set(CORPUS.glob("*"))
            flags = [f"-max_total_time={left:.0f}", f"-timeout={MAX_SECONDS}", "-rss_limit_mb=4096", "-max_len=8192"]
            flags += [f"-artifact_prefix={CORPUS}/", "-print_final_stats=1", folder, str(CORPUS)]
            done = subprocess.run([sys.executable, "-m", "fuzz.files", "--child", *flags], stderr=subprocess.PIPE)
            stderr = done.stderr.decode(errors="replace")
            executions += max((int(number) for number in re.findall(r"^#(\d+)", stderr, re.MULTILINE)), default=0)
            coverage = max([coverage, *(int(number) for number in re.findall(r" cov: (\d+)", stderr))])
            new = sorted(set(CORPUS.glob("*")) - known)
            if done.returncode == 0:
                break
            if not new:
                raise SystemExit(f"fuzz.files: libFuzzer failed without a finding.\n{stderr[-3000:]}")
            print(f"{new[0]}\n{stderr[stderr.find('=== Uncaught') :][:2000]}", flush=True)
            findings += new
    return executions, coverage, findings


def faulty(seconds: float) -> int:
    """Breaks whole checkpoints, and returns how many."""
    from convert import faults

    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        valid, place = faults.make_source(Path(folder, "valid")), Path(folder, "place")
        place.mkdir()
        for number in itertools.count():
            if time.monotonic() > until:
                return number
            faults.refuse(valid, place, list(faults.FAULTS)[number % len(faults.FAULTS)], int(time.time()) + number)
    raise AssertionError


def main() -> None:
    arguments = argparse.ArgumentParser(prog="fuzz.files")
    arguments.add_argument("--seconds", type=float, default=600)
    given = arguments.parse_args()
    CORPUS.mkdir(parents=True, exist_ok=True)
    executions, coverage, findings = guided(0.8 * given.seconds)
    print(f"{executions} files read, {coverage} edges of qkv.convert reached, {len(findings)} findings")
    print(f"{faulty(0.2 * given.seconds)} broken checkpoints refused")
    if findings:
        raise SystemExit(1)


if __name__ == "__main__":
    fuzz(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
