"""`convert_to_latent`: a `LatentAttention` from an `Attention`."""

import torch
from torch import Tensor

from qkv.arguments import require_count
from qkv.convert.heads.latents import LatentFactors, LatentWidths, factorise
from qkv.convert.layer import check_layer, require_gain, state_of
from qkv.layers import Attention, LatentAttention, RotaryEmbedding


def convert_to_latent(
    layer: Attention, rank: int, *, rope_heads: int | None = None, gain: Tensor | None = None
) -> LatentAttention:
    """Latent attention with the function of a layer, up to what ``rank`` and ``rope_dim`` leave out.

    A token takes ``rank + rope_heads * rotary_dim`` numbers in a cache, not ``num_kv_heads * (head_dim + value_dim)``.
    Values, and keys without positions, become a joint latent of low rank. Keys that rotary embedding rotates cannot:
    they are kept as a rotary key that all heads share. Of its components at each frequency, the ``rope_heads`` largest
    are kept; keys in the others lose their positions and join the latents.

    Exact, up to rounding, with all components (``rope_heads=None``) and full rank: the smaller of the number of inputs
    and ``num_kv_heads * (head_dim + value_dim) - rope_heads * rotary_dim``, with which a cache is no smaller. With
    less, the result needs further training.

    Args:
        layer: self-attention, not modified; the result shares no parameter with it.
        rank: width of the latents.
        rope_heads: components that keep their positions, ``num_kv_heads`` if None; 1 gives a rotary key as wide as that
            of one head.
        gain: the ``weight`` of the norm before the layer, if any, by which errors are weighed.

    Raises:
        TypeError: for a layer that is not an `Attention`, and projections other than plain ``nn.Linear``.
        ValueError: for a rank or a width out of range, and a layer that latent attention cannot express:
            cross-attention, and one with norms of keys, sink logits or ALiBi.

    Example:
        >>> import torch, qkv
        >>> from qkv.convert import convert_to_latent
        >>> layer, x = qkv.CausalAttention(64, 8, num_kv_heads=2), torch.randn(1, 5, 64)
        >>> exact, small = convert_to_latent(layer, 32), convert_to_latent(layer, 16)
        >>> torch.allclose(exact(x), layer(x), atol=1e-5), torch.allclose(small(x), layer(x), atol=1e-5)
        (True, False)

    Source: TransMLA (Meng et al. 2025), sections 4.2 and 4.3; MHA2MLA (Ji et al. 2025) for the joint decomposition.
    """
    check_layer("convert_to_latent", layer)
    _check_options(layer)
    pairs, heads = _rotary_pairs(layer), layer.num_kv_heads
    rope_heads = heads if rope_heads is None else rope_heads
    require_count("convert_to_latent", "rope_heads", rope_heads, least=0)
    if rope_heads > heads:
        raise ValueError(f"convert_to_latent: rope_heads must be at most {heads}, the KV heads; got {rope_heads}.")
    require_count("convert_to_latent", "rank", rank)
    widths = LatentWidths(heads, layer.head_dim, layer.value_dim, 2 * len(pairs), rank, rope_heads)
    require_gain("convert_to_latent", gain, layer.embed_dim)
    q, k, v = _projections(layer)
    if layer.rotary is not None and layer.rotary.scaling is not None:
        factors = torch.ones(layer.head_dim, 1, dtype=torch.float64)
        factors[pairs.flatten()] = layer.rotary.scaling.attention_factor**2  # of rotated queries and of rotated keys
        q = q * factors  # not in place: in fp64 these are the weights of the layer
    full = widths.full_rank(q.shape[2])
    if rank > full:
        raise ValueError(f"convert_to_latent: rank must be at most {full}, the full one; got {rank}.")
    weights = torch.ones(q.shape[2], dtype=torch.float64)
    if gain is not None:
        weights[: layer.embed_dim] = gain.detach().double().abs().clamp_min(torch.finfo(torch.float32).tiny)
    return _build(layer, factorise(q, k, v, pairs, weights, widths), widths)


