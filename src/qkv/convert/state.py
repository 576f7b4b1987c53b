"""`convert_state_dict`: the conversion of a model in memory."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec
from qkv.convert.heads.pooling import ConversionMethod
from qkv.convert.plan import plan_conversion


class ConvertedModel(NamedTuple):
    """State dict and configuration of a converted or pruned model."""

    state_dict: dict[str, Tensor]
    """Unchanged tensors are shared with the input."""
    config: dict[str, Any]


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    num_kv_heads: int | None = None,
    *,
    how: ConversionMethod | None = "mean",
    seed: int = 0,
    window: int | None = None,
    layers: Sequence[int] | None = None,
) -> ConvertedModel:
    """Pools the keys and values of a transformers model to ``num_kv_heads``, sets windows, or both.

    Args:
        state_dict: all tensors of the model.
        config: ``model.config.to_dict()``, including ``model_type``.
        num_kv_heads: a divisor of the model's; None keeps them.
        how: as in `pool_heads`; or ``aligned``: the mean of heads that `align_heads` has reordered and rotated first.
            None takes ``aligned``, or ``mean`` for encoder-decoders, whose heads cannot be aligned, as ``qkv convert``.
        seed: for ``random``; each tensor has its own draws.
        window: sets a sliding window: a query sees this many keys at most, its own included. One that is there can
            only be narrowed.
        layers: the layers that get the window, from 0; None for all.

    Returns:
        State dict and configuration for ``AutoConfig.for_model(**config)``. With windows, a Llama model becomes a
        Ministral model, which computes the same, and so does a Mistral model whose layers differ.

    Raises:
        CheckpointError: for a model family that is not supported, a configuration that does not match the tensors, and
            windows that a configuration of the family cannot express.

    Example:
        >>> from qkv.convert import convert_state_dict
        >>> converted = convert_state_dict(model.state_dict(), model.config.to_dict(), 2)  # doctest: +SKIP
        >>> smaller = LlamaForCausalLM(LlamaConfig(**converted.config))  # doctest: +SKIP
        >>> smaller.load_state_dict(converted.state_dict)  # doctest: +SKIP
    """
    plan = plan_conversion(
        "config", dict(config), specs_of(state_dict), num_kv_heads, how=how, seed=seed, window=window, layers=layers
    )
    values = {}
    for name, output in plan.outputs.items():
        sources = [state_dict[source] for source in output.sources]
        values[name] = sources[0] if output.compute is None else output.compute(*sources)
    return ConvertedModel(values, plan.config)


def specs_of(state_dict: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Dtype and shape of each tensor, as the header of a safetensors file has them.

    Raises:
        CheckpointError: for tensors that are not floating-point.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    unknown = {str(tensor.dtype) for tensor in state_dict.values() if tensor.dtype not in names}
    if unknown:
        raise CheckpointError(f"state_dict: tensors must be floating-point; some are {', '.join(sorted(unknown))}.")
    return {name: TensorSpec(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in state_dict.items()}
