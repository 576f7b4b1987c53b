"""`check_fields`: what the fields of files must be, each said once, for all who read them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.files.json_document import show


class Kind(NamedTuple):
    """What a field must be."""

    words: str
    holds: Callable[[Any], bool]


def list_of(kind: Kind) -> Kind:
    """A list of nothing else."""
    words = f"a list whose items are each {kind.words}"
    return Kind(words, lambda value: type(value) is list and all(map(kind.holds, value)))


def either(*kinds: Kind) -> Kind:
    """One of several."""
    words = " or ".join(kind.words for kind in kinds)
    return Kind(words, lambda value: any(kind.holds(value) for kind in kinds))


MOST = 2**63
TEXT = Kind("a text", lambda value: type(value) is str)
FLAG = Kind("true or false", lambda value: type(value) is bool)
COUNT = Kind("a whole number from 1 on", lambda value: type(value) is int and 0 < value < MOST)
SIZE = Kind("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < MOST)
NUMBER = Kind("a number", lambda value: type(value) in (int, float) and math.isfinite(value))
NOTHING = Kind("null", lambda value: value is None)
OBJECT = Kind("an object", lambda value: type(value) is dict)

CONFIG = {
    "model_type": TEXT,
    "architectures": either(NOTHING, list_of(TEXT)),
    "is_encoder_decoder": FLAG,
    **dict.fromkeys(("num_attention_heads", "hidden_size", "num_hidden_layers"), COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), either(NOTHING, COUNT)),
    "layer_types": either(NOTHING, list_of(TEXT)),
    "no_rope_layers": either(NOTHING, list_of(either(SIZE, FLAG))),
    "rope_parameters": either(NOTHING, OBJECT),
}
"""Of a ``config.json``, and of what transformers makes of one."""
ROTARY = {"rope_theta": NUMBER, "rope_type": TEXT, "partial_rotary_factor": either(NOTHING, NUMBER)}
"""Of ``rope_parameters``, for all layers or for those of one kind."""
INDEX = {"weight_map": Kind("an object of at least one tensor", lambda value: type(value) is dict and len(value) > 0)}
"""Of an index of shards."""
TENSOR = {"dtype": TEXT, "shape": list_of(SIZE), "data_offsets": list_of(SIZE)}
"""Of an entry in the header of a safetensors file."""
GGUF = {
    "general.architecture": TEXT,
    **dict.fromkeys(("block_count", "embedding_length", "rope.dimension_count"), COUNT),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), either(COUNT, list_of(SIZE))),
    **dict.fromkeys(("attention.key_length", "attention.value_length"), either(COUNT, list_of(SIZE))),
    "attention.sliding_window": either(SIZE, list_of(SIZE)),
    "attention.sliding_window_pattern": either(SIZE, list_of(either(FLAG, SIZE))),
    "rope.freq_base": NUMBER,
}
"""Of the header of a GGUF file, those of the architecture without its name before them."""


def find_fault(found: Mapping[str, Any], table: Mapping[str, Kind]) -> str | None:
    """What is wrong with the first field that is not what a table says, of those that are there."""
    for name, kind in table.items():
        if name in found and not kind.holds(found[name]):
            return f"{name} must be {kind.words}; it is {show(found[name])}"
    return None


def check_fields(where: str, found: Mapping[str, Any], table: Mapping[str, Kind]) -> None:
    """Holds fields to a table.

    Raises:
        CheckpointError: for the first that is something else.
    """
    if (fault := find_fault(found, table)) is not None:
        raise CheckpointError(f"{where}: {fault}.")
