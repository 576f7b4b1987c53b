"""torch's `varlen_attn` on a CPU, compared with flash-attn's reference and with torch's signature."""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from integrations.test_flash_attn import (
    DTYPES,
    HEADS,
    KEY_LENGTHS,
    KV_HEADS,
    QUERY_LENGTHS,
    WIDTH,
    check,
    draw,
    packed,
    packed_ref,
    paged,
    starts,
)
from torch import Tensor

from qkv.integrations.torch.varlen import AuxRequest, varlen_attn

WHERE = (starts(QUERY_LENGTHS), starts(KEY_LENGTHS), max(QUERY_LENGTHS), max(KEY_LENGTHS))
WINDOWS = [(-1, -1), (-1, 0), (3, 0), (2, 1), (-1, 2), (1, -1), (0, 0), (100, 100)]
USED = [2, 4, 0, 1, 0, 8]

of_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch.nn.attention.varlen") is None, reason="this torch has no varlen_attn"
)


def split_ref(lengths: list[int], used: list[int], **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference over the first ``used`` keys of each sequence."""

    def ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = ([x[:n] for x, n in zip(y.split(lengths), used, strict=True)] for y in (k, v))
        return packed_ref(q.split(QUERY_LENGTHS), keys, values, **options)

    return ref


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_attention_and_gradients_are_those_of_the_reference(
    window: tuple[int, int], scale: float | None, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"window_size": window, "scale": scale, "enable_gqa": True}
    run = lambda q, k, v: varlen_attn(q, k, v, *WHERE, return_aux=AuxRequest(lse=True), **options)
    tensors = packed(dtype)
    check(run, split_ref(KEY_LENGTHS, KEY_LENGTHS, window_size=window, softmax_scale=scale), tensors, f"{options}")
    assert torch.equal(varlen_attn(*tensors, *WHERE, **options), run(*tensors)[0])


@DTYPES
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_keys_beyond_seqused_k_are_ignored(window: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = packed(dtype)
    for x in (k, v):
        for sequence, used in zip(x.split(KEY_LENGTHS), USED, strict=True):
            sequence[used:] = torch.nan
    run = lambda q, k, v: varlen_attn(
        q, k, v, *WHERE, return_aux=AuxRequest(lse=True), window_size=window, enable_gqa=True,
        seqused_k=torch.tensor(USED, dtype=torch.int32),
    )  # fmt: skip
    got = run(q, k, v)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    assert all(map(torch.equal, got, run(q, k, v)))
    check(run, split_ref(KEY_LENGTHS, USED, window_size=window), [q, k, v], str(window))


@DTYPES
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_keys_in_pages_are_read_in_order(window: tuple[int, int], page_size: int, dtype: torch.dtype) -> None:
    q, k, v = packed(dtype)
    (k_pool, table), (v_pool, _) = (paged(x.split(KEY_LENGTHS), page_size) for x in (k, v))
    options: dict[str, Any] = {"block_table": table, "seqused_k": torch.tensor(USED), "window_size": window}
    for cu_seq_k in (None, WHERE[1]):
        where = (WHERE[0], cu_seq_k, 9, 9)
        got = varlen_attn(q, k_pool, v_pool, *where, return_aux=AuxRequest(lse=True), enable_gqa=True, **options)
        ref = split_ref(KEY_LENGTHS, USED, window_size=window)
        want, peer = (ref(*(x.to(kind) for x in (q, k, v))) for kind in (torch.float64, dtype))
        for what, *three in zip(("out", "lse"), got, want, peer, strict=True):
            assert_within_budget(*three, what)


@of_torch
def test_aux_request_of_torch_and_num_splits() -> None:
    import torch.nn.attention.varlen as theirs

    tensors = packed(torch.float32)
    out, lse = varlen_attn(*tensors, *WHERE, enable_gqa=True, return_aux=theirs.AuxRequest(lse=True), num_splits=1)
    assert out.shape == (sum(QUERY_LENGTHS), HEADS, WIDTH - 3) and lse.shape == (HEADS, sum(QUERY_LENGTHS))
    assert torch.equal(varlen_attn(*tensors, *WHERE, enable_gqa=True, return_aux=AuxRequest()), out)


@of_torch
def test_the_signature_is_that_of_torch() -> None:
    import torch.nn.attention.varlen as theirs

    bare = [
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (varlen_attn, theirs.varlen_attn)
    ]
    assert bare[0] == bare[1]


Q, K, POOL = draw(7, HEADS, WIDTH), draw(7, KV_HEADS, WIDTH), draw(3, 4, KV_HEADS, WIDTH)
STARTS, TABLE = torch.tensor([0, 3, 7]), torch.tensor([[0], [2]])


def call(q: Tensor = Q, k: Tensor = K, cu_seq_k: Tensor | None = STARTS, **options: Any) -> Any:
    return varlen_attn(q, k, k, STARTS, cu_seq_k, 4, 4, **{"enable_gqa": True, **options})


ERRORS = [
    (lambda: call(enable_gqa=False), "same number of heads; got 6 and 2. Pass enable_gqa=True"),
    (lambda: call(k=POOL, block_table=TABLE, seqused_k=STARTS[1:], enable_gqa=False), "heads; got 6 and 2"),
    (lambda: call(q=Q[:, :5]), "heads of q must be a multiple of that of k and v; got 5 and 2"),
    (lambda: call(q=Q[None]), "varlen_attn: query must be (Tq, H, D); got shape (1, 7, 6, 8)"),
    (lambda: call(k=POOL), "key must be (Tk, Hkv, D); got shape (3, 4, 2, 8)"),
    (lambda: call(block_table=TABLE), "key must be (pages, page_size, Hkv, D); got shape (7, 2, 8)"),
    (lambda: call(cu_seq_k=None), "cu_seq_k must be a tensor unless block_table is given; got None"),
    (
        lambda: call(cu_seq_k=torch.tensor([0, 3, 6])),
        "cu_seq_k must be (N + 1,) integers that start at 0, never decrease",
    ),
    (lambda: call(k=POOL, block_table=TABLE), "block_table needs seqused_k, the number of keys of each sequence"),
    (lambda: call(seqused_k=torch.tensor([4, 4])), "seqused_k must be at most the lengths in cu_seq_k, [3, 4]"),
    (lambda: call(seqused_k=torch.tensor([4])), "seqused_k must be (2,) integers, at least 0, one per sequence"),
    (
        lambda: call(k=POOL, block_table=TABLE, seqused_k=torch.tensor([4, 5])),
        "block_table must have pages for 5 keys; got 1 of 4 keys for each sequence",
    ),
    (
        lambda: call(k=POOL, block_table=TABLE + 1, seqused_k=torch.tensor([4, 4])),
        "block_table must contain pages 0 to 2; got 3 at [1, 0], which sequence 1 of 4 keys needs",
    ),
    (lambda: call(window_size=(1, 2, 3)), "window_size must be (left, right), -1 for no bound; got (1, 2, 3)"),
]


def test_arguments_of_wrong_types_are_refused_by_name() -> None:
    x, starts = torch.randn(3, 2, 8), torch.tensor([0, 3])
    with pytest.raises(TypeError, match="varlen_attn: cu_seq_q must be a tensor; got list"):
        varlen_attn(x, x, x, [0, 3], starts, 3, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="varlen_attn: seqused_k must be a tensor; got list"):
        varlen_attn(x, x, x, starts, starts, 3, 3, seqused_k=[2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="varlen_attn: query must be a tensor; got NoneType"):
        varlen_attn(None, x, x, starts, starts, 3, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="varlen_attn: return_aux must be an AuxRequest or None; got True"):
        varlen_attn(x, x, x, starts, starts, 3, 3, return_aux=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\), -1 for no bound; got 3"):
        varlen_attn(x, x, x, starts, starts, 3, 3, window_size=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong, message", ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_errors_name_what_was_required_and_given(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong()
    assert str(caught.value).startswith("varlen_attn: ")
    assert message in str(caught.value)
