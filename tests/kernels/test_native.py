"""The native kernel, in addition to the contract: instruction sets, bits, threads, and calls without it."""

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from solver import SOLVERS, Solver, library

import qkv
from qkv import Mask, kernels
from qkv.backends import native
from qkv.cache import quantize
from qkv.problem import make_problem
from qkv.scores import Draw, ScoreOptions, Scores

ROOT = Path(__file__).parents[2]
present = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_forward is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@present
def test_an_unknown_instruction_set_is_refused_and_auto_falls_back() -> None:
    reason = library("mmx")
    assert reason == "QKV_ISA='mmx' is not an instruction set that this machine and the kernel support"
    q = torch.randn(1, 2, 64, 4)
    with kernels.use(reason):
        found = qkv.explain(q, q, q)
    assert found.chosen == "sdpa" and found.reasons["native"] == [reason]


def test_without_the_library_everything_works_and_explain_says_why(tmp_path: Path) -> None:
    reason = kernels.load(tmp_path / "native.so")
    assert reason == (
        "this installation of qkv has no compiled kernel: no suitable C++ compiler was found when it was built. "
        "Install one, then run pip install --no-cache-dir --force-reinstall --no-deps qkv, since pip's cache keeps the "
        "build without a kernel"
    )
    q = torch.randn(1, 2, 64, 4)
    with kernels.use(reason):
        found = qkv.explain(q, q, q)
        assert found.chosen == "sdpa" and found.reasons["native"] == [reason]
        assert qkv.attention(q, q, q).shape == q.shape
        with pytest.raises(qkv.BackendError, match="has no compiled kernel"):
            qkv.attention(q, q, q, backend="native")
        with pytest.raises(RuntimeError, match="has no compiled kernel"):
            kernels.loaded()


@present
def test_every_instruction_set_of_the_machine_is_in_the_contract() -> None:
    names = kernels.supported_isas()
    assert names[-1] in ("generic", "neon")
    assert {solver.isa or kernels.loaded().isa for solver in SOLVERS if solver.backend is native} == set(names)
    for name in names:
        found = library(name)
        assert isinstance(found, kernels.Library) and found.isa == name
    q = torch.randn(1, 2, 64, 16)
    outs = []
    for solver in (Solver(native), Solver(native, isa=names[-1])):
        with solver.at_work():
            outs.append(qkv.attention(q, q, q, backend="native"))
    torch.testing.assert_close(*outs)


@present
def test_threads_of_torch_are_found_through_a_library_that_needs_them() -> None:
    find = ctypes.CDLL(str(kernels.LIBRARY)).qkv_use_threads_of
    assert find(os.fsencode(torch._C.__file__)) == 1
    # One that the process has loaded and that has no OpenMP, and one that it has not: calls go on as before.
    if sys.platform != "win32":  # where there is but one OpenMP, known by its name
        assert find(os.fsencode(kernels.LIBRARY)) == 0 and find(b"/nowhere/libtorch.so") == 0
    q = torch.randn(1, 2, 64, 16)
    assert qkv.attention(q, q, q, backend="native").isfinite().all()


def test_a_broken_library_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "native.so"
    path.write_bytes(b"not a library")
    found = kernels.load(path)
    assert isinstance(found, str) and "the compiled kernel does not load" in found


def test_reasons_name_what_the_kernel_lacks() -> None:
    q = torch.randn(1, 2, 64, 4)
    wide = torch.randn(1, 2, 64, 8)[..., ::2]

    def against(q: torch.Tensor, **options: object) -> list[str]:
        return qkv.explain(q, q, q, **options).reasons["native"]  # type: ignore[arg-type]

    assert against(wide) == ["the last dimension of q, k and v must be contiguous for the kernel"]
    assert against(q, alibi=torch.ones(2), offset=1 << 30) == ["the kernel counts positions in 32 bits"]
    assert against(q.double()) == ["the kernel has no fp64"]
    assert against(q.to("meta")) == ["the kernel runs on CPU"]
    (reason,) = torch.func.vmap(lambda q: (against(q), q)[0], out_dims=None)(q[None])
    assert reason == "the kernel takes neither tensor subclasses nor functorch transforms"


