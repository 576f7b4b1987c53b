"""Calls of layers with ``tokens=``: what they share, from the layout to attention over ranks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qkv import parallel
from qkv.cache import KVCache
from qkv.layers.arguments import input_error, require_mask
from qkv.layers.cached_call import CallOptions, Inputs
from qkv.layers.position_bias import RelativePositionBias
from qkv.masks import FULL, Mask
from qkv.parallel.attention import attend
from qkv.parallel.calls import ShardedOptions
from qkv.parallel.context import Over, count_call, layout_of
from qkv.parallel.schemes import PieceOptions
from qkv.parallel.tokens import Whole

if TYPE_CHECKING:
    from qkv.layers.attention import Attention
    from qkv.layers.latent import LatentAttention


def layout_for(
    layer: "Attention | LatentAttention",
    tokens: parallel.Tokens | None,
    context_tokens: parallel.Tokens | Whole | None = None,
) -> Over | None:
    """The layout of a call: the arguments, or what `parallel.over` says of a layer that is marked. None for neither.

    Raises:
        TypeError: for arguments of other types.
        ValueError: for context_tokens alone, and as `parallel.over`.
    """
    if tokens is None and context_tokens is None:
        return layout_of(layer)
    caller = type(layer).__name__
    if not isinstance(tokens, parallel.Tokens):
        if tokens is None:
            raise ValueError(f"{caller}: context_tokens need tokens, the layout of x; got None.")
        raise TypeError(f"{caller}: tokens must be a qkv.parallel.Tokens or None; got {type(tokens).__name__}.")
    if not (context_tokens is None or isinstance(context_tokens, (parallel.Tokens, Whole))):
        raise TypeError(
            f"{caller}: context_tokens must be a qkv.parallel.Tokens, parallel.WHOLE or None; "
            f"got {type(context_tokens).__name__}."
        )
    return Over(tokens, context_tokens, None)


def options_over_ranks(
    layer: "Attention | LatentAttention",
    x: Tensor,
    layout: Over,
    positions: Tensor | None,
    cache: object,
) -> CallOptions:
    """The options by which a layer projects the tokens of a rank, without mask and bias, which are of all tokens.

    Raises:
        TypeError: for an x of another type or shape, and a cache other than a KVCache.
        ValueError: for another number of rows than the layout gives to this rank, and positions without rotary.
    """
    caller, tokens = type(layer).__name__, layout.tokens
    count_call(layer)
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or x.shape[2] != layer.embed_dim:
        raise input_error(caller, "x", x, f"(B, L, {layer.embed_dim})")
    if x.shape[1] != tokens.rows:
        raise ValueError(
            f"{caller}: x must have the {tokens.rows} rows that the layout gives rank {tokens.rank} of "
            f"{len(tokens.runs)}; got {x.shape[1]}. Use tokens.take(x) of all {tokens.length} rows."
        )
    if cache is not None and type(cache) not in (KVCache, parallel.ShardedKVCache):
        raise TypeError(
            f"{caller}: cache must be a KVCache or None in a call over ranks, for layers that share its keys, or a "
            f"parallel.ShardedKVCache; got {type(cache).__name__}."
        )
    own = None if isinstance(cache, parallel.ShardedKVCache) else cache  # which gets keys as they are dealt out
    rotary = layer.rotary
    if rotary is None:
        if positions is not None:
            raise ValueError(f"{caller}: positions rotate queries and keys, so the layer needs a rotary; got None.")
        return CallOptions(FULL, None, None, own)
    length = None
    if getattr(rotary, "depends_on_length", False):
        if positions is not None:
            raise ValueError(
                f"{caller}: positions must be None in a call over ranks with a scaling that depends on the length, "
                f"which one rank does not know from its own; got a tensor of shape {tuple(positions.shape)}."
            )
        length = tokens.length
    return CallOptions(FULL, None, tokens.positions if positions is None else positions, own, length)


def mask_over_ranks(layer: "Attention | LatentAttention", mask: Mask | None, layout: Over) -> Mask:
    """The mask of the layer, of the call and of `parallel.over`."""
    found = layer.mask if mask is None else layer.mask & require_mask(type(layer).__name__, mask)
    return found if layout.mask is None else found & layout.mask


def attend_over_ranks(layer: "Attention", inputs: Inputs) -> Tensor:
    """`parallel.attention` with the options of the layer."""
    assert inputs.layout is not None
    tokens, context_tokens, _ = inputs.layout
    key_tokens = tokens if layer.context_dim is None else context_tokens
    n_keys = inputs.keys.lk if isinstance(key_tokens, Whole) or key_tokens is None else key_tokens.length
    module = layer.position_bias
    rows = None if module is None else _rows_of(layer, module, tokens.length, n_keys, inputs.q)
    options: ShardedOptions = {"mask": inputs.mask, "backend": layer.backend}
    options.update(layer._scores(inputs.q, inputs.bias))  # type: ignore[typeddict-item]
    qkv = inputs.q, inputs.keys.k, inputs.keys.v
    return attend(type(layer).__name__, qkv, tokens, key_tokens, options, rows=rows)


def _rows_of(layer: "Attention", module: Any, n_queries: int, n_keys: int, q: Tensor) -> Callable[[int, int], Tensor]:
    """The bias of a module for the query rows from one number up to another."""
    heads = slice(None) if layer._share is None else layer._share.query_heads
    if isinstance(module, RelativePositionBias):
        return lambda start, stop: layer._bias_of_positions(stop - start, n_keys, start, q)[:, heads]
    # Those of images are made for all of a window or for none.
    whole = layer._bias_of_positions(n_queries, n_keys, 0, q)
    return lambda start, stop: whole[:, heads, start:stop]


def attend_latents_over_ranks(
    layer: "LatentAttention", q: Tensor, latents: Tensor, mask: Mask, bias: Tensor | None, layout: Over
) -> Tensor:
    """`LatentHeads.attend` over ranks, which send each other latents."""
    heads = layer._heads
    stand_in = latents[..., :1]
    k, v = (stand_in.expand(-1, -1, -1, width) for width in (q.shape[3], layer.value_dim))

    def solve(q: Tensor, keys: Sequence[Tensor], options: PieceOptions, *, wants_lse: bool) -> tuple[Tensor, None]:
        given: dict[str, Any] = {name: value for name, value in options.items() if name not in ("alibi", "sink_logits")}
        return heads.attend(q, keys[0], backend=layer.backend, **given), None

    options: ShardedOptions = {"mask": mask, "backend": layer.backend}
    options.update(layer._scores(bias))  # type: ignore[typeddict-item]
    tokens = layout.tokens
    out = attend(type(layer).__name__, (q, k, v), tokens, tokens, options, carried=(latents,), solve=solve)
    if not tokens.rows:  # the projection of latents has a gradient on each rank
        out = out + sum(heads_of.sum() for heads_of in heads.expand(latents))
    return out
