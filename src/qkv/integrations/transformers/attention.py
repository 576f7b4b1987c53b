"""`register`: qkv as an attention implementation of transformers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qkv import backends, kernels
from qkv.functional import attention, attention_weights, attention_with_lse
from qkv.integrations import calls
from qkv.integrations.transformers.lazy_tensor import Int8Tensor, LatentTensor
from qkv.integrations.transformers.masks import MaskTensor, make_mask
from qkv.integrations.transformers.over_ranks import ConvertedMask, attend_over_ranks
from qkv.masks import FULL, Mask
from qkv.parallel.context import layout_of
from qkv.scores import ScoreOptions

NAME = "qkv"


def register(*, cache: bool | torch.dtype | Literal["int8"] | None = None) -> None:
    """Registers ``attn_implementation="qkv"`` with transformers: attention, masks, and `QKVCache` as the default cache.

    Then ``from_pretrained(..., attn_implementation="qkv")`` or ``model.set_attn_implementation("qkv")`` runs a model on
    `qkv.attention`. Mask functions of transformers are converted to a `Mask` instead of a dense tensor; unknown ones
    are evaluated to a dense mask. Keys and values are not repeated for groups.

    Such a model makes a `QKVCache` where transformers would make a ``DynamicCache`` for it, in ``generate`` and in a
    plain call with ``use_cache``. A cache that you pass is used as it is, as is any ``cache_implementation`` that you
    ask for; ``cache_implementation="qkv"`` gives ours to a model on another attention. Layers of a cache that have no
    equivalent of ours (linear attention, indexers) stay transformers' own. Other models see no difference.

    Args:
        cache: True for `QKVCache` as the default of models on "qkv", ``torch.int8`` or ``"int8"`` for one in int8,
            False for transformers' own. None keeps what was chosen before, at first True.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: for any other ``cache``.

    Example:
        >>> import qkv
        >>> qkv.register()  # doctest: +SKIP
        >>> model.set_attn_implementation("qkv")  # doctest: +SKIP
    """
    if not (cache is None or isinstance(cache, bool) or cache in (torch.int8, "int8")):
        raise ValueError(f'register: cache must be True, False, torch.int8, "int8" or None; got {cache!r}.')
    from transformers import AttentionInterface, AttentionMaskInterface

    from qkv.integrations.transformers import default_cache

    if isinstance(AttentionInterface._global_mapping, _Unregistered):
        AttentionInterface._global_mapping = dict(AttentionInterface._global_mapping)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    default_cache.install(cache)


def unregister() -> None:
    """Takes back `register`: transformers is as it was before.

    Models that still run on "qkv" raise a RuntimeError at their next call: set another implementation first, or call
    ``qkv.accelerate(model, enabled=False)``. Caches that were made stay usable. Without it, transformers looks up the
    attention of others as before, and makes their caches by one more function, until the process ends; what another
    library has put over that function since stays.

    Raises:
        ModuleNotFoundError: if transformers is not installed.

    Example:
        >>> import qkv
        >>> model.set_attn_implementation("sdpa")  # doctest: +SKIP
        >>> qkv.unregister()  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from qkv.integrations.transformers import default_cache

    AttentionMaskInterface._global_mapping.pop(NAME, None)
    if AttentionInterface._global_mapping.pop(NAME, None) is not None:
        AttentionInterface._global_mapping = _Unregistered(AttentionInterface._global_mapping)
    default_cache.uninstall()