@has_fast_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "mask",
    [
        *(Mask.full(), Mask.causal(), Mask.causal(3, sink_tokens=1), Mask.band(None, 2)),
        Mask.padding(torch.tensor([5, 9])) & Mask.causal(4),
        Mask.padding(torch.tensor([6])),
        Mask.padding(torch.arange(18).view(2, 9) % 4 > 0),
        Mask.padding(torch.arange(20)[None, 2:11] > 5) & Mask.padding(torch.tensor([9, 9, 7, 7])[1::2]),
    ],
    ids=str,
)
def test_the_fast_path_gives_the_bits_of_the_validated_path(dtype: torch.dtype, mask: Mask) -> None:
    q = torch.randn(2, 5, 6, 8, dtype=dtype).transpose(1, 2)  # views, as where heads are split and buffers filled
    k, v = torch.randn(2, 11, 2, 8, dtype=dtype).transpose(1, 2)[:, :, 1:10], torch.randn(2, 2, 9, 3, dtype=dtype)
    for offset in (-1, 0, 4, 2**29):
        for scale in (None, 0.7):
            for keys, values, *scales in ((k, v, None, None), quantized(k, v)):
                fast = native.fast_path(q, keys, values, *scales, mask, offset, scale)
                options = {"k_scale": scales[0], "v_scale": scales[1], "mask": mask, "offset": offset, "scale": scale}
                validated = qkv.attention(q, keys, values, **options, backend="native")
                assert fast is not None and torch.equal(fast, validated)
                assert fast.shape == validated.shape and fast.stride() == validated.stride() and fast.dtype == dtype


