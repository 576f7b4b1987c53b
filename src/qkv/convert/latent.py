"""`convert_to_latent`: a `LatentAttention` from an `Attention`."""

import torch
from torch import Tensor

from qkv.arguments import require_count
from qkv.convert.heads.latents import LatentFactors, factorise
from qkv.convert.layer import check_layer, require_gain, state_of
from qkv.layers import Attention, LatentAttention, RotaryEmbedding


def convert_to_latent(
    layer: Attention, rank: int, *, rope_dim: int | None = None, gain: Tensor | None = None
) -> LatentAttention:
    """Latent attention with the function of a layer, up to what ``rank`` and ``rope_dim`` leave out.

    A token takes ``rank + rope_dim`` numbers in a cache, instead of ``num_kv_heads * (head_dim + value_dim)``. Values,
    and keys without positions, become a joint latent of low rank. Keys that rotary embedding rotates cannot: they are
    kept as a rotary key that all heads share. Of its components, sorted by size, ``rope_dim / 2`` pairs are kept; keys
    in the others lose their positions and join the latents.

    Exact, up to rounding, with all components (``rope_dim=None``) and full rank: the smaller of the number of inputs
    and ``num_kv_heads * (head_dim + value_dim) - rope_dim``, with which a cache is no smaller. With less, the result
    needs further training.

    Args:
        layer: self-attention, not modified; the result shares no parameter with it.
        rank: width of the latents.
        rope_dim: width of the rotary key, even; ``num_kv_heads`` times the layer's if None.
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

    Source: as `qkv.convert.heads.latents.factorise`.
    """
    check_layer("convert_to_latent", layer)
    _check_options(layer)
    pairs = _rotary_pairs(layer)
    most = 2 * len(pairs) * layer.num_kv_heads
    rope_dim = most if rope_dim is None else rope_dim
    require_count("convert_to_latent", "rope_dim", rope_dim, least=0)
    if rope_dim % 2 or rope_dim > most:
        raise ValueError(
            f"convert_to_latent: rope_dim must be even and at most {most}, the rotated channels of all KV heads; "
            f"got {rope_dim}."
        )
    require_gain("convert_to_latent", gain, layer.embed_dim)
    q, k, v = _projections(layer)
    weights = torch.ones(q.shape[2], dtype=torch.float64)
    if gain is not None:
        weights[: layer.embed_dim] = gain.detach().double().abs().clamp_min(torch.finfo(torch.float32).tiny)
    require_count("convert_to_latent", "rank", rank)
    full = min(q.shape[2], layer.num_kv_heads * (layer.head_dim + layer.value_dim) - rope_dim)
    if rank > full:
        raise ValueError(f"convert_to_latent: rank must be at most {full}, the full one; got {rank}.")
    return _build(layer, factorise(q, k, v, pairs, weights, rank=rank, n=rope_dim // 2))


def _check_options(layer: Attention) -> None:
    """Raises ValueError for a layer with what latent attention does not have."""
    has = {
        "context_dim": layer.context_dim is not None,
        "qk_norm": layer.q_norm is not None,
        "sink_logits": layer.sink_logits is not None,
        "alibi": layer.alibi is not None,
        "a rotary other than RotaryEmbedding": type(layer.rotary) not in (type(None), RotaryEmbedding),
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


def _build(layer: Attention, factors: LatentFactors) -> LatentAttention:
    """The layer with these projections, and the other options of ``layer``."""
    given, state = layer.options(), state_of(layer)
    rotary, width = layer.rotary, layer.embed_dim
    kept = ("embed_dim", "num_heads", "value_dim", "mask", "bias", "out_bias", "softcap", "dropout", "backend")
    rope_dim = 2 * len(factors.frequency)
    new = LatentAttention(
        **{name: given[name] for name in (*kept, "device", "dtype")},
        kv_rank=factors.up.shape[2],
        nope_dim=factors.q.shape[1] - rope_dim,
        rope_dim=rope_dim,
        norm_eps=None,
        scale=layer.head_dim**-0.5 if layer.scale is None else layer.scale,
        rotary=None
        if rotary is None or not rope_dim
        else RotaryEmbedding(
            rope_dim,
            interleaved=True,
            position_scale=rotary.position_scale,
            frequencies=rotary.frequencies[factors.frequency],
        ),
    )
    weights = {"q_proj": factors.q.flatten(0, 1), "kv_a_proj": factors.down, "kv_b_proj": factors.up.flatten(0, 1)}
    converted = {f"{name}.weight": weight[:, :width] for name, weight in weights.items()}
    converted["kv_b_proj.weight"] = weights["kv_b_proj"]
    if given["bias"]:
        converted |= {f"{name}.bias": weights[name][:, width] for name in ("q_proj", "kv_a_proj")}
    new.load_state_dict({**converted, **{name: x for name, x in state.items() if name.startswith("out_proj")}})
    return new.train(layer.training)
