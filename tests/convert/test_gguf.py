"""Headers of GGUF files, written by the gguf package and then damaged."""

import contextlib
import random
import struct

import gguf
import numpy as np
import pytest
from fuzz import files

from qkv.convert import CheckpointError, inspect_checkpoint
from qkv.convert.files.gguf import check_bounds, read_gguf

TENSORS = {"attn_q": (24, 16), "attn_k": (12, 16), "attn_v": (10, 16), "attn_output": (16, 20), "ffn_up": (40, 16)}


def write(path, tensors=TENSORS, **fields):
    """Two layers of 4 query heads and 2 KV heads, keys of width 6 and values of width 5."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": 2, "embedding_length": 16, "attention.head_count": 4, "attention.key_length": 6}
    numbers |= {"attention.head_count_kv": 2, "attention.value_length": 5, "rope.dimension_count": 6} | fields
    for name, number in numbers.items():
        key = f"llama.{name}"
        writer.add_array(key, number) if isinstance(number, list) else writer.add_uint32(key, number)
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_array("tokenizer.ggml.tokens", ["query", "key", "value"])
    for layer in range(2):
        for name, shape in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float16))
        writer.add_tensor(f"blk.{layer}.attn_k.bias", np.zeros(12, np.float32))
        writer.add_tensor(f"blk.{layer}.attn_v.bias", np.zeros(10, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_of_a_model(tmp_path):
    found = inspect_checkpoint(write(tmp_path / "model.gguf"))
    assert (found.model_type, found.dtype, len(found.layers)) == ("llama", "F16", 2)
    layer = found.layers[0]
    assert layer[:5] == (4, 2, 6, 5, None)
    assert (layer.bias, layer.qk_norm, layer.rotary) == (True, False, "theta 500000")
    attention = 24 * 16 + 12 * 16 + 10 * 16 + 16 * 20 + 12 + 10
    assert (layer.parameters, layer.kv_parameters) == (attention, 22 * 17)
    assert found.parameters == 2 * (attention + 40 * 16)
    assert found.possible_kv_heads == [2, 1]
    assert found.with_kv_heads(1).parameters == found.parameters - 2 * 11 * 17


def test_heads_and_windows_of_each_layer(tmp_path):
    fields = {"attention.head_count_kv": [2, 2], "attention.sliding_window": 9}
    pattern = {"attention.sliding_window_pattern": [True, False]}
    found = inspect_checkpoint(write(tmp_path / "model.gguf", **fields, **pattern))
    assert [layer.window for layer in found.layers] == [9, None]
    with pytest.raises(CheckpointError, match="some layers have a window of 9, but the file does not say which"):
        inspect_checkpoint(write(tmp_path / "other.gguf", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention.head_count_kv": 4},
            r"by the header, tensor 'blk\.0\.attn_k\.weight' must have 24 rows; got F16 \[12, 16\]",
        ),
        (
            {"attention.head_count": 0},
            "llama.attention.head_count must be an integer >= 1 or a list .*; got 0",
        ),
        ({"attention.head_count_kv": [2]}, r"attention.head_count_kv must be .* in layer 1; got \[2\]"),
        (
            {"block_count": 3},
            "all 3 layers of a 'llama' model must have attention tensors; got 2 that do",
        ),
    ],
)
def test_contradictory_headers_are_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(write(tmp_path / "model.gguf", **fields))


def test_truncated_and_damaged_headers(tmp_path):
    """Refused, or understood where the damage hits a text or a number: never a hang, and no other error."""
    data = write(tmp_path / "model.gguf").read_bytes()
    header = data.index(b"blk.1.attn_v.bias")
    for length in range(0, header, 7):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            inspect_checkpoint(tmp_path / "cut.gguf")
    draw, refused = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(data)
        at = draw.randrange(header)
        broken[at : at + 8] = draw.randbytes(8)
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            inspect_checkpoint(tmp_path / "broken.gguf")
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_tensors_lie_within_the_file(tmp_path):
    data = write(tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-24])  # what fills up to the alignment may be missing
    inspect_checkpoint(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(data[:-25])
    message = (
        rf"cut\.gguf is truncated: it has {len(data) - 25} bytes, .* tensor 'blk\.1\.attn_v\.bias', F32 \[10\], takes"
    )
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(tmp_path / "cut.gguf")
    name = b"blk.0.attn_k.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8 + 4
    for offset in (len(data), 2**63, 2**64 - 1):
        (tmp_path / "far.gguf").write_bytes(data[:place] + offset.to_bytes(8, "little") + data[place + 8 :])
        with pytest.raises(CheckpointError, match=r"far\.gguf is truncated: .* tensor 'blk\.0\.attn_k\.weight', F16"):
            inspect_checkpoint(tmp_path / "far.gguf")


def test_size_of_packed_numbers(tmp_path):
    """A block of 32 numbers in Q4_0 takes 18 bytes, and rows are of whole blocks."""
    header = files.gguf({}, {"a": [4, 64]})
    kind = header.index(b"a") + 1 + 4 + 2 * 8
    cases = (
        (64, 144, None),
        (64, 143, "tensor 'a', Q4_0"),
        (48, 144, "multiples of 32, the block size of Q4_0; got shape"),
    )
    for width, num_bytes, message in cases:
        packed = header[: kind - 16] + struct.pack("<QQI", width, 4, 2) + bytes(8)
        (tmp_path / "a.gguf").write_bytes(packed.ljust(-(-len(packed) // 32) * 32, b"\0") + bytes(num_bytes))
        with contextlib.nullcontext() if message is None else pytest.raises(CheckpointError, match=message):
            check_bounds(tmp_path / "a.gguf", read_gguf(tmp_path / "a.gguf"))
