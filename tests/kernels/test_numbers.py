"""The native kernel's numbers: wide heads, large scores, one query, non-finite numbers, and memory that runs out."""

import math
import subprocess
import sys

import pytest
import torch
from budget import assert_within_budget
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import qkv
from qkv import Mask, kernels

pytestmark = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))

SHAPES = [
    *((lq, lk, width) for lq in (1, 2, 3, 8, 16, 64) for lk in (8, 64) for width in (64, 128, 256, 512)),
    *((lq, lk, 64) for lq in (1, 3, 40) for lk in (480, 2000)),
]


@pytest.mark.parametrize(("lq", "lk", "width"), SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.0])
def test_sums_are_as_exact_as_those_of_torch(lq: int, lk: int, width: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(lq * lk + width)
    q, k, v = (torch.randn(1, 16, length, width, generator=generator) for length in (lq, lk, lk))
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    with sdpa_kernel(SDPBackend.MATH):
        peer = scaled_dot_product_attention(q, k, v, scale=scale)
    assert_within_budget(qkv.attention(q, k, v, scale=scale, backend="native"), want, peer, f"{lq, lk, width}")


@pytest.mark.parametrize("lq", [1, 3, 16, 64])
@pytest.mark.parametrize(("lk", "width"), [(64, 64), (64, 256), (8, 256)], ids=str)
def test_errors_of_unscaled_scores_are_on_average_at_most_twice_those_of_torch(lq: int, lk: int, width: int) -> None:
    # One score has nearly all of a row's weight: its rounding is the error, in one draw ten times that of another.
    draws = 300
    generator = torch.Generator().manual_seed(lq * lk + width)
    q, k, v = (torch.randn(1, draws, length, width, generator=generator) for length in (lq, lk, lk))
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    with sdpa_kernel(SDPBackend.MATH):
        peer = scaled_dot_product_attention(q, k, v, scale=1.0)
    got = qkv.attention(q, k, v, scale=1.0, backend="native")
    mine, theirs = ((out.double() - want).abs().amax((0, 2, 3)).mean().item() for out in (got, peer))
    assert mine <= 2 * theirs, f"{mine:.3g} exceeds 2 x {theirs:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e3, 1e4, 3e4, 65504.0])
@pytest.mark.parametrize("lq", [1, 5, 40, 70])
def test_finite_scores_have_finite_results(dtype: torch.dtype, size: float, lq: int) -> None:
    generator = torch.Generator().manual_seed(lq)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator) for n in (lq, 300, 300))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q.sign() * size, k.sign() * size, v))
    out, lse = qkv.attention_with_lse(q, k, v, backend="native")
    top = (q.double() @ k.double().mT).amax(3) / 8
    assert out.isfinite().all() and (out.abs() <= v.abs().max()).all()
    torch.testing.assert_close(lse.double(), top, rtol=1e-6, atol=math.log(300))
    torch.testing.assert_close(qkv.attention(q, k, v, backend="native"), out)
    out.sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    assert not q.grad.isnan().any() and not k.grad.isnan().any()  # fp16 may overflow: they are multiples of k and q
    # Each row has a weight of 1 to give away.
    given = v.grad.double().sum((2, 3)) / (64 * lq)
    torch.testing.assert_close(given, torch.ones_like(given), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_a_single_query_gives_a_single_key_its_whole_gradient(width: int, scale: float | None) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, upstream = (torch.randn(1, 3, 1, width, generator=generator) for _ in range(4))
        v.requires_grad_()
        qkv.attention(q, k, v, scale=scale, backend="native").backward(upstream)
        assert torch.equal(v.grad, upstream)  # type: ignore[arg-type]


@pytest.mark.parametrize("seen", [True, False])
def test_a_sink_logit_of_minus_infinity_has_no_gradient(seen: bool) -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    sinks = torch.tensor([-math.inf, 0.5], requires_grad=True)
    mask = Mask.full() if seen else Mask.padding(torch.tensor([0]))
    out, lse = qkv.attention_with_lse(q, q, q, mask=mask, sink_logits=sinks, backend="native")
    (out.sum() + lse[:, 1].sum()).backward()
    assert sinks.grad is not None and q.grad is not None
    assert sinks.grad[0] == 0 and sinks.grad[1] != 0 and q.grad.isfinite().all()
    if not seen:
        assert not out.any() and not q.grad.any()
        assert lse.tolist() == [[[-math.inf] * 3, [0.5] * 3]]


def test_hidden_keys_have_a_gradient_of_0() -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    bias, alibi, sinks = (torch.zeros(shape, requires_grad=True) for shape in ((1, 2, 3, 3), (2,), (2,)))
    mask = Mask.causal()
    out = qkv.attention(q, q, q, mask=mask, offset=-9, bias=bias, alibi=alibi, sink_logits=sinks, backend="native")
    out.sum().backward()
    for x in (q, bias, alibi, sinks):
        assert x.grad is not None and not x.grad.any()


MEMORY = """
import os, resource, torch, qkv

def run(threads, wants_grad):
    torch.set_num_threads(threads)
    q, k = torch.randn(1, 2, 70, 50_000), torch.randn(1, 2, 9, 50_000)
    v = torch.randn(1, 2, 9, 16)
    q.requires_grad_(wants_grad)
    for spare_mib in (4, 20, 125, None):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = resource.RLIM_INFINITY if spare_mib is None else size + spare_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            out = qkv.attention(q, k, v, backend="native")
            if wants_grad:
                out.sum().backward()
            yield "done"
        except (MemoryError, RuntimeError) as error:  # torch's own tensors are of the second kind
            yield type(error).__name__

for threads in (1, 2):
    for wants_grad in (False, True):  # each in a process of its own, which imports nothing
        if os.fork() == 0:
            print(threads, wants_grad, *run(threads, wants_grad), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are tested on Linux")
def test_memory_that_runs_out_is_an_error_of_the_call() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    assert [run[:2] for run in runs] == [["1", "False"], ["1", "True"], ["2", "False"], ["2", "True"]]
    for threads, wants_grad, *found in runs:
        assert found[:2] == ["MemoryError", "MemoryError"] and found[3] == "done", (threads, wants_grad, found)
