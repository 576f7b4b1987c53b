"""`register`: qkv as an attention implementation of transformers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv.functional import attention, attention_weights, attention_with_lse
from qkv.integrations.transformers.lazy_tensor import Int8Tensor
from qkv.integrations.transformers.masks import MaskTensor, make_mask
from qkv.masks import FULL, Mask

NAME = "qkv"


def register(*, cache: bool | torch.dtype = False) -> None:
    """Makes ``attn_implementation="qkv"`` known to transformers: the attention function and the mask function.

    Afterwards ``from_pretrained(..., attn_implementation="qkv")`` or ``model.set_attn_implementation("qkv")`` runs a
    model on `qkv.attention`. Masks that transformers would write out are recognised and passed on as a `Mask`;
    what is not recognised is honoured as a dense mask. Keys and values are never repeated for their group.

    Args:
        cache: whether transformers' default cache, for all models from now on, shall be the one that appends without
            concatenating; ``torch.int8`` for the one in int8. False leaves it as it is: give single calls a
            ``past_key_values=QKVCache(model.config)`` of `qkv.integrations.transformers.cache`.

    Raises:
        ModuleNotFoundError: where transformers is not installed.
        ValueError: for another cache.

    Example:
        >>> from qkv.integrations.transformers import register
        >>> register()  # doctest: +SKIP
        >>> model.set_attn_implementation("qkv")  # doctest: +SKIP
    """
    if cache not in (False, True, torch.int8):
        raise ValueError(f"register: cache must be True, False or torch.int8; got {cache!r}.")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    if cache is not False:
        from qkv.integrations.transformers.cache import use_by_default

        use_by_default(None if cache is True else cache)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = False,
    cache: object | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' models call.

    Args:
        module: the calling layer.
        query: ``(B, H, Lq, D)``, or a batch of one for all.
        key, value: ``(B, Hkv, Lk, D)`` and ``(B, Hkv, Lk, Dv)``.
        attention_mask: from `make_mask`, or a boolean or additive mask of the caller's.
        dropout, scaling, position_bias, softcap: as for transformers' own implementations.
        is_causal: whether no mask means causal, aligned top-left, as it does to transformers' sdpa.
        s_aux: learned sink logits ``(H,)``.
        sinks: sink logits of each query ``(B, H, Lq, 1)``.
        indices: ``(B, Lq, n)``, the only keys that a query may see, on top of the mask.
        block_indices: ``(B, G, Lq, n)``, the only blocks of ``module.indexer.block_size`` keys that the queries of one
            of G groups of heads may see; -1 is no block.
        output_attentions: whether to return the weights as well, which costs writing them out.
        cache: transformers' paged cache, which is not supported.
        **ignored: what transformers passes for other implementations (positions, window sizes that the mask holds).

    Returns:
        ``(B, Lq, H, Dv)``, and the weights ``(B, H, Lq, Lk)`` or None.
    """
    if cache is not None:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} does not read transformers' paged cache (continuous batching); "
            f"use generate, or another implementation. Got {type(cache).__name__}."
        )
    batch, _, lk, _ = key.shape
    if query.shape[0] != batch:
        query = query.expand(batch, -1, -1, -1)
    seen = _visibility(attention_mask, query.shape[2], lk, is_causal)
    mask, bias = seen.mask, seen.bias
    if indices is not None:
        mask = mask & Mask.dense(_chosen(indices, lk)[:, None])
    if block_indices is not None:
        size: int = module.indexer.block_size  # type: ignore[assignment, union-attr]
        keys = _chosen(block_indices, -(-lk // size)).repeat_interleave(size, dim=-1)[..., :lk]
        mask = mask & Mask.dense(keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1))
    if position_bias is not None:
        bias = position_bias[..., :lk] if bias is None else bias + position_bias[..., :lk]
    options: dict[str, Any] = {
        "mask": mask,
        "offset": seen.offset,
        "scale": scaling,
        "softcap": softcap,
        "bias": bias,
        "sink_logits": s_aux,
    }
    if isinstance(key, Int8Tensor) and isinstance(value, Int8Tensor):
        options |= {"k_scale": key.scale, "v_scale": value.scale}
        key, value = key.codes, value.codes
    weights = attention_weights(query, key, **options) if output_attentions else None
    if sinks is None:
        out = attention(query, key, value, dropout=dropout, **options)
    else:
        out, lse = attention_with_lse(query, key, value, dropout=dropout, **options)
        kept = torch.sigmoid(lse[..., None] - sinks).to(out.dtype)
        out, weights = out * kept, None if weights is None else weights * kept
    return out.transpose(1, 2).contiguous(), weights


class _Visibility(NamedTuple):
    """What transformers' ``attention_mask`` says, in our words."""

    mask: Mask
    offset: int = 0
    bias: Tensor | None = None


def _visibility(attention_mask: Tensor | None, lq: int, lk: int, is_causal: bool | None) -> _Visibility:
    if attention_mask is None:
        # As eager: without a mask all is seen. `module.is_causal` is no sign, since some layers that see all carry it.
        return _Visibility(Mask.causal() if is_causal and lq > 1 else FULL)
    if isinstance(attention_mask, MaskTensor):
        *_, rows, keys = attention_mask.shape
        if keys == lk and (rows == lq or (rows == 1 and not attention_mask.mask.is_positional)):
            return _Visibility(attention_mask.mask, attention_mask.offset)
    attention_mask = attention_mask[..., :lk]
    if attention_mask.dtype == torch.bool:
        return _Visibility(Mask.dense(attention_mask))
    # The least number stands for hidden, up to what was added to it.
    seen = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return _Visibility(Mask.dense(seen), bias=attention_mask.masked_fill(~seen, 0))


def _chosen(indices: Tensor, size: int) -> Tensor:
    """Which of ``size`` places the last dimension of ``indices`` names; -1 names none."""
    chosen = indices.new_zeros((*indices.shape[:-1], size + 1), dtype=torch.bool)
    return chosen.scatter(-1, indices.long().masked_fill(indices < 0, size), True)[..., :size]