def quantized(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values in int8 with scales, as views of larger buffers."""
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    buffer = torch.full((2, 2, 20), torch.nan)
    buffer[:, :, 3:12] = k_scale
    return k, v, buffer[:, :, 3:12], v_scale


@present
@pytest.mark.parametrize("many", [sys.maxsize, 2**70])
def test_bounds_beyond_all_keys_hide_nothing(many: int) -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 7, 8)
    for mask in (Mask.band(many, many), Mask.band(1, 0, sink_tokens=many), Mask.band(many, 0)):
        want = qkv.attention(q, k, k, mask=mask, offset=2, backend="reference")
        for backend in ("auto", "native"):
            torch.testing.assert_close(qkv.attention(q, k, k, mask=mask, offset=2, backend=backend), want)


@has_fast_path
def test_the_fast_path_takes_eligible_calls_only() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 7, 8)

    def is_eligible(
        q: object = q,
        k: object = k,
        v: object = k,
        k_scale: object = None,
        v_scale: object = None,
        mask: object = qkv.masks.FULL,
        offset: object = None,
        scale: object = None,
    ) -> bool:
        return native.fast_path(q, k, v, k_scale, v_scale, mask, offset, scale) is not None  # type: ignore[arg-type]

    assert is_eligible()
    assert is_eligible(mask=Mask.causal(), offset=3)
    assert not is_eligible(mask=Mask.causal())  # Two readings.
    assert is_eligible(mask=Mask.padding(torch.tensor([5])))
    for lengths in ([5, 5], []):
        assert not is_eligible(mask=Mask.padding(torch.tensor(lengths, dtype=torch.int64)))
    assert not is_eligible(mask=Mask.padding(torch.tensor([5], dtype=torch.int32)))
    assert not is_eligible(mask=Mask.padding(torch.tensor([5], device="meta")))
    keep = torch.ones(1, 14, dtype=torch.bool)
    for kept in (keep, keep[:, :6], keep[:, ::2], keep[:, :7].expand(2, -1), keep[:, :0]):
        assert not is_eligible(mask=Mask.padding(kept))
    assert not is_eligible(mask=Mask.documents(torch.zeros(1, 7, dtype=torch.int64)))
    assert not is_eligible(mask=Mask.dense(keep[:, :7]))
    assert not is_eligible(mask=k)
    codes, scales = quantize(k)
    int8 = {"k": codes, "v": codes, "k_scale": scales, "v_scale": scales}
    assert is_eligible(**int8)
    for scale in (None, scales[0], scales[:, :1], scales[:, :, 1:], scales.double(), scales.bfloat16()):
        assert not is_eligible(**(int8 | {"k_scale": scale})) and not is_eligible(**(int8 | {"v_scale": scale}))
    assert not is_eligible(**(int8 | {"v_scale": torch.stack([scales, scales], dim=-1)[..., 0]}))
    assert (
        not is_eligible(**(int8 | {"v": k}))
        and not is_eligible(**(int8 | {"q": codes}))
        and not is_eligible(k_scale=scales)
    )
    assert not is_eligible(offset=2.0) and not is_eligible(offset=1 << 30)
    assert not is_eligible(scale=torch.ones(()))
    for other in ("q", k[0], k.double(), k.bfloat16(), k.to("meta"), k[:, :0], k[:, :, :0], k[..., :0], k[..., ::2]):
        assert not is_eligible(v=other)
    assert (
        not is_eligible(q=k[:, :, :, :7]) and not is_eligible(q=k.expand(2, -1, -1, -1)) and not is_eligible(q=k[:, :1])
    )
    assert (
        not is_eligible(v=k[:, :, 1:]) and not is_eligible(k=k.to_sparse()) and not is_eligible(q=k.half(), k=k.half())
    )
    tracked = k.clone().requires_grad_()
    assert not is_eligible(v=tracked)
    with torch.no_grad():
        assert is_eligible(v=tracked)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_eligible()


@present
def test_auto_chooses_the_kernel_for_training_every_mask_and_every_score() -> None:
    q, k = torch.randn(1, 4, 9, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    masks = [
        Mask.full(),
        Mask.causal(3, sink_tokens=1),
        Mask.padding(torch.tensor([5])),
        Mask.padding(torch.arange(9)[None] > 2),
        Mask.documents(torch.arange(9)[None] // 4),
        Mask.dense(torch.rand(9, 9) > 0.5),
    ]
    scores = {"softcap": 3.0, "bias": torch.randn(9, 9, requires_grad=True), "alibi": torch.ones(4), "dropout": 0.1}
    scores["sink_logits"] = torch.ones(4, requires_grad=True)
    for mask in masks:
        assert qkv.explain(q, k, k, mask=mask).chosen == "native"
        assert qkv.explain(q, k, k, mask=mask, **scores).chosen == "native"  # type: ignore[arg-type]


def test_a_call_has_the_fields_of_masks_of_scores_and_of_the_struct_in_their_order() -> None:
    fields = kernels.Call._fields
    assert fields[9:] == (*(field.name for field in dataclasses.fields(Mask)), *Scores._fields[:-1], *Draw._fields)
    header = (Path(__file__).parents[2] / "native" / "src" / "abi" / "problem.h").read_text()
    struct = re.sub(r"//.*", "", header).partition("struct Problem {")[2].partition("};")[0]
    members = [re.split(r"[*\s]", name)[-1] for name in re.split(r"[,;]", struct) if name.strip()]
    members = members[members.index("q") :]
    strides = {f"{name}_batch" for name in fields}
    in_pages = {"block_table", "key_count"}  # members of Pages
    assert tuple(name for name in members if name not in strides) == tuple(x for x in fields if x not in in_pages)


@present
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_the_operators_pass_opcheck(requires_grad: bool) -> None:
    q, k, v = (torch.randn(2, heads, 9, 8).requires_grad_(requires_grad) for heads in (4, 2, 2))
    bias, alibi, sinks = (torch.randn(*shape).requires_grad_(requires_grad) for shape in ((1, 4, 9, 9), (4,), (4,)))
    keep, ids = torch.arange(9)[None] > 1, torch.arange(9)[None] // 4
    allow, lengths, seed = torch.rand(2, 1, 9, 9) > 0.2, torch.tensor([9, 7]), torch.tensor([3])
    minimal = native.call_of(make_problem("test", q, k, v, mask=Mask.causal(), scale=0.3))
    scores: ScoreOptions = {"softcap": 2.0, "bias": bias, "alibi": alibi, "sink_logits": sinks, "dropout": 0.25}
    mask = Mask(left=4, right=0, sink_tokens=1, keep=keep, lengths=lengths, document_ids=ids, allow=allow)
    offset = torch.tensor([0, 0])
    full = native.call_of(make_problem("test", q, k, v, mask=mask, offset=offset, scale=0.3, **scores))
    full = full._replace(seed=seed)
    for call in (minimal, full):
        torch.library.opcheck(torch.ops.qkv.forward.default, tuple(call))


@present
def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def slope(q: torch.Tensor, backend: str) -> torch.Tensor:
        out = qkv.attention(q, q, q, backend=backend)
        return torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]

    with pytest.raises(NotImplementedError, match=r"has no second derivative: .* backend='reference'"):
        slope(q.float(), "native").sum().backward()
    assert torch.autograd.gradcheck(lambda q: slope(q, "reference"), q)


@present
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported_programs_contain_the_operators() -> None:
    torch.compiler.reset()
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=2), torch.randn(2, 11, 24)
    program = torch.export.export(layer, (x,))
    assert "torch.ops.qkv.forward.default" in program.graph_module.code
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        seen.append(graph.code)
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(layer, backend=backend, fullgraph=True)(x.requires_grad_()).sum().backward()
    forward, backward = seen
    assert "torch.ops.qkv.forward.default" in forward and "torch.ops.qkv.backward.default" in backward


@present
def test_a_tensor_whose_storage_was_freed_is_refused() -> None:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    q.untyped_storage().resize_(0)
    message = r"a tensor of shape \(1, 2, 5, 8\) has no memory\. Was its storage freed"
    for grad in (False, True):
        with pytest.raises(RuntimeError, match=message):
            qkv.attention(q, k.requires_grad_(grad), k, backend="native")


@present
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are tested on Linux")
def test_too_little_scratch_memory_is_an_error_of_the_call() -> None:
    code = """
import resource, torch, qkv
q, k = torch.randn(1, 4, 65536, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 1, 304, 64).bfloat16()
out = qkv.attention(q, k, k, backend="native")
upstream = torch.ones_like(out)
torch.autograd.grad(out, q, upstream, retain_graph=True)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 60 * 2**20,) * 2)  # 32 MiB for the gradient, but not 64 for its sums
try:
    torch.autograd.grad(out, q, upstream)
