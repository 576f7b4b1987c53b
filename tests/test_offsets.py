"""Offsets by row of the batch: the bits and the cost of each row alone, and every way to call and to trace."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv import Mask, kernels
from qkv.backends import native, nonfinite
from qkv.cache import quantize
from qkv.problem import make_problem

present = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_forward is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)

B, H, G, LK, D = 3, 6, 2, 131, 16
OFFSET = torch.tensor([101, -2, 37])
WITHIN = torch.tensor([64, 0, 37])  # documents
ALIBI = torch.arange(1, H + 1) / 8
MASKS = [
    Mask.causal(),
    Mask.causal(9, sink_tokens=2) & Mask.padding(torch.tensor([131, 4, 40])),
    Mask.sliding(30) & Mask.padding(torch.rand(B, LK, generator=torch.Generator().manual_seed(0)) < 0.7),
    Mask.documents(torch.arange(LK)[None] // 40) & Mask.causal(),
    Mask.documents(torch.arange(B * LK).view(B, LK) % 3),
    Mask.dense(torch.rand(1, H, 1, LK, generator=torch.Generator().manual_seed(1)) < 0.5) & Mask.causal(),
]


def draw(lq: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((H, lq), (G, LK), (G, LK))
    generator = torch.Generator().manual_seed(lq)
    return [torch.randn(B, heads, length, D, generator=generator).to(dtype) for heads, length in sizes]


def offset_of(mask: Mask) -> Tensor:
    return OFFSET if mask.document_ids is None else WITHIN


def row_of(mask: Mask, b: int) -> Mask:
    """The mask of one row of the batch."""
    fields = {name: getattr(mask, name) for name in ("keep", "lengths", "document_ids", "allow")}
    return replace(mask, **{name: x[b : b + 1] for name, x in fields.items() if x is not None and len(x) > 1})


@present
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_row_has_the_bits_that_it_has_alone(mask: Mask, dtype: torch.dtype) -> None:
    for lq in (1, 2, 7, 67):
        leaves = [x.requires_grad_() for x in draw(lq, dtype)]
        options = {"alibi": ALIBI} if lq == 7 else {}
        out = qkv.attention(*leaves, mask=mask, offset=offset_of(mask), backend="native", **options)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        for b in range(B):
            row = [x[b : b + 1] for x in leaves]
            offset = int(offset_of(mask)[b])
            alone = qkv.attention(*row, mask=row_of(mask, b), offset=offset, backend="native", **options)
            assert torch.equal(out[b : b + 1], alone)
            grads = torch.autograd.grad(alone.float().square().sum(), leaves)
            assert all(torch.equal(got[b], want[b]) for got, want in zip(gradients, grads, strict=True))


@present
def test_a_row_in_int8_has_the_bits_that_it_has_alone() -> None:
    for lq in (1, 5):
        q, k, v = draw(lq)
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        mask = Mask.causal(window=20)
        got = qkv.attention(q, k, v, k_scale=k_scale, v_scale=v_scale, mask=mask, offset=OFFSET)
        for b in range(B):
            one = slice(b, b + 1)
            scales = {"k_scale": k_scale[one], "v_scale": v_scale[one]}
            assert torch.equal(
                got[one], qkv.attention(q[one], k[one], v[one], **scales, mask=mask, offset=int(OFFSET[b]))
            )


@present
@pytest.mark.parametrize("size", [2, 5])
def test_chunks_of_rows_at_different_places_have_the_bits_of_a_whole(size: int) -> None:
    q, k, v = draw(20)
    whole = qkv.attention(q, k, v, mask=Mask.causal(50), offset=OFFSET, backend="native")
    for start in range(0, 20, size):
        chunk = q[:, :, start : start + size]
        got = qkv.attention(chunk, k, v, mask=Mask.causal(50), offset=OFFSET + start, backend="native")
        assert torch.equal(got, whole[:, :, start : start + size])


@has_fast_path
@pytest.mark.parametrize("mask", [mask for mask in MASKS if not mask.is_pairwise], ids=repr)
def test_the_fast_path_takes_offsets_by_row(mask: Mask) -> None:
    for lq in (1, 4):
        q, k, v = draw(lq)
        for offset in (OFFSET, torch.stack([OFFSET, OFFSET], dim=1)[:, 1]):
            fast = native.fast_path(q, k, v, None, None, mask, offset, None)
            want = qkv.attention(q, k, v, mask=mask, offset=OFFSET, backend="native")
            assert fast is not None and torch.equal(fast, want)
        for other in (OFFSET.int(), OFFSET.float(), OFFSET[:1], OFFSET[:, None], OFFSET.to("meta"), OFFSET + 2**31):
            assert native.fast_path(q, k, v, None, None, mask, other, None) is None


@present
def test_rows_cost_what_each_of_them_sees() -> None:
    q, k, _ = draw(1)
    k = k.repeat(1, 1, 40, 1)
    for mask in (Mask.causal(), Mask.causal(window=300)):

        def computed(rows: slice, offset: int | Tensor, mask: Mask = mask) -> int:
            return kernels.count_scores(
                native.call_of(make_problem("test", q[rows], k[rows], k[rows], mask=mask, offset=offset))
            )

        offset = torch.tensor([5000, 10, 900])
        alone = [computed(slice(b, b + 1), int(offset[b])) for b in range(B)]
        assert computed(slice(None), offset) == sum(alone)
        assert alone[1] < alone[2] <= alone[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
def test_any_integers_will_do(backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and kernels.absence() is not None:
        backend = "auto"
    q, k, v = draw(3)
    offset = torch.tensor([101, 250 if dtype is torch.uint8 else -2, 37])
    want = qkv.attention(q, k, v, mask=Mask.sliding(20), offset=offset, backend="reference")
    given = offset.to(dtype)
    got = qkv.attention(q, k, v, mask=Mask.sliding(20), offset=given, backend=backend)
    torch.testing.assert_close(got, want)
    assert torch.equal(given, offset.to(dtype))


def test_no_mask_is_a_full_mask() -> None:
    q, k, v = draw(3)
    want = qkv.attention_with_lse(q, k, v, mask=Mask.full())
    for got in (qkv.attention_with_lse(q, k, v, mask=None), qkv.attention_with_lse(q, k, v)):
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    assert torch.equal(qkv.attention(q, k, v, mask=None), qkv.attention(q, k, v, mask=Mask.full()))
    assert torch.equal(qkv.attention_weights(q, k, mask=None), qkv.attention_weights(q, k))
    assert qkv.explain(q, k, v, mask=None) == qkv.explain(q, k, v)


def test_weights_and_reasons_take_offsets_by_row() -> None:
    q, k, v = draw(3)
    options: dict[str, Any] = {"mask": Mask.causal(20), "offset": OFFSET, "alibi": ALIBI}
    weights = qkv.attention_weights(q, k, **options)
    out, _ = qkv.attention_with_lse(q, k, v, **options)
    torch.testing.assert_close(weights @ v.repeat_interleave(H // G, 1), out)
    assert not weights[1, :, :2].any() and torch.equal(weights.sum(-1) > 0, out.abs().sum(-1) > 0)
    assert str(qkv.explain(q, k, v, **options)).count("chosen") == 1


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batches_and_batches_of_one(batch: int) -> None:
    q, k, v = (x[:batch] for x in draw(3))
    offset = OFFSET[:batch]
    for backend in ("auto", "sdpa", "reference"):
        got = qkv.attention(q, k, v, mask=Mask.causal(), offset=offset, backend=backend)
        assert got.shape == q.shape
        torch.testing.assert_close(got, qkv.attention(q, k, v, mask=Mask.causal(), offset=101))


def test_a_query_outside_of_the_documents_sees_no_key_where_numbers_are_not_read() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])
    seen = Mask.documents(ids).visible(3, 4, torch.tensor([-1, 3]))
    want = torch.tensor([[[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]])
    assert torch.equal(seen[:, 0].int(), want.int())
    assert Mask.documents(ids[:, :0]).visible(2, 0, torch.tensor([0, 5])).shape == (2, 1, 2, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, offset: Tensor, backend: str = "auto") -> Tensor:
    return qkv.attention(q, k, v, mask=Mask.causal(40, sink_tokens=1), offset=offset, alibi=ALIBI, backend=backend)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_a_compiled_step_takes_other_offsets_and_has_the_gradients(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for offset in (OFFSET, OFFSET.flip(0) + 5):
        leaves = [x.requires_grad_() for x in draw(2)]
        got, want = (run(*leaves, offset, backend) for run in (compiled, attend))
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, want))
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


class Step(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, offset: Tensor) -> Tensor:
        return attend(q, k, v, offset)


def test_an_exported_step_takes_other_batches_and_offsets() -> None:
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Step(), (*draw(1), OFFSET), dynamic_shapes=[rows] * 4).module()
    q, k, v = (torch.cat([x, x.flip(0)]) for x in draw(1))
    offset = torch.arange(6) * 20
    torch.testing.assert_close(program(q, k, v, offset), attend(q, k, v, offset))


@present
def test_numbers_that_only_the_kernel_can_check_raise_as_well() -> None:
    def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, offset: Tensor) -> Tensor:
        return qkv.attention(q, k, v, mask=Mask.documents(ids), offset=offset)

    q, k, v = draw(4)
    ids = torch.arange(LK)[None] // 50
    message = r"qkv's kernel: offset must be between -2\*\*30 and 2\*\*30 .* between 0 and 127 with a documents mask"
    compiled = torch.compile(documents, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, ids, WITHIN), documents(q, k, v, ids, WITHIN))
    for wrong in (-1, 128, 2**30, -(2**63)):
        with pytest.raises(ValueError, match=message):
            compiled(q, k, v, ids, torch.tensor([0, wrong, 5]))
    call = native.call_of(make_problem("test", q, k, v, mask=Mask.causal(), offset=OFFSET))
    for wrong in (2**30, -(2**30), 2**63 - 1):
        with pytest.raises(ValueError, match=message):
            kernels.forward(call._replace(offsets=torch.tensor([0, wrong, 5])), wants_lse=True, needs_grad=False)
    assert kernels.count_scores(call._replace(offsets=torch.tensor([0, 2**30, 5]))) == -1


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own kernel
@pytest.mark.parametrize("batched", [(0, 0, 0, 0), (None, None, None, 0), (0, None, None, None)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_a_batch_of_batches(backend: str, batched: tuple[int | None, ...]) -> None:
    given = [torch.stack([x, x + 1]) if dim == 0 else x for x, dim in zip((*draw(2), OFFSET), batched, strict=True)]
    got = torch.vmap(lambda *x: attend(*x, backend=backend), in_dims=batched)(*given)
    for i in range(2):
        one = [x[i] if dim == 0 else x for x, dim in zip(given, batched, strict=True)]
        torch.testing.assert_close(got[i], attend(*one))


def test_autocast_and_tensors_without_memory() -> None:
    q, k, v = draw(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, v, OFFSET)
    assert torch.equal(got, attend(*(x.bfloat16() for x in (q, k, v)), OFFSET))
    with torch.device("meta"):
        meta = qkv.attention(*(x.to("meta") for x in (q, k, v)), mask=Mask.causal(), offset=OFFSET.to("meta"))
    assert meta.shape == q.shape and meta.is_meta
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v, OFFSET)]
        assert qkv.attention(*fake[:3], mask=Mask.causal(), offset=fake[3]).shape == q.shape


def test_an_offset_that_is_changed_before_the_backward_pass_is_refused() -> None:
    leaves = [x.requires_grad_() for x in draw(2)]
    offset = OFFSET.clone()
    out = qkv.attention(*leaves, mask=Mask.causal(), offset=offset)
    offset += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_on_a_gpu_keys_that_the_interval_of_a_row_hides_become_zeros() -> None:
    """What is cut off for one offset of all rows; computed here on a CPU."""
    q, k, v = draw(2)
    hides: Callable[[Mask], Tensor] = lambda mask: ~mask.visible(2, LK, OFFSET).any(dim=2)[:, 0]
    for mask in (Mask.causal(), Mask.causal(9, sink_tokens=2), Mask.band(3, None), Mask.sliding(4)):
        problem = make_problem("test", q, k, v, mask=mask & Mask.padding(torch.tensor([131, 4, 40])), offset=OFFSET)
        clean = nonfinite._zero_padded_keys(problem)
        zeros = (clean.k == 0).all(dim=(1, 3))
        assert torch.equal(zeros, hides(problem.mask)) and torch.equal(zeros, (clean.v == 0).all(dim=(1, 3)))
        assert torch.equal(clean.k[(~zeros)[:, None].expand(-1, G, -1)], k[(~zeros)[:, None].expand(-1, G, -1)])


def test_rows_of_different_lengths_decode_as_each_of_them_alone() -> None:
    """As a cache with rows of different lengths calls it: what lies behind the keys of a row has no influence."""
    lengths = torch.tensor([101, 1, 38])
    _, k, v = draw(1)
    past_end = torch.arange(LK) >= lengths[:, None]
    for x in (k, v):
        x.masked_fill_(past_end[:, None, :, None], torch.nan)
    for lq in (1, 3):
        q = draw(lq)[0]
        for backend in ("auto", "sdpa", "reference"):
            got = qkv.attention(q, k, v, mask=Mask.causal(), offset=lengths - lq, backend=backend)
            for b, length in enumerate(lengths.tolist()):
                rows = (slice(b, b + 1), slice(None), slice(None, length))
                want = qkv.attention(q[b : b + 1], k[rows], v[rows], mask=Mask.causal(), offset=length - lq)
                torch.testing.assert_close(got[b : b + 1], want)
