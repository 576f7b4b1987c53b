"""Folders: shards and their index, files that go along, and what safetensors itself makes of the result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch as safetensors_torch
import torch
from convert import large, models

from qkv.convert import convert_checkpoint, plan_checkpoint, pool_heads
from qkv.convert.files.safetensors import read_header


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = models.save(tmp_path_factory.mktemp("source"), "llama", shards="60KB", dtype=torch.bfloat16)
    (folder / "tokenizer.model").write_bytes(b"words")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter.safetensors", "weights.gguf"):
        (folder / name).write_bytes(b"of the model as it was")
    (folder / "link.txt").symlink_to(folder / "notes.txt")
    return folder


def read(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= safetensors_torch.load_file(path)
    return tensors


def test_shards_keep_their_tensors_with_pooled_keys_and_values(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 2)
    before, after = read(source), read(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        pooled = ".k_proj." in name or ".v_proj." in name
        assert torch.equal(after[name], pool_heads(weight, 8, 2) if pooled else weight), name
    theirs, ours = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert len(set(ours["weight_map"].values())) > 2
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in after.values()),
        "total_parameters": sum(tensor.numel() for tensor in after.values()),
    }
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, file in ours["weight_map"].items() if file == path.name}


def test_configuration_changes_in_one_place(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out", 2)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert before.pop("num_key_value_heads") == 8
    assert after.pop("num_key_value_heads") == 2
    assert list(before.items()) == list(after.items())


def test_other_files_are_copied_and_other_weights_are_not(tmp_path, source):
    plan = convert_checkpoint(source, tmp_path / "out", 2)
    kept = ["generation_config.json", "link.txt", "notes.txt", "templates/chat.jinja", "tokenizer.model"]
    assert list(map(str, plan.copied)) == kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    left = ["adapter.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "weights.gguf"]
    assert list(map(str, plan.skipped_weights)) == left
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    shards = {path.name for path in source.glob("model*.safetensors")}
    assert written == {*kept, *shards, "templates", "config.json", "model.safetensors.index.json"}


def test_two_steps_in_half_precision_differ_from_one_by_rounding(tmp_path, source):
    convert_checkpoint(source, tmp_path / "four", 4)
    convert_checkpoint(tmp_path / "four", tmp_path / "two", 2)
    convert_checkpoint(source, tmp_path / "once", 2)
    twice, once = read(tmp_path / "two"), read(tmp_path / "once")
    for name, weight in once.items():
        # Rounding to bf16 is off by 2^-8 at most: once for the means between, and once for either end.
        assert ((twice[name] - weight).abs() <= 2**-8 * 3 * read(source)[name].abs().max()).all()


def test_two_steps_in_fp32_equal_one(tmp_path):
    source = models.save(tmp_path / "source", "llama")
    convert_checkpoint(source, tmp_path / "four", 4)
    convert_checkpoint(tmp_path / "four", tmp_path / "two", 2)
    convert_checkpoint(source, tmp_path / "once", 2)
    assert models.digest(tmp_path / "two") == models.digest(tmp_path / "once")


def test_a_conversion_is_reproducible(tmp_path, source):
    for out in ("one", "other"):
        convert_checkpoint(source, tmp_path / out, 1, how="random", seed=4)
    assert models.digest(tmp_path / "one") == models.digest(tmp_path / "other")


def test_tensors_of_wide_dtypes_come_first(tmp_path):
    """As the safetensors library lays them out, whose files are read alike."""
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(2, 3, dtype=torch.float64),
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.empty(0, 4),
        "e": torch.tensor(2.5),
        "f": torch.randn(4).to(torch.float8_e4m3fn),
    }
    safetensors_torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "theirs.safetensors")
    assert {name: spec.shape for name, spec in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: spec.num_bytes for name, spec in header.tensors.items()} == {n: t.nbytes for n, t in tensors.items()}
    data = (tmp_path / "theirs.safetensors").read_bytes()
    for name, tensor in tensors.items():
        start = header.starts[name]
        assert data[start : start + tensor.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    from qkv.convert.files.safetensors import make_header

    head, order = make_header(header.tensors, header.metadata)
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(head + b"".join(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in order))
    for name, tensor in safetensors_torch.load_file(ours).items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))
    assert [order.index(name) for name in ("b", "c", "a")] == sorted(order.index(name) for name in ("b", "c", "a"))


def test_plan_reads_no_weights(tmp_path, source):
    """Holes in place of the weights cost no disk, and no time: 70 billion parameters in one file."""
    layers, width = 80, 8192
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
    sizes = {"hidden_size": width, "num_attention_heads": 64, "num_hidden_layers": layers, "intermediate_size": 28672}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    shapes = {"model.embed_tokens": (32000, width), "lm_head": (32000, width), "model.norm": (width,)}
    for layer in range(layers):
        parts = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
        shapes |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in parts.items()}
        shapes |= {f"model.layers.{layer}.mlp.{name}": (28672, width) for name in ("gate_proj", "up_proj")}
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (width, 28672)
        shapes |= {f"model.layers.{layer}.{n}": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    plan = plan_checkpoint(tmp_path, 8)
    assert plan.num_bytes == end - layers * 2 * 2 * (width - width // 8) * width


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_memory_is_bounded_by_a_tensor(tmp_path):
    """The embedding has 66 MB and is copied in pieces; what is pooled has 4 MB; code loaded late takes 20 MB."""
    source = models.save(
        tmp_path / "source",
        "llama",
        shards="10MB",
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=2,
        vocab_size=16000,
        tie_word_embeddings=True,
    )
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 100e6
    command = [sys.executable, "-c", large.CONVERT, str(source), str(tmp_path / "out"), "2"]
    num_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1])
    assert num_bytes < 50e6, num_bytes
