"""Wrong calls: the message names the argument, what was required, what was given and what to do."""

import re
from collections.abc import Callable

import pytest
import torch

import qkv
from qkv import Mask

Q, K, V = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
X, CONTEXT = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
BOOLEAN = torch.ones(5, 7, dtype=torch.bool)

ATTENTION = [
    (lambda: qkv.attention(Q[0], K, V), ValueError, "4 dimensions (batch, heads, length, width); got shapes (6, 5, 8)"),
    (lambda: qkv.attention(Q.tolist(), K, V), TypeError, "q, k and v must be tensors; got list, Tensor, Tensor"),
    (
        lambda: qkv.attention(Q[:, :4], K, V),
        ValueError,
        "heads of q must be a multiple of that of k and v; got 4 and 3",
    ),
    (lambda: qkv.attention(Q[:1], K, V), ValueError, "must have the same batch; got 1, 2 and 2. Expand"),
    (lambda: qkv.attention(Q, K, V[:1]), ValueError, "must have the same batch; got 2, 2 and 1"),
    (lambda: qkv.attention(Q, K[..., :6], V), ValueError, "q and k must have the same width; got 8 and 6"),
    (
        lambda: qkv.attention(Q, K, V[:, :, :6]),
        ValueError,
        "k and v must have the same heads and length; got 3 and 3 heads, lengths 7 and 6",
    ),
    (
        lambda: qkv.attention(Q, K, V[:, :1]),
        ValueError,
        "k and v must have the same heads and length; got 3 and 1 heads, lengths 7 and 7",
    ),
    (lambda: qkv.attention(Q, K.double(), V), ValueError, "torch.float32, torch.float64 and torch.float32"),
    (
        lambda: qkv.attention(Q.int(), K.int(), V.int()),
        ValueError,
        "one of float32, bfloat16, float16, float64; got torch.int32",
    ),
    (
        lambda: qkv.attention(Q.to_sparse(), K, V),
        TypeError,
        "q must be a strided tensor; got torch.sparse_coo. Use q.to_",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.dense(BOOLEAN.to_sparse())),
        TypeError,
        "mask's dense allow must be a strided tensor; got torch.sparse_coo",
    ),
    (lambda: qkv.attention(Q, K, V, bias=torch.ones(5, 7).to_sparse()), TypeError, "bias must be a strided tensor"),
    (
        lambda: qkv.attention(Q, K, V, offset=2**64),
        ValueError,
        "offset must be between -2**62 and 2**62; got 1844",
    ),
    (
        lambda: qkv.attention_with_lse(Q, K, V, sofcap=1),
        TypeError,
        "attention_with_lse() got an unexpected keyword argument",
    ),
    (lambda: qkv.attention_weights(Q, K, backend="auto"), TypeError, "attention_weights() got an unexpected keyword"),
    (
        lambda: qkv.merge([(Q[0, 0, 0, 0], Q[0, 0, 0, 0])]),
        ValueError,
        "every out must have the same shape (B, H, Lq, Dv)",
    ),
    (
        lambda: qkv.merge([(Q, Q[..., 0]), (Q.to("meta"), Q[..., 0])]),
        ValueError,
        "all partials must be on one device; got cpu, meta",
    ),
    (lambda: qkv.attention(Q, K.to("meta"), V), ValueError, "same device; got cpu, meta and cpu"),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.causal()),
        ValueError,
        "Mask.causal() depends on the positions of queries, so 5 queries with 7 keys need an offset; "
        "got None. offset=0 aligns the first query with the first key (top-left: torch's is_causal); "
        "offset=2 aligns the last query with the last key (bottom-right: flash-attn, decoding).",
    ),
    (
        lambda: qkv.attention(Q, K, V, alibi=torch.ones(6)),
        ValueError,
        "alibi depends on the positions of queries, so 5 queries",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.causal(), offset=2.0),
        TypeError,
        "offset must be an int, the position of the first query, or an integer tensor (B,), that of each row of the "
        "batch; got 2.0",
    ),
    *(
        (
            lambda offset=offset: qkv.attention(Q, K, V, mask=Mask.causal(), offset=offset),
            TypeError,
            f"or an integer tensor (B,), that of each row of the batch; got {got}",
        )
        for offset, got in (
            (torch.zeros(2), "torch.float32 of shape (2,)"),
            (torch.zeros(2, requires_grad=True), "torch.float32 of shape (2,)"),
            (torch.zeros(2, dtype=torch.complex64), "torch.complex64 of shape (2,)"),
            (torch.ones(2, dtype=torch.bool), "torch.bool of shape (2,)"),
            (True, "True"),
            ([0, 1], "[0, 1]"),
        )
    ),
    *(
        (
            lambda offset=offset: qkv.attention(Q, K, V, mask=Mask.causal(), offset=offset),
            ValueError,
            f"offset must have shape (2,), a position for each row of the batch; got shape {got}. For the same position "
            "in all rows, pass an int.",
        )
        for offset, got in (
            (torch.tensor(3), "()"),
            (torch.tensor([3]), "(1,)"),
            (torch.tensor([3, 3, 3]), "(3,)"),
            (torch.tensor([[3, 3]]), "(1, 2)"),
        )
    ),
    (
        lambda: qkv.attention(Q, K, V, offset=torch.zeros(2, dtype=int).to_sparse()),
        TypeError,
        "offset must be a strided tensor; got torch.sparse_coo",
    ),
    (
        lambda: qkv.attention(Q, K, V, offset=torch.zeros(2, dtype=int, device="meta")),
        ValueError,
        "offset must be on the device of q; got meta and cpu",
    ),
    (
        lambda: qkv.attention(Q, K, V, offset=torch.tensor([2**30, -1])),
        ValueError,
        "offset must be between -2**30 and 2**30 in each row; got -1 to 1073741824",
    ),
    *(
        (
            lambda offset=offset: qkv.attention(
                Q, K, V, mask=Mask.documents(torch.zeros(2, 7, dtype=int)), offset=torch.tensor(offset)
            ),
            ValueError,
            f"documents mask of 7 positions must cover the queries; got offset={got} and 5 queries",
        )
        for offset, got in (([2, -1], "-1 to 2"), ([3, 0], "0 to 3"))
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=BOOLEAN),
        TypeError,
        "mask must be a qkv.Mask; got Tensor. Use Mask.dense(allow)",
    ),
    (lambda: qkv.attention(Q, K, V, mask="causal"), TypeError, "mask must be a qkv.Mask; got str. Use Mask.causal()"),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.dense(BOOLEAN[:, :6])),
        ValueError,
        "mask's dense allow must fit (2, 6, 5, 7); got shape (1, 1, 5, 6)",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.padding(BOOLEAN[:2, :6])),
        ValueError,
        "mask's padding keep must fit (2, 7); got shape (2, 6)",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.padding(torch.ones(3, dtype=int))),
        ValueError,
        "mask's padding lengths must fit (2,); got shape (3,)",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.documents(torch.zeros(2, 5, dtype=int)), offset=0),
        ValueError,
        "mask's documents ids must fit (2, 7); got shape (2, 5)",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.documents(torch.zeros(2, 7, dtype=int)), offset=4),
        ValueError,
        "documents mask of 7 positions must cover the queries; got offset=4 and 5 queries",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.global_tokens(torch.zeros(2, 7, dtype=bool)), offset=4),
        ValueError,
        "global_tokens mask of 7 positions must cover the queries; got offset=4 and 5 queries",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.prefix(torch.tensor([1, 2, 3])), offset=2),
        ValueError,
        "mask's prefix lengths must fit (2,); got shape (3,)",
    ),
    (
        lambda: qkv.attention(Q, K, V, mask=Mask.padding(torch.ones(2, 7, dtype=torch.bool, device="meta"))),
        ValueError,
        "mask is on meta, q on cpu; use mask.to('cpu')",
    ),
    (
        lambda: qkv.attention(Q, K, V, bias=torch.ones(5, 6)),
        ValueError,
        "bias must broadcast to (2, 6, 5, 7); got shape (5, 6)",
    ),
    (
        lambda: qkv.attention(Q, K, V, bias=BOOLEAN),
        TypeError,
        "bias must be a floating-point tensor, added to the scores; got torch.bool",
    ),
    (
        lambda: qkv.attention(Q, K, V, bias=torch.ones(5, 7, device="meta")),
        ValueError,
        "bias must be on the device of q; got meta and cpu",
    ),
    (
        lambda: qkv.attention(Q, K, V, sink_logits=torch.ones(3)),
        ValueError,
        "sink_logits must be floating-point of shape (6,), one per query head; got torch.float32 (3,)",
    ),
    (
        lambda: qkv.attention(Q, K, V, sink_logits=0.5),
        ValueError,
        "sink_logits must be floating-point of shape (6,), one per query head; got 0.5",
    ),
    (
        lambda: qkv.attention(Q, K, V, alibi=torch.ones(6, device="meta"), offset=0),
        ValueError,
        "alibi must be on the device of q; got meta and cpu",
    ),
    (
        lambda: qkv.attention(Q, K, V, dropout=torch.tensor([0.1, 0.2])),
        TypeError,
        "attention: dropout must be a probability in [0, 1); got a tensor of shape (2,)",
    ),
    (lambda: qkv.attention(Q, K, V, softcap=0.0), ValueError, "softcap must be a positive number or None; got 0.0"),
    (
        lambda: qkv.attention(Q[..., :0], K[..., :0], V),
        ValueError,
        "attention: heads of width 0 have no default scale, 1 / sqrt(width); pass scale.",
    ),
    (
        lambda: qkv.attention(Q, K, V, scale=torch.tensor(0.5, requires_grad=True)),
        TypeError,
        "attention: scale must be a number; got a tensor. For a learned scale, multiply q by it and pass scale=1.0.",
    ),
    (
        lambda: qkv.attention(Q, K, V, scale="0.5"),
        TypeError,
        "attention: scale must be a finite number, or None for 1 / sqrt(width); got '0.5'",
    ),
    (
        lambda: qkv.attention(Q, K, V, softcap=torch.tensor([30.0])),
        TypeError,
        "attention: softcap must be a positive number or None; got a tensor of shape (1,)",
    ),
    (lambda: qkv.attention(Q, K, V, dropout=None), TypeError, "dropout must be a probability in [0, 1); got None"),
    (lambda: qkv.attention(Q, K, V, dropout=1.0), ValueError, "dropout must be a probability in [0, 1); got 1.0"),
    (lambda: qkv.attention_with_lse(Q[0], K, V), ValueError, "attention_with_lse: q, k and v must have 4 dimensions"),
    (lambda: qkv.attention_weights(Q[0], K), ValueError, "attention_weights: q, k and v must have 4 dimensions"),
    (lambda: qkv.explain(Q[0], K, V), ValueError, "explain: q, k and v must have 4 dimensions"),
    (lambda: qkv.merge(None), TypeError, "merge: partials must be an iterable of (out, lse) pairs; got NoneType"),
    (
        lambda: qkv.merge(qkv.attention_with_lse(Q, K, V)),
        TypeError,
        "merge: partials must be an iterable of (out, lse) pairs; got Partial",
    ),
    (lambda: qkv.merge([Q, Q]), TypeError, "each of partials must be a pair of tensors (out, lse); got Tensor"),
    (lambda: qkv.merge([(Q, None)]), TypeError, "each of partials must be a pair of tensors (out, lse); got tuple"),
    (lambda: qkv.merge([]), ValueError, "partials must contain at least one (out, lse) pair; got none"),
    (
        lambda: qkv.merge([(Q, Q[..., 0]), (K, K[..., 0])]),
        ValueError,
        "got out (2, 3, 7, 8) with lse (2, 3, 7), the first out (2, 6, 5, 8)",
    ),
]

