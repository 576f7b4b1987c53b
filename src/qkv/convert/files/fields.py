"""`check_fields`: type checks of the fields in configurations, indexes and headers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.json_document import short_repr


class FieldType(NamedTuple):
    """The type of a field."""

    description: str
    """For error messages."""
    accepts: Callable[[Any], bool]


def list_of(item: FieldType) -> FieldType:
    """A list with items of one type."""
    description = f"a list whose items are each {item.description}"
    return FieldType(description, lambda value: type(value) is list and all(map(item.accepts, value)))


def either(*types: FieldType) -> FieldType:
    """A union of types."""
    description = " or ".join(one.description for one in types)
    return FieldType(description, lambda value: any(one.accepts(value) for one in types))


INT64_END = 2**63
STRING = FieldType("a string", lambda value: type(value) is str)
BOOL = FieldType("true or false", lambda value: type(value) is bool)
COUNT = FieldType("an integer >= 1", lambda value: type(value) is int and 0 < value < INT64_END)
SIZE = FieldType("an integer >= 0", lambda value: type(value) is int and 0 <= value < INT64_END)
NUMBER = FieldType("a number", lambda value: type(value) in (int, float) and math.isfinite(value))
NULL = FieldType("null", lambda value: value is None)
OBJECT = FieldType("an object", lambda value: type(value) is dict)

CONFIG = {
    "model_type": STRING,
    "architectures": either(NULL, list_of(STRING)),
    "is_encoder_decoder": BOOL,
    **dict.fromkeys(("num_attention_heads", "hidden_size", "num_hidden_layers"), COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), either(NULL, COUNT)),
    "layer_types": either(NULL, list_of(STRING)),
    "no_rope_layers": either(NULL, list_of(either(SIZE, BOOL))),
    "rope_parameters": either(NULL, OBJECT),
}
"""Fields of a ``config.json``, and of transformers' configuration objects."""
ROTARY = {"rope_theta": NUMBER, "rope_type": STRING, "partial_rotary_factor": either(NULL, NUMBER)}
"""Fields of ``rope_parameters``."""
INDEX = {
    "weight_map": FieldType("an object with at least one tensor", lambda value: type(value) is dict and len(value) > 0)
}
"""Fields of an index of shards."""
TENSOR = {"dtype": STRING, "shape": list_of(SIZE), "data_offsets": list_of(SIZE)}
"""Fields of a tensor in the header of a safetensors file."""
GGUF = {
    "general.architecture": STRING,
    **dict.fromkeys(("block_count", "embedding_length", "rope.dimension_count"), COUNT),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), either(COUNT, list_of(SIZE))),
    **dict.fromkeys(("attention.key_length", "attention.value_length"), either(COUNT, list_of(SIZE))),
    "attention.sliding_window": either(SIZE, list_of(SIZE)),
    "attention.sliding_window_pattern": either(SIZE, list_of(either(BOOL, SIZE))),
    "rope.freq_base": NUMBER,
}
"""Fields of a GGUF header, without the architecture's prefix."""


def find_fault(fields: Mapping[str, Any], types: Mapping[str, FieldType]) -> str | None:
    """Describes the first field of the wrong type; None where all are right. Missing fields are accepted."""
    for name, expected in types.items():
        if name in fields and not expected.accepts(fields[name]):
            return f"{name} must be {expected.description}; got {short_repr(fields[name])}"
    return None


def check_fields(where: str, fields: Mapping[str, Any], types: Mapping[str, FieldType]) -> None:
    """Checks the types of the fields that are present. ``where`` names the file in the error.

    Raises:
        CheckpointError: for the first field of the wrong type.
    """
    if (fault := find_fault(fields, types)) is not None:
        raise CheckpointError(f"{where}: {fault}.")
