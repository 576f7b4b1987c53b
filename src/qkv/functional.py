"""`attention`, `attention_with_lse`, `attention_weights`, `merge` and `explain`: validate, choose a backend, run it."""

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from qkv import backends
from qkv.backends import native
from qkv.backends.nonfinite import add_visible_nonfinite, zero_nonfinite
from qkv.backends.reference import weights_and_lse
from qkv.backends.result import Result
from qkv.masks import FULL, Mask
from qkv.pages import Pages
from qkv.partial import Partial, merge_stacked
from qkv.problem import make_problem
from qkv.scores import Draw, ScoreOptions, only_scale


class Options(ScoreOptions, total=False):
    """The keywords that `attention`, `attention_with_lse`, `attention_weights` and `explain` share."""

    k_scale: Tensor | None
    v_scale: Tensor | None
    pages: Pages | None
    mask: Mask | None
    offset: int | Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pages: Pages | None = None,
    mask: Mask | None = None,
    offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sink_logits: Tensor | None = None,
    dropout: float = 0.0,
    draw: Draw | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention, ``softmax(scale * q @ k.mT + bias, where the mask allows) @ v``.

    Query head ``h`` reads key/value head ``h // (H / Hkv)``: Hkv = H is multi-head, 1 < Hkv < H grouped-query and
    Hkv = 1 multi-query attention. Keys and values are never copied for their group.

    Args:
        q: ``(B, H, Lq, D)``; fp32, bf16, fp16 or fp64, any strides.
        k: ``(B, Hkv, Lk, D)``, where Hkv divides H.
        v: ``(B, Hkv, Lk, Dv)``; Dv may differ from D.
        k_scale, v_scale: ``(B, Hkv, Lk)``, fp32, for keys and values in int8: key j is ``k_scale[j] * k[j]``. Made by
            `qkv.cache.quantize` and by caches in int8.
        pages: where the keys of each row lie, if k and v are pages of a pool, ``(pages, Hkv, page_size, D or Dv)``, as
            `PagedKVCache` returns them; their scales are ``(pages, Hkv, page_size)`` then. The kernel reads pages in
            place; other backends, and gradients, gather them.
        mask: which keys a query may see; all if None.
        offset: position of the first query among the keys: an int, or integer ``(B,)`` for rows of different lengths,
            where query i of row b has position ``i + offset[b]``. It may be negative. Keys past the end of a row are
            hidden by a causal mask, or by ``Mask.padding(lengths)``. Required if the mask or ``alibi`` depends on
            positions and Lq differs from Lk; 0 if they are equal. Caches return it.
        scale: factor of the scores, ``1 / sqrt(D)`` if None.
        softcap: replaces a score s by ``softcap * tanh(s / softcap)``.
        bias: added to the scores after softcap, broadcastable to ``(B, H, Lq, Lk)``, differentiable.
        alibi: ``(H,)`` slopes; adds ``-slope * |i + offset - j|``, with the offset of the row.
        sink_logits: ``(H,)``, a learned logit per head that is added to the softmax normaliser of each row, so that the
            weights of a row sum to less than 1.
        dropout: probability with which a weight is zeroed; the others are scaled by ``1 / (1 - dropout)``.
        draw: which weights that are, so that calls with some of the heads or tokens each drop what one call would, as
            those of several processes; drawn from torch's generator if None.
        backend: ``"auto"``, or a name, which is used without fallback. See `explain`.

    Returns:
        ``(B, H, Lq, Dv)`` in the dtype of q. A query that sees no key gets 0, and gradient 0. Masked keys have
        exactly no influence, even if they contain NaN or inf; on a GPU, only keys that are hidden by padding or outside
        of the interval of every query.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for shapes, dtypes, devices and numbers that do not fit together, for a positional mask with
            Lq != Lk and no offset, and for offsets outside of +-2**30 in a tensor or outside of a documents mask. (On a
            GPU, and in compiled programs without the native backend, such numbers are not read: a query outside of
            a documents mask then sees no key.)
        BackendError: if ``backend`` cannot solve the problem.

    Example:
        >>> import torch, qkv
        >>> q, k, v = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 7, 64), torch.randn(2, 2, 7, 32)
        >>> qkv.attention(q, k, v, mask=qkv.Mask.causal(), offset=2).shape
        torch.Size([2, 8, 5, 32])
        >>> rows = qkv.attention(q, k, v, mask=qkv.Mask.causal(), offset=torch.tensor([2, 0]))
        >>> torch.equal(rows[1:], qkv.attention(q[1:], k[1:], v[1:], mask=qkv.Mask.causal(), offset=0))
        True

    Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 for groups; Gemma 2 for softcap; Press et al. 2022
    for ALiBi; gpt-oss for sink logits. Matches torch's ``scaled_dot_product_attention``, which aligns causal masks
    top-left whatever the lengths, and in offsets by row flash-attn's ``cache_seqlens``.
    """
    mask = FULL if mask is None else mask
    if backend == "auto" and only_scale(softcap, bias, alibi, sink_logits, dropout, draw):
        out = native.fast_path(q, k, v, k_scale, v_scale, mask, offset, scale, pages)
        if out is not None:
            return out
    scores: ScoreOptions = {
        "scale": scale,
        "softcap": softcap,
        "bias": bias,
        "alibi": alibi,
        "sink_logits": sink_logits,
        "dropout": dropout,
        "draw": draw,
    }
    problem = make_problem(
        "attention", q, k, v, k_scale=k_scale, v_scale=v_scale, pages=pages, mask=mask, offset=offset, **scores
    )
    return backends.solve("attention", problem, backend).out


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Unpack[Options]
) -> Partial:
    """`attention` and the log-sum-exp of each row, with which `merge` combines results over pieces of the keys.

    Args:
        q, k, v, backend: as in `attention`.
        **options: the keywords of `attention`.

    Returns:
        ``out`` as `attention` returns it, and ``lse (B, H, Lq)``, ``log(sum(exp(scores)))`` over the visible keys and
        the sink logit, -inf for a row that sees no key; fp32, or fp64 for fp64. Both are differentiable.

    Raises:
        As `attention`.

    Example:
        >>> import torch, qkv
        >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)
        >>> qkv.attention_with_lse(q, k, k).lse.shape
        torch.Size([1, 2, 3])

    Source: FlashAttention (Dao et al. 2022), section 3.1, whose backward pass keeps it; ``softmax_lse`` of flash-attn.
    """
    return attend("attention_with_lse", q, k, v, backend=backend, **options)


def attend(
    caller: str, q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Unpack[Options]
) -> Partial:
    """`attention_with_lse` for a public function ``caller``, which error messages name."""
    problem = make_problem(caller, q, k, v, wants_lse=True, **options)
    out, lse = backends.solve(caller, problem, backend)
    assert lse is not None
    return Partial(out, lse)


def attention_weights(q: Tensor, k: Tensor, **options: Unpack[Options]) -> Tensor:
    """The weights with which `attention` sums the values, as a dense tensor: for inspection, not for speed.

    ``exp(scores - lse)``, with the scores of `attention` and the lse of `attention_with_lse`.

    Args:
        q, k: as in `attention`.
        **options: the keywords of `attention` except ``backend``; ``dropout`` has no effect.

    Returns:
        ``(B, H, Lq, Lk)`` in the dtype of q. Each row sums to 1; to less with ``sink_logits``; to 0 where the query
        sees no key.

    Raises:
        As `attention`.

    Example:
        >>> import torch, qkv
        >>> q = torch.zeros(1, 1, 3, 8)
        >>> qkv.attention_weights(q, q, mask=qkv.Mask.causal())[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    options["v_scale"] = options.get("k_scale")
    problem = make_problem("attention_weights", q, k, k, **options).gathered().dequantized()
    clean, nonfinite = zero_nonfinite(problem._replace(v=problem.v[..., :0]))
    weights, _ = weights_and_lse(clean)
    if nonfinite is not None and nonfinite.lse is not None:
        nonfinite = nonfinite._replace(out=nonfinite.lse[..., None])
    return add_visible_nonfinite(Result(weights, None), nonfinite).out.to(problem.q.dtype)


def merge(partials: Iterable[tuple[Tensor, Tensor]]) -> Partial:
    """Attention over all keys from results over disjoint pieces of them, ``sum_i exp(lse_i - lse) * out_i``.

    Args:
        partials: the ``(out, lse)`` of the same queries over disjoint pieces of the keys, as `attention_with_lse`
            returns them. Sink logits must be passed for one piece only.

    Returns:
        ``out`` in the dtype of the first piece, and the ``lse`` over all keys. Both are differentiable.

    Raises:
        TypeError: for anything but pairs of tensors.
        ValueError: for no pieces, or pieces of different shapes or devices.

    Example:
        >>> import torch, qkv
        >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8)
        >>> halves = [qkv.attention_with_lse(q, part, part) for part in k.chunk(2, dim=2)]
        >>> torch.allclose(qkv.merge(halves).out, qkv.attention(q, k, k), atol=1e-6)
        True

    Source: FlashAttention-2, section 3.1; Flash-Decoding.
    """
    if not isinstance(partials, Iterable) or isinstance(partials, (Tensor, Partial)):
        raise TypeError(f"merge: partials must be an iterable of (out, lse) pairs; got {type(partials).__name__}.")
    partials = list(partials)
    if not partials:
        raise ValueError("merge: partials must contain at least one (out, lse) pair; got none.")
    for pair in partials:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            raise TypeError(f"merge: each of partials must be a pair of tensors (out, lse); got {type(pair).__name__}.")
        out, lse = pair
        if out.dim() != 4 or out.shape != partials[0][0].shape or lse.shape != out.shape[:3]:
            raise ValueError(
                "merge: every out must have the same shape (B, H, Lq, Dv) and every lse be (B, H, Lq); "
                f"got out {tuple(out.shape)} with lse {tuple(lse.shape)}, "
                f"the first out {tuple(partials[0][0].shape)}."
            )
    outs, lses = zip(*partials, strict=True)
    devices = {part.device for part in (*outs, *lses)}
    if len(devices) > 1:
        raise ValueError(f"merge: all partials must be on one device; got {', '.join(sorted(map(str, devices)))}.")
    out, lse = merge_stacked(torch.stack(outs), torch.stack(lses))
    return Partial(out.to(outs[0].dtype), lse)


def explain(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> backends.Explanation:
    """The backend that `attention` would choose for this call, and every reason against the others.

    Args:
        q, k, v: as in `attention`.
        **options: the keywords of `attention`.

    Returns:
        ``chosen``, a name, and ``reasons``, a list for each backend. ``str()`` of it is a table.

    Raises:
        As `attention`, except BackendError.

    Example:
        >>> import torch, qkv
        >>> q = torch.randn(1, 2, 64, 8, dtype=torch.float64)
        >>> print(qkv.explain(q, q, q, softcap=30.0, dropout=0.1))
        native     the kernel has no fp64
        sdpa       scaled_dot_product_attention has no softcap
        flex       FlexAttention has no dropout; FlexAttention runs uncompiled on cpu, with all scores in memory
        reference  chosen
    """
    return backends.explain(make_problem("explain", q, k, v, **options))
