"""`seven`: one query of a model under the masks and groupings of the seven mechanisms."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from qkv.analysis.recording import refuse_inputs, require_tokens, without_what_is_not_recorded
from qkv.arguments import require_count, require_int
from qkv.functional import attention_weights
from qkv.integrations.transformers.attention import observed
from qkv.integrations.transformers.watching import watched
from qkv.masks import FULL, Mask


class Mechanism(NamedTuple):
    """A query under one mechanism, and what that would cost a layer with these heads on the whole text."""

    name: str
    first: int
    """the first key that the query sees"""
    stop: int
    """the one after the last"""
    weights: Tensor
    """(H, stop - first), by query head; (1, stop - first), the mean over heads, for multi-head attention"""
    scores: int
    """products of a query and a key, of all queries and heads"""
    cache_numbers: int
    """of keys and values"""


class Seven(NamedTuple):
    """What a query of one layer would see under each of the seven mechanisms."""

    layer: str
    """name of the attention module"""
    query: int
    window: int
    heads: int
    kv_heads: int
    """of the model"""
    groups: int
    """KV heads of grouped-query attention"""
    mechanisms: tuple[Mechanism, ...]


def seven(
    model: nn.Module, input_ids: Tensor, *, layer: str, query: int = -1, window: int | None = None, **inputs: Any
) -> Seven:
    """The weights of one query under the masks and groupings of the seven mechanisms: its own q and k, for each.

    The model was trained with its own mask and groups; the others are what its q and k would see. Scaled dot-product
    attention sees all keys; multi-head attention is the mean of all heads; cross-attention sees the first half of the
    text, as if that were another one; multi-query attention sees the mean of the KV heads, and grouped-query attention
    the model's own, or the means of groups of those of a model that shares none. The memory is that of one row by head.

    Args:
        model, **inputs: as in `record`.
        input_ids: ``(1, L)``.
        layer: the name of an attention module, as in `Recording`.
        query: its place in the text; a negative one counts from the last.
        window: of sliding-window attention; an eighth of the text if None.

    Raises:
        TypeError, ValueError: as `record`, and for a layer or a query that is not there, and several rows.

    Example:
        >>> from qkv.analysis import seven
        >>> seven(model, input_ids, layer="model.layers.0.self_attn").mechanisms[4].weights  # doctest: +SKIP
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError("seven: input_ids must be a tensor (1, L).")
    require_tokens("seven", "input_ids", input_ids, 1)
    refuse_inputs("seven", inputs, "inputs_embeds", "past_key_values")
    require_int("seven", "query", query)
    if window is not None:
        require_count("seven", "window", window)
    found: list[Seven] = []
    names: list[str] = []
    with watched("seven", model) as known:

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
            names.append(known.names[id(module)])
            if names[-1] == layer and not found:
                found.append(_of_call(layer, query, window, q, k, v, options))

        with observed(observe):
            model(**without_what_is_not_recorded(model, {"input_ids": input_ids, **inputs}))
    if not found:
        raise ValueError(f"seven: layer must be one of {', '.join(names) or 'none'}; got {layer!r}.")
    return found[0]


def _of_call(
    layer: str, query: int, window: int | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Seven:
    n, lk = q.shape[2], k.shape[2]
    if n != lk or not -n <= query < n:
        raise ValueError(
            f"seven: query must be from {-n} to {n - 1} in a layer of as many queries as keys; got {query} with {n} "
            f"queries and {lk} keys."
        )
    at, heads, kv_heads = query % n, q.shape[1], k.shape[1]
    groups = kv_heads if kv_heads < heads else next((g for g in range(heads - 1, 0, -1) if heads % g == 0), 1)
    width = min(n, max(1, n // 8) if window is None else window)
    own, half = q[:, :, at : at + 1].float(), max(1, n // 2)
    of_scores: dict[str, Any] = {
        name: options.get(name) for name in ("scale", "softcap", "bias", "sink_logits", "alibi")
    }
    of_scores = {name: x.float() if isinstance(x, Tensor) else x for name, x in of_scores.items()}
    bias = of_scores["bias"]
    if bias is not None and bias.shape[2] != 1:
        bias = bias[:, :, at : at + 1]

    def row(keys: Tensor, mask: Mask = FULL) -> Tensor:
        of_keys = None if bias is None else bias[..., : keys.shape[2]]
        weights = attention_weights(own, keys.float(), mask=mask, offset=at, **of_scores | {"bias": of_keys})
        return weights[0, :, 0]

    def pooled(count: int) -> Tensor:
        mean: Tensor = k.unflatten(1, (count, -1)).float().mean(2)
        return mean

    size, causal = k.shape[3] + v.shape[3], Mask.causal()
    everything, first = n * n, max(0, at + 1 - width)
    lower = n * (n + 1) // 2
    near = width * n - width * (width - 1) // 2
    full, masked = row(k), row(k, causal)
    return Seven(
        layer,
        at,
        width,
        heads,
        kv_heads,
        groups,
        (
            Mechanism("scaled dot-product", 0, n, full, everything, n * size),
            Mechanism("multi-head", 0, n, full.mean(0, keepdim=True), heads * everything, heads * n * size),
            Mechanism("cross", 0, half, row(k[:, :, :half]), heads * n * half, heads * half * size),
            Mechanism("causal", 0, at + 1, masked[:, : at + 1], heads * lower, heads * n * size),
            Mechanism(
                "sliding-window",
                first,
                at + 1,
                row(k, Mask.causal(width))[:, first : at + 1],
                heads * near,
                heads * width * size,
            ),
            Mechanism("multi-query", 0, at + 1, row(pooled(1), causal)[:, : at + 1], heads * lower, n * size),
            Mechanism(
                "grouped-query", 0, at + 1, row(pooled(groups), causal)[:, : at + 1], heads * lower, groups * n * size
            ),
        ),
    )
