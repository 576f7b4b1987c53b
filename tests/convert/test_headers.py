"""Headers of safetensors files that break one rule each; `faults.py` breaks whole checkpoints."""

import json

import pytest
from convert import models

from qkv.convert import CheckpointError, plan_checkpoint
from qkv.convert.files.safetensors import read_header


def write(path, places, num_bytes):
    entries = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in places.items()}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    ("places", "num_bytes", "message"),
    [
        ({"a": (0, 4), "b": (2, 8)}, 8, "tensor 'b' overlaps with 'a': it must begin at 4; got 2"),
        ({"a": (0, 4), "b": (0, 8)}, 8, "tensor 'b' overlaps with 'a': it must begin at 4; got 0"),
        ({"a": (0, 4), "b": (5, 8)}, 8, "tensor 'b' leaves a gap after 'a': it must begin at 4; got 5"),
        ({"a": (1, 4)}, 4, "tensor 'a' leaves a gap after the header: it must begin at 0; got 1"),
        ({"a": (0, 4)}, 3, "is truncated: it has"),
        ({"a": (0, 4)}, 5, "has extra bytes at its end"),
    ],
)
def test_invalid_offsets_are_refused(tmp_path, places, num_bytes, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "a.safetensors", places, num_bytes))


def test_tensors_may_be_listed_in_any_order(tmp_path):
    header = read_header(write(tmp_path / "a.safetensors", {"b": (4, 8), "empty": (4, 4), "a": (0, 4)}, 8))
    assert list(header.tensors) == ["a", "empty", "b"]


@pytest.mark.parametrize("layers", [10**9, 2**70, 22, 0, -1, "3", 3.0, True])
def test_layers_are_counted_before_anything_is_built(tmp_path, layers):
    """Otherwise a model of that many layers would be built."""
    source = models.save(tmp_path, "qwen3", num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(
        CheckpointError, match="num_hidden_layers must be an integer from 1 to 14, the number of tensors; got"
    ):
        plan_checkpoint(source, 2)


def test_more_layers_than_the_checkpoint_has(tmp_path):
    source = models.save(tmp_path, "qwen3", num_hidden_layers=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    message = r"needs tensor 'model\.layers\.2\.\S+' .* does not have \(2 other layers do\)\. For sharded checkpoints"
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(source, 2)