except MemoryError as error:
    print(error)
"""
    done = run(code)
    assert done.stdout.strip() == (
        "qkv's kernel: not enough scratch memory for q (1, 4, 65536, 64) and k (1, 1, 304, 64); "
        "call it with fewer batch rows or heads."
    ), done.stderr


MASKS = [Mask.full(), Mask.causal(), Mask.causal(70, sink_tokens=5), Mask.sliding(20)]


@present
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_depend_on_neither_threads_nor_batch_nor_chunking_nor_padding(dtype: torch.dtype, mask: Mask) -> None:
    q, k, v = (torch.randn(2, heads, 611, 64).to(dtype) for heads in (6, 2, 2))
    options = {"mask": mask, "backend": "native"}
    want = qkv.attention(q, k, v, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(qkv.attention(q, k, v, **options), want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(qkv.attention(q[1:], k[1:], v[1:], **options), want[1:])
    padded = [torch.cat([x, torch.full_like(x[:, :, :37], torch.nan)], dim=2) for x in (k, v)]
    lengths = Mask.padding(torch.tensor([611, 611]))
    assert torch.equal(qkv.attention(q, *padded, mask=mask & lengths, offset=0, backend="native"), want)
    for a, b in ((0, 2), (2, 300), (300, 609), (609, 611)):
        chunk = qkv.attention(q[:, :, a:b], k, v, mask=mask, offset=a, backend="native")
        assert torch.equal(chunk, want[:, :, a:b])


@present
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width, value_width", [(64, 64), (40, 24), (5, 3)])
def test_a_few_queries_have_the_bits_of_many(width: int, value_width: int, dtype: torch.dtype) -> None:
    """Up to half a vector of rows is computed with lanes along keys and widths (native/src/attention/short_query.h)."""
    q = torch.randn(1, 2, 203, width).to(dtype)
    k, v = torch.randn(1, 2, 203, width).to(dtype), torch.randn(1, 2, 203, value_width).to(dtype)
    bias = torch.randn(2, 203, 203)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, :, 150], poisoned_v[:, :, 100, -1] = torch.nan, torch.inf  # seen by some rows, by others not
    calls = [(k, v, mask) for mask in MASKS] + [(poisoned_k, poisoned_v, mask) for mask in MASKS[1:]]
    for k, v, mask in calls:
        many = qkv.attention(q, k, v, mask=mask, bias=bias, softcap=20.0, backend="native")
        for count in range(2, 10):
            for start in range(90, 180, 29):
                rows = slice(start, start + count)
                few = qkv.attention(
                    q[:, :, rows], k, v, mask=mask, offset=start, bias=bias[:, rows], softcap=20.0, backend="native"
                )
                assert torch.equal(few.nan_to_num(nan=7.0), many[:, :, rows].nan_to_num(nan=7.0))


@present
def test_several_python_threads_at_once() -> None:
    q = torch.randn(2, 4, 300, 64)
    want = qkv.attention(q, q, q, mask=Mask.causal(), backend="native")
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: qkv.attention(q, q, q, mask=Mask.causal(), backend="native"), range(64))
        assert all(torch.equal(out, want) for out in found)


class Attending(torch.utils.data.Dataset[torch.Tensor]):
    """Items that are computed with the kernel, in the worker that loads them."""

    def __init__(self, q: torch.Tensor) -> None:
        self.q = q

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return qkv.attention(self.q, self.q, self.q, mask=Mask.causal(), backend="native")


@present
def test_in_forked_workers_of_a_data_loader() -> None:
    q = torch.randn(1, 4, 300, 64)
    want = qkv.attention(q, q, q, mask=Mask.causal(), backend="native")
    loader = torch.utils.data.DataLoader(
        Attending(q), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    items = list(loader)
    assert len(items) == 6 and all(torch.equal(item, want) for item in items)


@present
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_with_any_group_over_many_keys(dtype: torch.dtype, group: int) -> None:
    q, k, v = torch.randn(2, 2 * group, 1, 80), torch.randn(2, 2, 1501, 80), torch.randn(2, 2, 1501, 72)
    options = {"mask": Mask.causal() & Mask.padding(torch.tensor([1501, 700])), "offset": 1500}
    want = qkv.attention(q.double(), k.double(), v.double(), **options, backend="reference")
    got, theirs = (
        qkv.attention(q.to(dtype), k.to(dtype), v.to(dtype), **options, backend=backend)
        for backend in ("native", "sdpa")
    )
    error, allowed = (got.double() - want).abs().max(), (theirs.double() - want).abs().max()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * want.abs().max()


@present
@pytest.mark.parametrize("lq", [1, 5, 200])
def test_gradients_go_through_the_weights_that_dropout_kept(lq: int) -> None:
    q, k = torch.randn(2, 6, lq, 16, requires_grad=True), torch.randn(2, 2, 200, 16, requires_grad=True)
    v = torch.randn(2, 2, 200, 24, requires_grad=True)
    options = {"mask": Mask.causal(), "offset": 200 - lq, "dropout": 0.3, "backend": "native"}

    def run(v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return qkv.attention(q, k, v, **options)

    with torch.no_grad():
        kept = run(torch.eye(200).expand(2, 2, 200, 200)) != 0  # values of one each: the weights themselves
    scores = (q.double() @ k.double().repeat_interleave(3, 1).mT) / 4
    weights = scores.masked_fill(~Mask.causal().visible(lq, 200, 200 - lq), -torch.inf).softmax(-1)
    want = (weights * kept / 0.7) @ v.double().repeat_interleave(3, 1)
    got = run(v)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype)) for out in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@present
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_bits_of_gradients_depend_on_neither_run_nor_threads_nor_batch(dtype: torch.dtype, mask: Mask) -> None:
    inputs = [torch.randn(2, heads, 611, 64).to(dtype).requires_grad_() for heads in (6, 2, 2)]
    upstream = torch.randn(2, 6, 611, 64).to(dtype)

    def gradients(row: slice) -> tuple[torch.Tensor, ...]:
        out = qkv.attention(*(x[row] for x in inputs), mask=mask, backend="native")
        return torch.autograd.grad(out, inputs, upstream[row])

    want = gradients(slice(0, 2))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert all(map(torch.equal, gradients(slice(0, 2)), want))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(gradients(slice(1, 2)), want, strict=True))


@present
@pytest.mark.parametrize("lq", [1, 4])
@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max], ids=str)
def test_a_row_of_equal_extreme_finite_biases_has_equal_weights(extreme: float, lq: int) -> None:
    q, v = torch.randn(1, 2, lq, 8), torch.randn(1, 2, 40, 8)
    bias = torch.full((1, 1, lq, 40), extreme)
    torch.testing.assert_close(qkv.attention(q, v, v, bias=bias), v.mean(dim=2, keepdim=True).expand(1, 2, lq, 8))
    # Such a number is a common way to hide a key, and beside others it does.
    bias = torch.zeros(1, 1, lq, 40).index_fill(3, torch.arange(30, 40), -abs(extreme))
    torch.testing.assert_close(qkv.attention(q, v, v, bias=bias), qkv.attention(q, v[:, :, :30], v[:, :, :30]))


@present
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own kernel
def test_batched_gradients_are_refused_and_another_backend_has_them() -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    many = torch.randn(4, *q.shape)

    def batched(backend: str) -> torch.Tensor:
        return torch.autograd.grad(qkv.attention(q, q, q, backend=backend), q, many, is_grads_batched=True)[0]

    with pytest.raises(NotImplementedError, match=r"no batched gradients .* backend='sdpa'"):
        batched("native")
    each = [torch.autograd.grad(qkv.attention(q, q, q), q, one)[0] for one in many]
    torch.testing.assert_close(batched("sdpa"), torch.stack(each))


@present
def test_hidden_scores_are_not_computed() -> None:
    def computed(mask: Mask, length: int = 2048) -> float:
        q = torch.randn(1, 1, length, 8)
        call = native.call_of(make_problem("test", q, q, q, mask=mask))
        return kernels.count_scores(call) / float(mask.visible(length, length).sum())

    assert computed(Mask.full()) == 1
    assert computed(Mask.causal()) < 1.02
    assert computed(Mask.causal(window=512)) < 1.06
    assert computed(Mask.sliding(window=256)) < 1.12
    assert computed(Mask.causal(window=512, sink_tokens=4)) < 1.15
    assert computed(Mask.padding(torch.tensor([960]))) == 1
    assert computed(Mask.padding(torch.arange(2048)[None] >= 960)) == 1
    documents = Mask.documents(torch.arange(2048)[None] // 512)
    assert computed(documents) < 1.02 and computed(documents & Mask.causal()) < 1.06
    assert computed(Mask.padding(torch.arange(2048)[None] % 96 < 48)) < 2.01
    assert computed(Mask.documents(torch.arange(2048)[None] // 96 % 5)) < 1.4
    assert computed(Mask.chunked(512)) < 1.02 and computed(Mask.chunked(512) & Mask.causal()) < 1.06
    assert computed(Mask.prefix(700)) < 1.02 and computed(Mask.prefix(torch.tensor([700]))) < 1.02
    assert computed(Mask.causal(window=64, dilation=8)) < 8.5
    assert computed(~Mask.causal()) < 1.02
    few = Mask.global_tokens(torch.arange(2048)[None] < 4)
    # A global token takes a segment of keys for all rows, and a tile of rows for all keys.
    assert computed(few) < 14 and computed(few | Mask.sliding(window=256)) < 1.4


@present
@pytest.mark.parametrize(
    "mask",
    [
        *(Mask.causal() & Mask.chunked(64), Mask.causal(16, dilation=4)),
        Mask.sliding(64) | Mask.global_tokens(torch.arange(1 << 13)[None] == 0),
    ],
    ids=repr,
)
def test_the_cost_of_a_mask_is_linear_in_the_length(mask: Mask) -> None:
    def scores(length: int) -> int:
        q = torch.randn(1, 1, length, 8)
        return kernels.count_scores(native.call_of(make_problem("test", q, q, q, mask=mask.select_keys(0, length))))

    assert scores(1 << 13) < 4.1 * scores(1 << 11)


@present
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lq", "lk"), [(3, 211), (53, 211), (130, 97), (350, 600)])
def test_rows_far_apart_in_memory_give_the_same_bits(dtype: torch.dtype, lq: int, lk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(2, heads, length, 37, generator=generator) for heads, length in ((9, lq), (3, lk), (3, lk))]
    near = [x.to(dtype) for x in near]
    far = [torch.full((2, x.shape[2], 30, 40), torch.nan, dtype=dtype)[:, :, 1 : 1 + x.shape[1], 1:38] for x in near]
    far = [view.transpose(1, 2).copy_(x) for view, x in zip(far, near, strict=True)]
    assert far[1].stride(2) == 1200
    found = []
    for inputs in (near, far):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = qkv.attention(*leaves, mask=Mask.causal(), offset=lk - lq, backend="native")
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@present
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_head_among_many_has_the_bits_of_one_alone(dtype: torch.dtype, threads: int) -> None:
    """Many heads are taken whole by threads, those left over tile by tile."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, n, 5, 24, generator=generator).to(dtype).transpose(1, 2) for n in (270, 300, 300))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = qkv.attention(q, k, v, mask=Mask.causal(), offset=30, backend="native")
        for b, h in ((0, 0), (2, 3), (4, 3), (4, 4)):
            heads = (slice(b, b + 1), slice(h, h + 1))
            alone = qkv.attention(q[heads], k[heads], v[heads], mask=Mask.causal(), offset=30, backend="native")
            assert torch.equal(out[heads], alone)
    finally:
        torch.set_num_threads(before)