MASKS = [
    (lambda: Mask.padding([3, 5]), TypeError, "Mask.padding: keep must be a tensor; got list"),
    (lambda: Mask.documents([[0, 1]]), TypeError, "Mask.documents: ids must be a tensor; got list"),
    (lambda: Mask.dense(None), TypeError, "Mask.dense: allow must be a tensor; got NoneType"),
    (
        lambda: Mask.causal() & BOOLEAN,
        TypeError,
        "Mask.causal() & Tensor: both must be a qkv.Mask. Use Mask.dense(allow).",
    ),
    (lambda: Mask.causal() & None, TypeError, "& NoneType: both must be a qkv.Mask. Use Mask.causal(), Mask.padding"),
]

LAYERS = [
    (
        lambda: qkv.Attention(24, 6, num_kv_heads=4),
        ValueError,
        "Attention: num_heads must be a multiple of num_kv_heads, both at least 1; got num_heads=6 and num_kv_heads=4",
    ),
    (
        lambda: qkv.GroupedQueryAttention(24, 6, 0),
        ValueError,
        "GroupedQueryAttention: num_heads must be a multiple of num_kv_heads, both at least 1; got num_heads=6 and num_kv_heads=0",
    ),
    (
        lambda: qkv.CausalAttention(25, 6),
        ValueError,
        "CausalAttention: embed_dim must be a multiple of num_heads unless head_dim is given; got embed_dim=25 and num_heads=6",
    ),
    (
        lambda: qkv.MultiHeadAttention(24, 6, dropout=1.5),
        ValueError,
        "dropout must be a probability in [0, 1); got 1.5",
    ),
    (
        lambda: qkv.CrossAttention(24, 6, rotary=qkv.RotaryEmbedding(4)),
        ValueError,
        "rotary has no meaning between two sequences",
    ),
    (lambda: qkv.Attention(24, 6, rotary=qkv.RotaryEmbedding(8)), ValueError, "rotary must be for head_dim=4; got 8"),
    (lambda: qkv.SlidingWindowAttention(24, 6, 5), ValueError, "Mask.sliding: window must be even"),
    (lambda: qkv.SlidingWindowAttention(24, 6, 0, causal=True), ValueError, "Mask.causal: window must be at least 1"),
    (lambda: qkv.RotaryEmbedding(8, rotary_dim=3), ValueError, "rotary_dim must be even and at most head_dim=8; got 3"),
    (
        lambda: qkv.RotaryEmbedding(8, rotary_dim=10),
        ValueError,
        "rotary_dim must be even and at most head_dim=8; got 10",
    ),
    (
        lambda: qkv.RotaryEmbedding(8, frequencies=torch.ones(3)),
        ValueError,
        "frequencies must be floating-point of shape (4,), one per pair of channels; got torch.float32 (3,)",
    ),
    (lambda: qkv.RotaryEmbedding(8)(torch.ones(1, 1, 2, 6)), ValueError, "x must have width 8; got shape (1, 1, 2, 6)"),
    (lambda: qkv.Attention(24, 6)(X[0]), ValueError, "Attention: x must be (B, L, 24); got shape (5, 24)"),
    (lambda: qkv.Attention(24, 6)(CONTEXT), ValueError, "Attention: x must be (B, L, 24); got shape (2, 7, 10)"),
    (
        lambda: qkv.CausalAttention(24, 6)(X, X),
        ValueError,
        "CausalAttention: context must be None in self-attention; got one of shape (2, 5, 24)",
    ),
    (
        lambda: qkv.CrossAttention(24, 6)(X),
        ValueError,
        "context must be (B, Lk, 24) unless a cache contains it; got None",
    ),
    (lambda: qkv.CrossAttention(24, 6)(X, cache=qkv.CrossKVCache()), ValueError, "context must be (B, Lk, 24) unless"),
    (lambda: qkv.CrossAttention(24, 6)(X, CONTEXT), ValueError, "context must be (2, Lk, 24); got shape (2, 7, 10)"),
    (lambda: qkv.CrossAttention(24, 6)(X, X[:1]), ValueError, "context must be (2, Lk, 24); got shape (1, 5, 24)"),
    (
        lambda: qkv.CrossAttention(24, 6)(X, X, cache=qkv.KVCache()),
        TypeError,
        "cache must be a CrossKVCache in cross-attention; got KVCache",
    ),
    (
        lambda: qkv.CausalAttention(24, 6)(X, cache=qkv.CrossKVCache()),
        TypeError,
        "cache must be a KVCache, PagedKVCache, Int8KVCache or SlidingKVCache in self-attention; got CrossKVCache",
    ),
    (
        lambda: qkv.CausalAttention(24, 6)(X, cache=qkv.SlidingKVCache(4)),
        ValueError,
        "SlidingKVCache(window=4, sink_tokens=0) drops keys that Mask.causal() shows. Use Mask.causal(window=4, sink_tokens=0), or a KVCache",
    ),
    (
        lambda: qkv.SlidingWindowAttention(24, 6, 5, causal=True)(X, cache=qkv.SlidingKVCache(4)),
        ValueError,
        "drops keys that Mask.causal(window=5) shows",
    ),
]