def _check_options(layer: Attention) -> None:
    """Raises ValueError for a layer with what latent attention does not have."""
    scaling = getattr(layer.rotary, "scaling", None)
    has = {
        "context_dim": layer.context_dim is not None,
        "qk_norm": layer.q_norm is not None,
        "sink_logits": layer.sink_logits is not None,
        "alibi": layer.alibi is not None,
        "rotary of another class": type(layer.rotary) not in (type(None), RotaryEmbedding),
        "rotary with sections": getattr(layer.rotary, "sections", None) is not None,
        "rotary that depends on the length": scaling is not None and scaling.depends_on_length,
        "position_bias": layer.position_bias is not None,
        "gate": layer.gate_proj is not None,
    }
    found = ", ".join(name for name, given in has.items() if given)
    if found:
        raise ValueError(f"convert_to_latent: latent attention has no {found}; got {layer!r}.")


def _rotary_pairs(layer: Attention) -> Tensor:
    """``(F, 2)``, the channels of a head that rotate together."""
    if layer.rotary is None:
        return torch.empty(0, 2, dtype=torch.int64)
    channels = torch.arange(layer.rotary.rotary_dim)
    return channels.view(-1, 2) if layer.rotary.interleaved else channels.view(2, -1).T


def _projections(layer: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, keys and values by head, in fp64, with biases as one more column."""
    state = state_of(layer)

    def rows(name: str, width: int) -> Tensor:
        weight = state[f"{name}.weight"].double().cpu()
        if f"{name}.bias" in state:
            weight = torch.cat([weight, state[f"{name}.bias"].double().cpu()[:, None]], dim=1)
        return weight.view(-1, width, weight.shape[1])

    return rows("q_proj", layer.head_dim), rows("k_proj", layer.head_dim), rows("v_proj", layer.value_dim)


def _build(layer: Attention, factors: LatentFactors, widths: LatentWidths) -> LatentAttention:
    """The layer with these projections, and the other options of ``layer``."""
    state, width, has_bias = state_of(layer), layer.embed_dim, layer.q_proj.bias is not None
    weight = state["q_proj.weight"]
    new = LatentAttention(
        layer.embed_dim,
        layer.num_heads,
        kv_rank=widths.rank,
        nope_dim=widths.nope_dim,
        rope_dim=widths.rope_dim,
        value_dim=layer.value_dim,
        mask=layer.mask,
        rotary=_rotary_key(layer.rotary, widths),
        norm_eps=None,
        bias=has_bias,
        out_bias=layer.out_proj.bias is not None,
        scale=layer.head_dim**-0.5 if layer.scale is None else layer.scale,
        softcap=layer.softcap,
        dropout=layer.dropout,
        backend=layer.backend,
        device=weight.device,
        dtype=weight.dtype,
    )
    weights = {"q_proj": factors.q.flatten(0, 1), "kv_a_proj": factors.down, "kv_b_proj": factors.up.flatten(0, 1)}
    converted = {f"{name}.weight": weight[:, :width] for name, weight in weights.items()}
    converted["kv_b_proj.weight"] = weights["kv_b_proj"]
    if has_bias:
        converted |= {f"{name}.bias": weights[name][:, width] for name in ("q_proj", "kv_a_proj")}
    new.load_state_dict({**converted, **{name: x for name, x in state.items() if name.startswith("out_proj")}})
    return new.train(layer.training)


def _rotary_key(rotary: RotaryEmbedding | None, widths: LatentWidths) -> RotaryEmbedding | None:
    """The rotary embedding of the rotary key."""
    if rotary is None or not widths.rope_heads:
        return None
    return RotaryEmbedding(
        widths.rope_dim,
        interleaved=True,
        position_scale=rotary.position_scale,
        frequencies=rotary.frequencies.repeat_interleave(widths.rope_heads),
    )
