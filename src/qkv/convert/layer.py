"""`convert_layer`: an `Attention` with fewer key/value heads."""

from qkv.convert.tensors import How, pool_heads
from qkv.layers import Attention


def convert_layer(layer: Attention, num_kv_heads: int, *, how: How = "mean", seed: int = 0) -> Attention:
    """A new layer that differs from ``layer`` in having ``num_kv_heads``, pooled as by `pool_heads`.

    Args:
        layer: left as it is; no parameter is shared.
        num_kv_heads: a divisor of those that it has.
        how, seed: as in `pool_heads`; keys and values draw different numbers.

    Raises:
        TypeError: for a layer of another kind.
        ValueError: as `pool_heads`.

    Example:
        >>> import qkv
        >>> from qkv.convert import convert_layer
        >>> convert_layer(qkv.MultiHeadAttention(64, 8), 2).num_kv_heads
        2
    """
    if not isinstance(layer, Attention):
        raise TypeError(
            f"convert_layer: layer must be a qkv.Attention; got {type(layer).__name__}. "
            "Of an nn.MultiheadAttention, qkv.MultiHeadAttention.from_torch makes one."
        )
    weight = layer.q_proj.weight
    state = layer.state_dict()
    for number, name in enumerate(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
        if name in state:
            state[name] = pool_heads(state[name], layer.num_kv_heads, num_kv_heads, how=how, seed=seed + number)
    new = Attention(
        layer.embed_dim,
        layer.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim,
        context_dim=layer.context_dim,
        mask=layer.mask,
        rotary=layer.rotary,
        qk_norm=layer.q_norm is not None,
        bias=layer.q_proj.bias is not None,
        out_bias=layer.out_proj.bias is not None,
        scale=layer.scale,
        softcap=layer.softcap,
        sink_logits=layer.sink_logits is not None,
        alibi=layer.alibi,
        dropout=layer.dropout,
        backend=layer.backend,
        device=weight.device,
        dtype=weight.dtype,
    )
    new.load_state_dict(state)
    return new.train(layer.training)
