"""`register`: qkv as an attention implementation of transformers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv.functional import attention, attention_weights
from qkv.integrations.transformers_masks import MaskTensor, make_mask
from qkv.masks import FULL, Mask

NAME = "qkv"


def register() -> None:
    """Makes ``attn_implementation="qkv"`` known to transformers: the attention function and the mask function.

    Afterwards ``from_pretrained(..., attn_implementation="qkv")`` or ``model.set_attn_implementation("qkv")`` runs a
    model on `qkv.attention`. Masks that transformers would write out are recognised and passed on as a `Mask`;
    what is not recognised is honoured as a dense mask. Keys and values are never repeated for their group.

    Raises:
        ModuleNotFoundError: where transformers is not installed.

    Example:
        >>> from qkv.integrations import transformers as integration
        >>> integration.register()  # doctest: +SKIP
        >>> model.set_attn_implementation("qkv")  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


class _Visibility(NamedTuple):
    """What transformers' ``attention_mask`` says, in our words."""

    mask: Mask
    offset: int
    bias: Tensor | None


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
    output_attentions: bool | None = False,
    cache: object | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' models call.

    Args:
        module: the calling layer; its ``is_causal`` counts where no mask is given.
        query: ``(B, H, Lq, D)``.
        key, value: ``(B, Hkv, Lk, D)`` and ``(B, Hkv, Lk, Dv)``.
        attention_mask: from `make_mask`, or a boolean or additive mask of the caller's.
        dropout, scaling, is_causal, position_bias, softcap: as for transformers' own implementations.
        s_aux: learned sink logits ``(H,)``.
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
    seen = _visibility(module, query, key, attention_mask, is_causal, position_bias)
    options: dict[str, Any] = {
        "mask": seen.mask,
        "offset": seen.offset,
        "scale": scaling,
        "softcap": softcap,
        "bias": seen.bias,
        "sink_logits": s_aux,
    }
    out = attention(query, key, value, dropout=dropout, **options)
    weights = attention_weights(query, key, **options) if output_attentions else None
    return out.transpose(1, 2).contiguous(), weights


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
) -> _Visibility:
    lk = key.shape[2]
    if position_bias is not None:
        position_bias = position_bias[..., :lk]
    if attention_mask is None:
        # As transformers' sdpa: no mask means causal for causal modules, and aligned top-left, except in decoding.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return _Visibility(Mask.causal() if causal and query.shape[2] > 1 else FULL, 0, position_bias)
    if isinstance(attention_mask, MaskTensor):
        return _Visibility(attention_mask.mask, attention_mask.offset, position_bias)
    attention_mask = attention_mask[..., :lk]
    if attention_mask.dtype == torch.bool:
        return _Visibility(Mask.dense(attention_mask), 0, position_bias)
    return _Visibility(FULL, 0, attention_mask if position_bias is None else attention_mask + position_bias)