@has_fast_path
def test_calls_of_tensors_refuse_other_arguments() -> None:
    library, q = kernels.loaded(), torch.randn(1, 2, 3, 4)
    assert library.fast_project is not None and library.layer_step is not None and library.decoder_layers is not None
    for call in (library.fast_project, library.layer_step, library.decoder_layers):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError):
        library.fast_project(q, q, None, q)
    with pytest.raises(TypeError, match="integer"):
        library.fast_project(q, q, None, q, "2")
    with pytest.raises(OverflowError):
        library.fast_project(q, q, None, q, 1 << 70)
    tensors = [None] * len(kernels.StepTensors._fields)
    with pytest.raises(TypeError, match="bytes"):
        library.layer_step(*tensors, 1)
    assert library.fast_project(1, q, None, q, 2) == 2, "no tensor"


@present
def test_more_threads_than_blocks_of_a_loop_have_its_bits() -> None:
    x, weight, before = torch.randn(1, 512), torch.randn(1536, 512), torch.get_num_threads()
    alone = kernels.fast_linear(x, weight, None)
    torch.set_num_threads(67)
    try:
        many = kernels.fast_linear(x, weight, None)
    finally:
        torch.set_num_threads(before)
    assert (many is None) == (alone is None)
    assert many is None or alone is None or torch.equal(many, alone)


@present
@pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"),
    reason="torch's OpenMP is no global library",
)
def test_a_loop_within_a_parallel_region_has_one_thread_and_all_items() -> None:
    x, weight, found = torch.randn(1, 512), torch.randn(1536, 512), []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(kernels.fast_linear(x, weight, None)))
    ctypes.CDLL(None).GOMP_parallel(body, None, 2, 0)
    expected = kernels.fast_linear(x, weight, None)
    assert len(found) == 2
    assert all(out is expected is None or torch.equal(out, expected) for out in found)