K1 = torch.randn(2, 3, 1, 8)


@pytest.mark.parametrize("kind", [qkv.KVCache, qkv.Int8KVCache])
def test_a_refused_select_or_crop_changes_no_cache(kind: type[qkv.KVCache] | type[qkv.Int8KVCache]) -> None:
    cache, k = kind(), torch.randn(2, 2, 5, 8)
    before = [x.clone() for x in cache.append(k, k) if isinstance(x, torch.Tensor)]
    for wrong in ([0], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0, 2]), torch.tensor([-1])):
        with pytest.raises(
            ValueError, match="rows of select must be a 1-dimensional tensor of integers from 0 to 1; got"
        ):
            cache.select(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"length of crop must be an int, or integers \(B,\); got 2\.5"):
        cache.crop(2.5)  # type: ignore[arg-type]
    for length in (-1, 6):
        with pytest.raises(
            ValueError, match=f"length of crop must be between 0 and 5, the tokens in the cache; got {length}"
        ):
            cache.crop(length)
    assert cache.length == 5
    after = [x for x in cache.append(k[:, :, :0], k[:, :, :0]) if isinstance(x, torch.Tensor)]
    assert all(map(torch.equal, before, after))


def second_append(cache: qkv.KVCache | qkv.SlidingKVCache | qkv.CrossKVCache, k: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        cache.append(K1, K1)
        cache.append(k, k)

    return run


CACHES = [
    (lambda: qkv.KVCache(capacity=2.5), TypeError, "KVCache: capacity must be an int, or None to grow; got 2.5"),
    (lambda: qkv.Int8KVCache("8"), TypeError, "Int8KVCache: capacity must be an int, or None to grow; got '8'"),
    (lambda: qkv.SlidingKVCache(4.0), TypeError, "SlidingKVCache: window must be an int; got 4.0"),
    (lambda: qkv.SlidingKVCache(4, None), TypeError, "SlidingKVCache: sink_tokens must be an int; got None"),
    (lambda: qkv.KVCache(capacity=0), ValueError, "capacity must be at least 1 token, or None to grow; got 0"),
    (lambda: qkv.SlidingKVCache(0), ValueError, "window must be at least 1 key, the query's own; got 0"),
    (lambda: qkv.SlidingKVCache(4, -1), ValueError, "sink_tokens must be at least 0; got -1"),
    (lambda: qkv.KVCache().append(K1[0], K1[0]), ValueError, "k must be (B, Hkv, L, width); got shape (3, 1, 8)"),
    (
        lambda: qkv.KVCache().append(K1, K1[:1]),
        ValueError,
        "k and v must agree in batch, heads and length; got (2, 3, 1, 8) and (1, 3, 1, 8)",
    ),
    (
        second_append(qkv.KVCache(), K1[:1]),
        ValueError,
        "KVCache: k must be (2, 3, L, 8) in torch.float32 on cpu, as at the first append; got (1, 3, 1, 8) in torch.float32 on cpu. Make one cache per layer and batch",
    ),
    (
        second_append(qkv.SlidingKVCache(4), K1[..., :6]),
        ValueError,
        "SlidingKVCache: k must be (2, 3, L, 8) in torch.float32 on cpu, as at the first append; got (2, 3, 1, 6)",
    ),
    (second_append(qkv.KVCache(), K1.double()), ValueError, "got (2, 3, 1, 8) in torch.float64"),
    (second_append(qkv.KVCache(), K1.to("meta")), ValueError, "got (2, 3, 1, 8) in torch.float32 on meta"),
    (
        second_append(qkv.KVCache(capacity=3), K1.expand(-1, -1, 3, -1)),
        ValueError,
        "KVCache: capacity is 3 tokens; got 3 more than the 1 in the cache. Pass a larger capacity, or None to grow",
    ),
    (
        second_append(qkv.CrossKVCache(), K1),
        ValueError,
        "CrossKVCache: it already contains a context of 1 tokens; got 1 more",
    ),
    (lambda: qkv.CrossKVCache().keys(), ValueError, "CrossKVCache: it is empty; call the layer with a context first"),
]


@pytest.mark.parametrize(("call", "error", "message"), [*ATTENTION, *MASKS, *LAYERS, *CACHES])
def test_errors_name_what_was_required_and_given(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_refused_append_changes_no_cache() -> None:
    cache = qkv.KVCache(capacity=3)
    cache.append(K1, K1)
    with pytest.raises(ValueError, match="capacity is 3 tokens; got 3 more than the 1"):
        cache.append(K1.expand(-1, -1, 3, -1), K1.expand(-1, -1, 3, -1))
    keys = cache.append(2 * K1, 2 * K1)
    assert torch.equal(keys.k, torch.cat([K1, 2 * K1], dim=2)) and cache.length == 2


def test_a_cross_cache_refuses_another_context() -> None:
    layer, cache = qkv.CrossAttention(24, 6), qkv.CrossKVCache()
    layer(X, X, cache=cache)
    with pytest.raises(ValueError, match="it contains a context of 5 tokens; got another of 4"):
        layer(X, X[:, :4], cache=cache)
