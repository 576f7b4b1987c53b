"""`convert_layer`: an `Attention` with fewer key/value heads."""

from dataclasses import replace

import torch
from torch import Tensor

from qkv.arguments import require_int
from qkv.convert.families.layout import Layout
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.heads.alignment import KeySymmetry, Projections, align_heads
from qkv.convert.heads.pooling import Method, pool_heads
from qkv.layers import Attention
from qkv.layers.projection import PROJECTIONS, require_linear

LAYOUT = Layout(out="out_proj")
"""Of `Attention`."""


def convert_layer(
    layer: Attention, num_kv_heads: int, *, how: Method = "mean", seed: int = 0, gain: Tensor | None = None
) -> Attention:
    """A new layer that differs from ``layer`` in having ``num_kv_heads``, pooled as by `pool_heads`.

    Args:
        layer: left as it is; no parameter is shared.
        num_kv_heads: a divisor of those that it has.
        how: as in `pool_heads`; or ``aligned``, the mean of heads that `align_heads` has reordered and turned before.
        seed: of ``random``; keys and values draw different numbers.
        gain: of ``aligned``, as in `align_heads`: the ``weight`` of the norm before the layer, where there is one.

    Raises:
        TypeError: for a layer of another kind, and projections that compute more than their weights say.
        ValueError: as `pool_heads` and `align_heads`.

    Example:
        >>> import qkv
        >>> from qkv.convert import convert_layer
        >>> convert_layer(qkv.MultiHeadAttention(64, 8), 2).num_kv_heads
        2
    """
    state, query_heads = state_of(check_layer("convert_layer", layer)), torch.arange(layer.num_heads)
    require_int("convert_layer", "num_kv_heads", num_kv_heads)
    if how == "aligned":
        how = "mean"
        if num_kv_heads != layer.num_kv_heads:
            state, query_heads = _align(layer, num_kv_heads, gain)
    for number, name in enumerate(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
        if name in state:
            state[name] = pool_heads(state[name], layer.num_kv_heads, num_kv_heads, how=how, seed=seed + number)
    return rebuild(layer, state, query_heads, num_kv_heads)


def check_layer(caller: str, layer: Attention) -> Attention:
    """Raises unless it is one."""
    if not isinstance(layer, Attention):
        raise TypeError(
            f"{caller}: layer must be a qkv.Attention; got {type(layer).__name__}. "
            "Of an nn.MultiheadAttention, qkv.MultiHeadAttention.from_torch makes one."
        )
    for name in PROJECTIONS:
        require_linear(caller, name, getattr(layer, name))
    return layer


def state_of(layer: Attention) -> dict[str, Tensor]:
    """The state of a plain layer that computes the same: weights as they are, whatever they are computed of."""
    state = {name: value for name, value in layer.state_dict().items() if not name.startswith(PROJECTIONS)}
    for name in PROJECTIONS:
        linear = getattr(layer, name)
        state[f"{name}.weight"] = linear.weight.detach()
        if linear.bias is not None:
            state[f"{name}.bias"] = linear.bias.detach()
    return state


def projections_of(layer: Attention) -> tuple[Projections, Heads]:
    """The weights of a layer, and how many heads they hold."""
    heads = Heads(layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return LAYOUT.read(state_of(layer), heads), heads


def rebuild(layer: Attention, state: dict[str, Tensor], query_heads: Tensor, num_kv_heads: int) -> Attention:
    """A layer with other weights and heads, otherwise like ``layer``.

    What query heads have one of each, sink logits, ALiBi slopes and masks, is that of ``query_heads`` of the layer.
    """
    if "sink_logits" in state:
        state["sink_logits"] = state["sink_logits"][query_heads]
    mask = layer.mask
    if mask.allow is not None and mask.allow.dim() > 2 and mask.allow.shape[-3] > 1:
        mask = replace(mask, allow=mask.allow[..., query_heads, :, :])
    alibi = None if layer.alibi is None else layer.alibi[query_heads]
    changes = {"num_heads": len(query_heads), "num_kv_heads": num_kv_heads, "mask": mask, "alibi": alibi}
    new = Attention(**{**layer.options(), **changes})
    new.load_state_dict(state)
    return new.train(layer.training)


def _align(layer: Attention, num_kv_heads: int, gain: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The state of the layer with its heads aligned, which computes the same, and the order of its query heads."""
    freedom, rotary = KeySymmetry(normed=layer.q_norm is not None), layer.rotary
    if rotary is not None:
        freedom = freedom._replace(rotary_dim=rotary.rotary_dim, interleaved=rotary.interleaved)
    projections, heads = projections_of(layer)
    width = layer.k_proj.in_features
    if gain is not None and not (isinstance(gain, Tensor) and gain.shape == (width,)):
        got = f"shape {tuple(gain.shape)}" if isinstance(gain, Tensor) else repr(gain)
        raise ValueError(f"convert_layer: gain must be ({width},), one a column; got {got}.")
    alignment = align_heads(projections, layer.num_kv_heads, num_kv_heads, freedom, gain=gain)
    state = state_of(layer)
    state |= LAYOUT.replace(state, alignment.apply(projections), heads)
    return state, alignment.query_order(layer.num_heads)
