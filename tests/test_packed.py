"""Packed sequences: each has the bits, forward and backward, of a call of its own."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, library

from qkv import Mask, kernels, sequences
from qkv.backends import native
from qkv.functional import attend
from qkv.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from qkv.integrations.torch.varlen import AuxRequest, varlen_attn
from qkv.problem import make_problem
from qkv.sequences import PagedKeys, make_sequences

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 6, 2, 24, 17
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LENGTHS = {
    "short": [(3, 5), (0, 4), (1, 1), (9, 2), (4, 0), (1, 9), (2, 2)],
    "primes": [(17, 17), (1, 211), (101, 101), (2, 97), (31, 7)],
    "decoding": [(1, 0), (1, 1), (1, 96), (1, 97), (1, 480), (1, 977)],
    "one": [(70, 300)],
    "one of nothing": [(0, 0), (3, 3), (0, 0)],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"mask": Mask.causal()},
    "window": {"mask": Mask.band(12, 3), "scale": 0.3},
    "window and first tokens": {"mask": Mask.causal(7, sink_tokens=2)},
    "scores": {"mask": Mask.causal(), "softcap": 2.0, "alibi": 1, "sink_logits": True},
    "slopes of each sequence": {"alibi": 2},
}


@pytest.fixture(params=["native", "other"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel, or another backend, which is called for each sequence."""
    if request.param == "native":
        if kernels.absence() is not None:
            pytest.skip(str(kernels.absence()))
    else:
        monkeypatch.setattr("qkv.backends.native.why_not", lambda problem: ["not for this test"])
    return str(request.param)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def options_for(name: str, count: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "alibi" in options:
        shape = (HEADS,) if options["alibi"] == 1 else (count, HEADS)
        options["alibi"] = draw(*shape, seed=1).abs().requires_grad_()
    if "sink_logits" in options:
        options["sink_logits"] = draw(HEADS, seed=2).requires_grad_()
    return options


def alone(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A call for each sequence."""
    queries, keys = ([pair[side] for pair in lengths] for side in (0, 1))
    outs, lses = [], []
    for n, parts in enumerate(zip(q.split(queries), k.split(keys), v.split(keys), strict=True)):
        mine = dict(options)
        if "alibi" in mine and mine["alibi"].dim() == 2:
            mine["alibi"] = mine["alibi"][n]
        out, lse = attend(
            "a test", *(x.transpose(0, 1)[None] for x in parts), offset=len(parts[1]) - len(parts[0]), **mine
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_sequence_has_the_bits_of_a_call_of_its_own_forward_and_backward(
    backend: str, lengths: str, options: str
) -> None:
    for dtype in DTYPES if backend == "native" else (torch.float32, torch.float64):
        pairs = LENGTHS[lengths]
        queries, keys = ([pair[side] for pair in pairs] for side in (0, 1))
        q = draw(sum(queries), HEADS, WIDTH, dtype=dtype).requires_grad_()
        k = draw(sum(keys), KV_HEADS, WIDTH, dtype=dtype, seed=3).requires_grad_()
        v = draw(sum(keys), KV_HEADS, VALUE_WIDTH, dtype=dtype, seed=4).requires_grad_()
        d_out = draw(sum(queries), HEADS, VALUE_WIDTH, dtype=dtype, seed=5)
        mine = options_for(options, len(pairs))
        shared = [mine[name] for name in ("alibi", "sink_logits") if name in mine]
        found = []
        for run in (
            lambda: make_sequences("a test", q, starts(queries), PagedKeys.packed(k, v, starts(keys)), **mine).attend(),
            lambda: alone(q, k, v, pairs, mine),
        ):
            out, lse = run()
            loss = (out * d_out).sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
            gradients = torch.autograd.grad(loss, [q, k, v, *shared], allow_unused=True, materialize_grads=True)
            with torch.no_grad():  # torch's kernels are others then
                assert backend != "native" or all(map(torch.equal, run(), (out, lse))), "other bits without gradients"
            found.append([out, lse, *gradients])
        names = ("out", "lse", "dq", "dk", "dv")
        for name, ours, theirs in zip(names, *found, strict=False):
            assert torch.equal(ours, theirs), f"{name} in {dtype}"
        # Those that sequences share are summed in another order.
        for ours, theirs in zip(found[0][5:], found[1][5:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_native_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    pairs = [(9, 9)] * 40 + [(1, 1500), (200, 200), (1, 1)]
    queries, keys = ([pair[side] for pair in pairs] for side in (0, 1))
    q, k = draw(sum(queries), HEADS, WIDTH), draw(sum(keys), KV_HEADS, WIDTH)
    run = lambda: flash_attn_varlen_func(q, k, k, starts(queries), starts(keys), 1, 1, causal=True)
    try:
        torch.set_num_threads(1)
        want = run()
        torch.set_num_threads(threads)
        assert torch.equal(run(), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_not_used_have_no_influence_and_no_gradient(backend: str, dtype: torch.dtype) -> None:
    lengths, used = [5, 3, 0, 8], [4, 0, 0, 8]
    q = draw(16, HEADS, WIDTH, dtype=dtype).requires_grad_()
    k, v = (draw(16, KV_HEADS, WIDTH, dtype=dtype, seed=seed) for seed in (3, 4))
    counts = torch.zeros(16, dtype=torch.bool)
    for first, n in zip(starts(lengths).tolist(), used, strict=False):
        counts[first : first + n] = True
    call = lambda k, v: varlen_attn(
        q, k, v, starts(lengths), starts(lengths), 8, 8, window_size=(-1, 0), enable_gqa=True,
        seqused_k=torch.tensor(used), return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    found = []
    for filler in (torch.nan, 0.0):
        for x in (k, v):
            x[~counts] = filler
        keys, values = k.clone().requires_grad_(), v.clone().requires_grad_()
        out, lse = call(keys, values)
        gradients = torch.autograd.grad(out.float().sin().sum() + lse.exp().sum(), [q, keys, values])
        assert all((gradient[~counts] == 0).all() for gradient in gradients[1:])
        found.append([out, lse, *gradients])
    assert all(map(torch.equal, *found))


def test_tensors_of_any_layout(backend: str) -> None:
    """One tensor of queries, keys and values; widths that are not contiguous; heads outside; expanded heads."""
    where = (starts([3, 4]), starts([3, 4]), 4, 4)
    # torch's kernels sum in another order for other layouts.
    same = torch.equal if backend == "native" else lambda got, want: torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    packed = draw(7, 3, HEADS, WIDTH)
    layouts = {
        "qkv": packed.unbind(1),
        "width strided": draw(7, HEADS, WIDTH, 3).unbind(-1),
        "heads outside": draw(3, HEADS, 7, WIDTH).transpose(1, 2).unbind(),
        "reversed layout": draw(3, WIDTH, HEADS, 7).permute(0, 3, 2, 1).unbind(),
        "expanded": (draw(7, HEADS, WIDTH), *draw(2, 7, 1, WIDTH).expand(2, 7, HEADS, WIDTH).unbind()),
        "one token": draw(3, 1, HEADS, WIDTH).expand(3, 7, HEADS, WIDTH).unbind(),
        "sliced": draw(3, 14, HEADS, 2 * WIDTH)[:, ::2, :, WIDTH // 2 : -WIDTH // 2].unbind(),
    }
    for name, tensors in layouts.items():
        leaves = [x.detach().requires_grad_() for x in tensors]
        plain = [x.detach().contiguous().requires_grad_() for x in tensors]
        outs = [flash_attn_varlen_func(*x, *where, causal=True) for x in (leaves, plain)]
        assert same(*outs), name
        got, want = (torch.autograd.grad(out.sin().sum(), x) for out, x in zip(outs, (leaves, plain), strict=True))
        assert all(map(same, got, want)), name


def test_strided_widths_give_the_results_of_contiguous_ones() -> None:
    strided = draw(2, 7, HEADS, WIDTH, 3).unbind(-1)
    plain = [x.contiguous() for x in strided]
    for options in ({}, {"causal": True}, {"softcap": 2.0}, {"alibi_slopes": draw(2, HEADS).abs()}):
        outs = [flash_attn_func(*x, return_attn_probs=True, **options) for x in (strided, plain)]
        assert torch.allclose(outs[0][0], outs[1][0], atol=1e-5), options
        assert torch.allclose(outs[0][1], outs[1][1], atol=1e-5), options


def test_dropout_differs_between_sequences_and_repeats_in_the_gradient(backend: str) -> None:
    length, count = 40, 3
    q, k = draw(count * length, 2, 16), draw(count * length, 2, 16)
    where = (starts([length] * count),) * 2
    v = torch.eye(length).repeat(count, 1)[:, None].expand(-1, 2, -1).clone().requires_grad_()  # shows the weights
    plain = flash_attn_varlen_func(q, k, v, *where, 40, 40)
    torch.manual_seed(0)
    out = flash_attn_varlen_func(q, k, v, *where, 40, 40, dropout_p=0.25)
    kept = (out != 0).view(count, length, 2, length)
    torch.testing.assert_close(out[out != 0], plain[out != 0] / 0.75)
    assert abs(kept.float().mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    patterns = [*kept.permute(0, 2, 1, 3).flatten(0, 1)]
    for one, other in itertools.combinations(patterns, 2):
        assert abs((one == other).float().mean() - 0.625) < 0.05, "weights are dropped together"
    d_out = draw(*out.shape, seed=9)
    (dv,) = torch.autograd.grad(out, v, d_out)
    torch.testing.assert_close((dv * v).sum(), (out * d_out).sum(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(flash_attn_varlen_func(q, k, v, *where, 40, 40, dropout_p=0.25), out)


def test_autocast_computes_in_its_dtype(backend: str) -> None:
    x, where = draw(7, 2, 8), (starts([3, 4]), starts([3, 4]), 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_varlen_func(x, x, x, *where)
    assert torch.equal(out, flash_attn_varlen_func(*[x.bfloat16()] * 3, *where))


def native_call(scores: dict[str, Any] | None = None, **changes: Any) -> kernels.Sequences:
    q, k = draw(7, HEADS, WIDTH), draw(1, 9, KV_HEADS, WIDTH)
    heads = (x.transpose(-3, -2) for x in (q[None], k, k))
    problem = make_problem("test", *heads, mask=Mask.causal(), offset=2, wants_lse=True)
    call = native.call_of(problem)._replace(**scores or {})
    found = kernels.Sequences(call, starts([3, 4]), torch.tensor([0, 4]), torch.tensor([4, 5]), tables=None)
    return found._replace(**changes)


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_native_operators_pass_opcheck() -> None:
    slopes, sinks = draw(2, HEADS).abs(), draw(HEADS)
    for call in (native_call(), native_call({"alibi": slopes, "sink_logits": sinks, "softcap": 2.0})):
        plain = call.arguments()
        library.opcheck(torch.ops.qkv.forward_sequences.default, plain)
        leaves = tuple(
            x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in plain
        )
        library.opcheck(torch.ops.qkv.forward_sequences.default, leaves)


def test_sink_logits_of_minus_infinity_have_gradient_0_beside_a_sequence_without_keys(backend: str) -> None:
    x, sinks = draw(4, HEADS, WIDTH), torch.full((HEADS,), -torch.inf).requires_grad_()
    keys = PagedKeys.packed(*[draw(3, KV_HEADS, WIDTH)] * 2, starts([3, 0]))
    out, _ = make_sequences("test", x, starts([3, 1]), keys, sink_logits=sinks).attend()
    assert torch.equal(torch.autograd.grad(out.sum(), sinks)[0], torch.zeros(HEADS))


WRONG = {
    "starts that begin later": {"starts": torch.tensor([1, 3, 7])},
    "starts that fall": {"starts": torch.tensor([0, 8, 7])},
    "starts that end early": {"starts": torch.tensor([0, 3, 6])},
    "starts that end late": {"starts": torch.tensor([0, 3, 8])},
    "keys before the first": {"firsts": torch.tensor([-1, 4])},
    "keys beyond the last": {"key_lengths": torch.tensor([4, 6])},
    "a length below 0": {"key_lengths": torch.tensor([-1, 5])},
    "a page beyond the last": {"tables": torch.tensor([[0], [1]])},
    "a page below the first": {"tables": torch.tensor([[-1], [0]])},
}


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_native_operators_refuse_sequences_out_of_bounds(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"sequences must lie within the 7 queries and the 1 pages of 9 keys; got"):
        torch.ops.qkv.forward_sequences(*native_call(**changes).arguments())


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_native_gradients_of_gradients_are_refused() -> None:
    x = draw(7, 2, 8).requires_grad_()
    out = flash_attn_varlen_func(x, x, x, starts([3, 4]), starts([3, 4]), 4, 4)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum(), x)
    with pytest.raises(NotImplementedError, match="no batched gradients"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_native_sequences_compile_as_one_graph_for_any_lengths() -> None:
    attend = lambda x, where: flash_attn_varlen_func(x, x, x, where, where, 9, 9, causal=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 4], [7, 0], [1, 6]):
        x = draw(7, 2, 8).requires_grad_()
        found = []
        for run in (compiled, attend):
            out = run(x, starts(lengths))
            found.append((out, torch.autograd.grad(out.sin().sum(), x)[0]))
        assert all(map(torch.equal, *found)), lengths
    with pytest.raises(ValueError, match="sequences must lie within"):
        compiled(x, torch.tensor([0, 3, 8]))


def test_a_mask_of_tensors_is_refused() -> None:
    x, where = draw(7, 2, 8), starts([3, 4])
    for mask in (Mask.padding(torch.tensor([4])), Mask.documents(torch.zeros(1, 7, dtype=torch.long))):
        with pytest.raises(ValueError, match="a test: the mask of packed sequences must be an interval"):
            make_sequences("a test", x, where, PagedKeys.packed(x, x, where), mask=mask)


def test_sequences_are_below_the_layers() -> None:
    assert sequences.__name__ == "qkv.sequences"


INTEGERS = {
    "in a list": ([0, 3, 7], TypeError, "must be a tensor; got list"),
    "floating": (torch.tensor([0.0, 3.0, 7.0]), ValueError, r"must be integers; got torch\.float32"),
    "boolean": (torch.tensor([False, True, True]), ValueError, r"must be integers; got torch\.bool"),
    "of two dimensions": (torch.tensor([[0, 3, 7]]), ValueError, r"must be \(N \+ 1,\) integers that start at 0"),
    "not from 0": (
        torch.tensor([1, 3, 7]),
        ValueError,
        r"must be \(N \+ 1,\) integers that start at 0, never decrease and end at 7",
    ),
    "falling": (
        torch.tensor([0, 8, 7]),
        ValueError,
        r"must be \(N \+ 1,\) integers that start at 0, never decrease and end at 7",
    ),
    "of too many": (
        torch.tensor([0, 3, 9]),
        ValueError,
        r"must be \(N \+ 1,\) integers that start at 0, never decrease and end at 7",
    ),
    "of nothing": (
        torch.tensor([0]),
        ValueError,
        r"must be \(N \+ 1,\) integers that start at 0, never decrease and end at 7",
    ),
}


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("wrong", INTEGERS)
def test_wrong_starts_are_refused_by_name(wrong: str, which: str) -> None:
    value, error, message = INTEGERS[wrong]
    x, right = draw(7, 2, 8), starts([3, 4])
    where: Any = (value, right) if which == "q" else (right, value)
    with pytest.raises(error, match=rf"^flash_attn_varlen_func: cu_seqlens_{which} {message}"):
        flash_attn_varlen_func(x, x, x, *where, 4, 4)
    with pytest.raises(error, match=rf"^varlen_attn: cu_seq_{which} {message}"):
        varlen_attn(x, x, x, *where, 4, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_starts_may_be_any_integers(dtype: torch.dtype) -> None:
    x = draw(7, 2, 8)
    out = flash_attn_varlen_func(x, x, x, starts([3, 4]).to(dtype), starts([3, 4]).to(dtype), 4, 4)
    assert torch.equal(out, flash_attn_varlen_func(x, x, x, starts([3, 4]), starts([3, 4]), 4, 4))


@pytest.mark.parametrize("grad", [False, True])
def test_lazily_negated_tensors(grad: bool) -> None:
    """Such as ``z.conj().imag``, a view whose memory contains the negated numbers."""
    x, starts, d_out = torch.randn(3, 9, 4, 8), torch.tensor([0, 4, 9], dtype=torch.int32), torch.randn(9, 4, 8)
    found = []
    for lazy in (False, True):
        q, k, v = ((torch._neg_view(-part) if lazy else part.clone()).detach().requires_grad_(grad) for part in x)
        out = flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, causal=True)
        assert isinstance(out, Tensor)
        upstream = torch._neg_view(-d_out) if lazy else d_out
        gradients = torch.autograd.grad(out, (q, k, v), upstream) if grad else ()
        found.append([out, *gradients])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.resolve_neg(), want)