class _Unregistered(dict[str, Any]):
    """transformers' attention functions, without ours; says so to a model that still asks for it."""

    def __missing__(self, name: str) -> Any:
        if name != NAME:
            raise KeyError(name)
        raise RuntimeError(
            f'attn_implementation="{NAME}": qkv must be registered; it was taken back by qkv.unregister(). Call '
            "qkv.register(), or take the model back: qkv.accelerate(model, enabled=False), or "
            'model.set_attn_implementation("sdpa").'
        )


Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Mask | None]
"""Called with a module, queries, keys, values, and the other arguments of `attention`; may return another mask."""

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Has an observer told of all calls of this thread or task, of modules that are called by their forward."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' models call: `compute_attention`, counted for reports.

    Programs that a compiler or tracer makes of it count nothing.
    """
    if kernels.is_tracing():
        return compute_attention(module, query, key, value, attention_mask, *args, **options)
    observer = _observer.get()
    if observer is not None:
        options["observer"] = observer
    backends.last.choice, backends.last.reasons = None, []
    result = compute_attention(module, query, key, value, attention_mask, *args, **options)
    reason = "; ".join(backends.last.reasons) or None
    calls.tally(module, type(module).__name__, calls.answer(reason), query.shape, key.shape)
    notify = calls.current_callback()
    if notify is not None and not isinstance(notify, calls.TallyFor):
        notify(sys._getframe(1), query.shape, key.shape, reason)
    return result


def compute_attention(
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
    observer: "Observer | None" = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by `qkv.attention`, with the arguments and results of transformers' attention functions.

    Args:
        module: the calling layer.
        query: ``(B, H, Lq, D)``, or ``(1, H, Lq, D)``, which is expanded to the batch.
        key, value: ``(B, Hkv, Lk, D)`` and ``(B, Hkv, Lk, Dv)``.
        attention_mask: from `make_mask`, or a boolean or additive mask.
        dropout, scaling, position_bias, softcap: as in transformers' implementations.
        is_causal: whether a missing mask means causal, aligned top-left, as in transformers' sdpa.
        s_aux: learned sink logits ``(H,)``.
        sinks: sink logits per query ``(B, H, Lq, 1)``.
        indices: ``(B, Lq, n)``: keys that a query may see, in addition to the mask.
        block_indices: ``(B, G, Lq, n)``: blocks of ``module.indexer.block_size`` keys that queries of each of G groups
            of heads may see; -1 for none.
        output_attentions: whether to return the weights, which requires materializing them.
        cache: transformers' paged cache, which is not supported.
        observer: told of the call as one of `attention`, before it is made; may change its mask.
        **ignored: arguments for other implementations (positions, window sizes already in the mask).

    Returns:
        ``(B, Lq, H, Dv)``, and the weights ``(B, H, Lq, Lk)`` or None.
    """
    if cache is not None:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} does not support transformers' paged cache (continuous batching); "
            f"got {type(cache).__name__}. Use generate, or another implementation."
        )
    batch, _, lk, _ = key.shape
    if query.shape[0] != batch:
        query = query.expand(batch, -1, -1, -1)
    converted = _convert_mask(attention_mask, query.shape[2], lk, is_causal)
    layout = layout_of(module)
    if layout is not None:
        given = {"position_bias": position_bias, "sinks": sinks, "indices": indices, "block_indices": block_indices}
        refused = [name for name, value in given.items() if value is not None]
        refused += ["output_attentions"] * bool(output_attentions) + ["observer"] * (observer is not None)
        scores: ScoreOptions = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux, "dropout": dropout}
        positions = ignored.get("position_ids")
        return attend_over_ranks(module, layout, (query, key, value), converted, positions, refused, scores)
    mask, bias = converted.mask, converted.bias
    if indices is not None:
        mask = mask & Mask.dense(_one_hot(indices, lk)[:, None])
    if block_indices is not None:
        size: int = module.indexer.block_size  # type: ignore[assignment, union-attr]
        keys = _one_hot(block_indices, -(-lk // size)).repeat_interleave(size, dim=-1)[..., :lk]
        mask = mask & Mask.dense(keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1))
    if position_bias is not None:
        bias = position_bias[..., :lk] if bias is None else bias + position_bias[..., :lk]
    options: dict[str, Any] = {
        "mask": mask,
        "offset": converted.offset,
        "scale": scaling,
        "softcap": softcap,
        "bias": bias,
        "sink_logits": s_aux,
    }
    if isinstance(key, LatentTensor) and isinstance(value, LatentTensor):
        if sinks is None and not output_attentions and observer is None:
            out = key.heads.attend(query, key.latents, dropout=dropout, **options)
            return out.transpose(1, 2).contiguous(), None
        key, value = key.heads.expand(key.latents)
    if isinstance(key, Int8Tensor) and isinstance(value, Int8Tensor):
        options |= {"k_scale": key.scale, "v_scale": value.scale}
        key, value = key.codes, value.codes
    if observer is not None:
        changed = observer(module, query, key, value, options if sinks is None else {**options, "sinks": sinks})
        options["mask"] = mask if changed is None else changed
    weights = attention_weights(query, key, **options) if output_attentions else None
    if sinks is None:
        out = attention(query, key, value, dropout=dropout, **options)
    else:
        out, lse = attention_with_lse(query, key, value, dropout=dropout, **options)
        kept = torch.sigmoid(lse[..., None] - sinks).to(out.dtype)
        out, weights = out * kept, None if weights is None else weights * kept
    return out.transpose(1, 2).contiguous(), weights


def _convert_mask(attention_mask: Tensor | None, lq: int, lk: int, is_causal: bool | None) -> ConvertedMask:
    """Converts transformers' ``attention_mask``; None means full, or causal if ``is_causal``."""
    if attention_mask is None:
        # As in eager, all keys are visible. `module.is_causal` does not count: some bidirectional layers set it.
        return ConvertedMask(Mask.causal() if is_causal and lq > 1 else FULL)
    if isinstance(attention_mask, MaskTensor):
        *_, rows, keys = attention_mask.shape
        if keys == lk and (rows == lq or (rows == 1 and not attention_mask.mask.is_positional)):
            return ConvertedMask(attention_mask.mask, attention_mask.offset)
    attention_mask = attention_mask[..., :lk]
    if attention_mask.dtype == torch.bool:
        return ConvertedMask(Mask.dense(attention_mask))
    # Additive masks hide keys by the dtype's minimum, possibly with a bias added to it.
    visible = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return ConvertedMask(Mask.dense(visible), bias=attention_mask.masked_fill(~visible, 0))


def _one_hot(indices: Tensor, size: int) -> Tensor:
    """A boolean tensor ``(..., size)`` that is True at the ``indices (..., n)``; -1 is ignored."""
    selected = indices.new_zeros((*indices.shape[:-1], size + 1), dtype=torch.bool)
    return selected.scatter(-1, indices.long().masked_fill(indices < 0, size), True)[..., :size]
