"""`make_plan`: what a conversion will do, from configuration and headers alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.registry import FAMILIES, convert_tensors, find_family
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.pooling import Method, divisors


class Plan(NamedTuple):
    """What a conversion will do."""

    config: dict[str, Any]
    """Of the result."""
    outputs: dict[str, Output]
    """Tensors of the result, by name."""


def make_plan(
    where: str,
    config: dict[str, Any],
    tensors: Mapping[str, TensorSpec],
    num_kv_heads: int,
    *,
    how: Method = "mean",
    seed: int = 0,
    window: int | None = None,
) -> Plan:
    """Plans the conversion of a model that ``config`` and ``tensors`` describe.

    Raises:
        CheckpointError: for a family that is not supported or cannot express the result, a number of heads that does
            not divide, a configuration that disagrees with the tensors.
    """
    family = find_family(where, config)
    known = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, known, tensors)
    heads = transformers_schema.heads(where, known)
    if num_kv_heads < 1 or heads.num_kv_heads % num_kv_heads:
        possible = ", ".join(map(str, divisors(heads.num_kv_heads)))
        raise CheckpointError(
            f"{where}: the {heads.num_kv_heads} KV heads of the model can be pooled to {possible}; got {num_kv_heads}."
        )
    pooling = Pooling(heads, num_kv_heads, "mean" if how == "aligned" else how, seed)
    outputs = convert_tensors(where, family, known, tensors, pooling, aligned=how == "aligned")
    try:
        new = family.configure(config, known, pooling)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if window is not None:
        new = _with_window(where, family, new, window)
    specs = {name: output.spec for name, output in outputs.items()}
    result = f"the result of converting {where}"
    converted = transformers_schema.read_config(result, new, len(specs))
    transformers_schema.check_tensors(result, converted, specs)
    if transformers_schema.heads(result, converted) != heads._replace(num_kv_heads=num_kv_heads):
        raise AssertionError(f"{result}: transformers reads {transformers_schema.heads(result, converted)} from it")
    if window is not None and set(transformers_schema.windows(converted)) != {window}:
        raise AssertionError(f"{result}: transformers reads windows {transformers_schema.windows(converted)} from it")
    return Plan(new, outputs)


def _with_window(where: str, family: Family, config: dict[str, Any], window: int) -> dict[str, Any]:
    if family.windowed is None:
        able = ", ".join(name for name, other in FAMILIES.items() if other.windowed is not None)
        raise CheckpointError(
            f"{where}: the configuration of a {config['model_type']} model cannot express a window in every layer; "
            f"those of {able} can."
        )
    if window < 1:
        raise CheckpointError(f"{where}: a window must hold at least 1 key, the query's own; got {window}.")
    return family.windowed(config, window)
