"""JSON of configurations, indices and headers: read in linear time; errors name file and field."""

import contextlib
import gc
import json
import shutil

import pytest
from convert import models

from qkv.convert import CheckpointError, inspect_checkpoint
from qkv.convert.families import transformers_schema
from qkv.convert.files import json_document
from qkv.convert.files.json_document import parse_json, read_document, short_repr
from qkv.convert.files.safetensors import read_header


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"a": NaN}', "x: 'a' is NaN, which is not valid JSON."),
        ('{"a": [0, {"b": -Infinity}]}', "x: 'a', 1, 'b' is -Infinity, which is not valid JSON."),
        ('{"a": 1e999}', "x: 'a' is 1e999, which overflows fp64."),
        ('{"a": %s}' % ("1" * 5000), "x: 'a' is an integer of 5000 digits."),
        ('{"a": [-%s]}' % ("1" * 41), "x: 'a', 0 is an integer of 42 digits."),
        ('{"a": "\\ud800"}', "x: 'a' contains a lone surrogate, which is not valid Unicode."),
        ('{"\\udfff": 1}', "x: the key '\\udfff' contains a lone surrogate, which is not valid Unicode."),
        ('{"a": {"b": 1, "b": 2}}', "x: duplicate key 'b'."),
        ("[1]", "x must be a JSON object; got list."),
        ("NaN", "x: the value is NaN, which is not valid JSON."),
        ("", "x is not JSON: Expecting value"),
        ('{"a": 01}', "x is not JSON: Expecting ',' delimiter"),
        ('{"a": 1} {}', "x is not JSON: Extra data"),
        ("\ufeff{}", "x is not JSON: Unexpected UTF-8 BOM"),
        ('{"a": ' * 100_000, "x is not JSON: maximum recursion depth exceeded"),
        (f'{{"a": {"[" * 900}NaN{"]" * 900}}}', "x: 'a', 0, 0, 0"),
    ],
)
def test_malformed_documents_are_refused(document, message):
    with pytest.raises(CheckpointError) as raised:
        parse_json(document.encode(), "x")
    assert str(raised.value).startswith(message) and len(str(raised.value)) < 400


def test_invalid_utf_8_is_refused():
    with pytest.raises(CheckpointError, match="x is not JSON: 'utf-8' codec can't decode byte 0xff in position 7"):
        parse_json(b'{"a": "\xff"}', "x")


def test_valid_documents_are_read():
    """Surrogate pairs in strings, 40-digit integers, and nested values."""
    document = {"a": "\U0001f600 \\ud800", "b": 10**40 - 1, "c": -0.5, "d": [None, True, {}], "e": "0" * 50}
    assert parse_json(json.dumps(document).encode(), "x") == document


@pytest.mark.parametrize("levels", [json_document.MAX_LEVELS, json_document.MAX_LEVELS + 1])
def test_the_nesting_is_limited(tmp_path, levels):
    (tmp_path / "a.json").write_text('{"a":' * (levels - 1) + "{}" + "}" * (levels - 1))
    if levels == json_document.MAX_LEVELS:
        read_document(tmp_path / "a.json")
    else:
        with pytest.raises(CheckpointError, match=r"a\.json must nest objects and lists at most 100 levels deep"):
            read_document(tmp_path / "a.json")


def test_long_values_are_abbreviated():
    for value in (10**39, "a" * 10**6, [[[[[[[[1]]]]]]]], {str(n): n for n in range(1000)}, [None] * 10**6):
        assert len(short_repr(value)) < 200


class Counted(str):
    """A string that counts its comparisons: about one each in a set with few collisions."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_a_duplicate_key_is_found_in_linear_time(monkeypatch):
    """Counted in comparisons, not in seconds."""
    loads = json.loads

    def counted(text, *, object_pairs_hook, **hooks):
        return loads(
            text, object_pairs_hook=lambda pairs: object_pairs_hook([(Counted(k), v) for k, v in pairs]), **hooks
        )

    monkeypatch.setattr(json, "loads", counted)
    keys = 20_000
    document = "{" + ",".join(f'"t{number}":0' for number in range(keys)) + ',"z":0,"z":1}'
    with pytest.raises(CheckpointError, match="x: duplicate key 'z'"):
        parse_json(document.encode(), "x")
    assert Counted.comparisons < 20 * keys


def test_garbage_collection_is_enabled_afterwards():
    for document in ('{"a": 1}', '{"a": '):
        with contextlib.suppress(CheckpointError):
            parse_json(document.encode(), "x")
        assert gc.isenabled()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [10**18] * 400}, r"must have less than 2\^63 numbers; got shape \[1000000000000000000, 1000"),
        ({"shape": [2**62, 2, 0]}, r"must have less than 2\^63 numbers"),
        ({"shape": [10**30]}, "shape must be a list whose items are each an integer >= 0; got"),
        ({"shape": [True]}, "shape must be a list"),
        ({"shape": "4"}, "shape must be a list"),
        ({"shape": {"0": 1}}, "shape must be a list"),
        ({"dtype": 4}, "dtype must be a string; got 4"),
        ({"dtype": None}, "dtype must be a string; got None"),
        ({"dtype": "F33"}, "dtype must be one of F64, .*; got 'F33'"),
        ({"data_offsets": [0, -4]}, "data_offsets must be a list whose items are each an integer >= 0"),
        ({"data_offsets": [0, 4, 8]}, r"must have two data_offsets; got \[0, 4, 8\]"),
        ({"data_offsets": 4}, "data_offsets must be a list"),
    ],
)
def test_invalid_header_entries_are_refused(tmp_path, entry, message):
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: tensor 'a': {message}"):
        read_header(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1)


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_number_of_configuration_keys_is_limited(tmp_path, llama, monkeypatch, is_nested):
    """Otherwise transformers takes about a minute for a million keys."""
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    extra = dict.fromkeys([f"k{number}" for number in range(300)])
    (folder / "config.json").write_text(json.dumps(config | ({"x": [extra]} if is_nested else extra)))
    inspect_checkpoint(folder)
    monkeypatch.setattr(transformers_schema, "MAX_KEYS", 300)
    with pytest.raises(CheckpointError, match=r"config\.json: a configuration must have at most 300 keys; got 3\d\d\."):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("architectures", value) for value in (5, "LlamaForCausalLM", [3], {}, [None], True)),
        *(("rope_parameters", value) for value in (3, "x", [1], {"rope_theta": "x"}, {"rope_theta": None})),
        *(("rope_parameters", {"rope_theta": 1.0, "rope_type": value}) for value in (3, None, ["default"])),
        *(("head_dim", value) for value in (0, -1, 1.5, "8", True, [8], 10**30)),
        *(("num_attention_heads", value) for value in (0, -1, None, "8", 8.0, [8])),
        *(("num_key_value_heads", value) for value in (0, -1, "8", 8.0, [8], True)),
        *(("hidden_size", value) for value in (0, -1, None, "64", [64])),
        *(("sliding_window", value) for value in (0, -1, "5", [5], 1.5, True)),
        *(("layer_types", value) for value in (5, "full_attention", [3], {})),
        *(("no_rope_layers", value) for value in (5, "x", ["x"], {})),
        *(("is_encoder_decoder", value) for value in (5, "x", None, [])),
    ],
)
def test_invalid_configuration_fields_are_refused(tmp_path, llama, name, value):
    """The message names file and field, whether qkv or transformers detects it."""
    shutil.copytree(llama, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError) as raised:
        inspect_checkpoint(tmp_path / "source")
    assert str(raised.value).startswith(f"{path}") and name in str(raised.value)
