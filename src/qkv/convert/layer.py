"""`convert_layer`: an `Attention` with fewer key/value heads."""

from dataclasses import replace

import torch
from torch import Tensor

from qkv.arguments import require_int
from qkv.convert.families.layout import Layout
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.heads.alignment import KeySymmetry, Projections, align_heads
from qkv.convert.heads.pooling import ConversionMethod, pool_heads
from qkv.layers import Attention, CrossLayerAttention, DifferentialAttention
from qkv.layers.options import Arguments
from qkv.layers.projection import linear_projections

LAYOUT = Layout(out="out_proj")
"""The layout of `Attention`."""


def convert_layer(
    layer: Attention, num_kv_heads: int, *, how: ConversionMethod = "mean", seed: int = 0, gain: Tensor | None = None
) -> Attention:
    """A copy of ``layer`` whose keys and values are pooled to ``num_kv_heads``, as by `pool_heads`.

    Args:
        layer: not modified; the copy shares no parameter with it.
        num_kv_heads: a divisor of the layer's.
        how: as in `pool_heads`; or ``aligned``: the mean of heads that `align_heads` has reordered and rotated first.
        seed: for ``random``; keys and values use different draws.
        gain: for ``aligned``, as in `align_heads`: the ``weight`` of the norm before the layer, if any.

    Raises:
        TypeError: for a layer that is not an `Attention`, and projections other than plain ``nn.Linear``.
        ValueError: as `pool_heads` and `align_heads`, and for ``aligned`` of a layer with a gate.

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
    """Returns the layer if it is an `Attention` with linear projections, else raises a TypeError."""
    if not isinstance(layer, Attention):
        raise TypeError(
            f"{caller}: layer must be a qkv.Attention; got {type(layer).__name__}. "
            "Convert an nn.MultiheadAttention with qkv.MultiHeadAttention.from_torch first."
        )
    if isinstance(layer, (DifferentialAttention, CrossLayerAttention)):
        raise TypeError(
            f"{caller}: layer must have one map and keys of its own for each head; got a {type(layer).__name__}. "
            "Build it with the heads that you want."
        )
    linear_projections(caller, layer)
    return layer


def require_gain(caller: str, gain: object, width: int) -> None:
    """Raises ValueError unless ``gain`` is a tensor of this width, or None."""
    if gain is not None and not (isinstance(gain, Tensor) and gain.shape == (width,)):
        got = f"shape {tuple(gain.shape)}" if isinstance(gain, Tensor) else repr(gain)
        raise ValueError(f"{caller}: gain must be ({width},), one value per column; got {got}.")


def state_of(layer: Attention) -> dict[str, Tensor]:
    """The state dict of an equivalent plain layer: parametrised weights are stored as the values they compute."""
    projections = linear_projections("state_of", layer)
    state = {name: value for name, value in layer.state_dict().items() if name.partition(".")[0] not in projections}
    for name, linear in projections.items():
        state[f"{name}.weight"] = linear.weight.detach()
        if linear.bias is not None:
            state[f"{name}.bias"] = linear.bias.detach()
    return state


def projections_of(layer: Attention) -> tuple[Projections, Heads]:
    """The projection weights of a layer, and its head counts."""
    heads = Heads(layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return LAYOUT.read(state_of(layer), heads), heads


def rebuild(layer: Attention, state: dict[str, Tensor], query_heads: Tensor, num_kv_heads: int) -> Attention:
    """A layer with new weights and ``num_kv_heads``, and all other options of ``layer``.

    Sink logits, gates, ALiBi slopes and per-head masks are those of the ``query_heads`` (indices into the old heads).
    """
    if "sink_logits" in state:
        state["sink_logits"] = state["sink_logits"][query_heads]
    for name in ("gate_proj.weight", "gate_proj.bias"):
        if name in state:
            state[name] = state[name].unflatten(0, (layer.num_heads, -1))[query_heads].flatten(0, 1)
    mask = layer.mask
    if mask.allow is not None and mask.allow.dim() > 2 and mask.allow.shape[-3] > 1:
        mask = replace(mask, allow=mask.allow[..., query_heads, :, :])
    alibi = None if layer.alibi is None else layer.alibi[query_heads]
    changed: Arguments = {
        **layer.options(),
        "num_heads": len(query_heads),
        "num_kv_heads": num_kv_heads,
        "mask": mask,
        "alibi": alibi,
    }
    new = Attention(**changed)
    new.load_state_dict(state)
    return new.train(layer.training)


def _align(layer: Attention, num_kv_heads: int, gain: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The layer's state with its heads aligned (an equivalent layer), and the new order of its query heads."""
    if layer.gate_proj is not None:
        raise ValueError(
            "convert_layer: how must not be 'aligned' for a layer with gate=True, since values that are gated channel "
            "by channel cannot be rotated. Use how='mean'."
        )
    symmetry, rotary = KeySymmetry(normed=layer.q_norm is not None), layer.rotary
    if rotary is not None:
        symmetry = symmetry._replace(rotary_dim=rotary.rotary_dim, interleaved=rotary.interleaved)
    projections, heads = projections_of(layer)
    require_gain("convert_layer", gain, layer.k_proj.in_features)
    alignment = align_heads(projections, layer.num_kv_heads, num_kv_heads, symmetry, gain=gain)
    state = state_of(layer)
    state |= LAYOUT.replace(state, alignment.apply(projections), heads)
    return state, alignment.query_order(layer.num_heads)
