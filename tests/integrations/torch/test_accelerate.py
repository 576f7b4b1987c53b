"""`accelerate`: the kernel gives the results, gradients, layouts and errors of torch's attention."""

import contextlib
import copy
import functools
import inspect
import io
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv import kernels
from qkv.integrations.torch import dispatcher
from qkv.integrations.torch.accelerate import Report

pytestmark = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results that the kernel computes during the test."""
    found: list[Tensor] = []

    def solve(*call: Any) -> Tensor | str:
        out = actual(*call)
        found.extend([out] if isinstance(out, Tensor) else [])
        return out

    actual = dispatcher.solve
    monkeypatch.setattr(dispatcher, "solve", solve)
    return found


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Outcome(NamedTuple):
    results: list[Tensor]
    slopes: list[Tensor]
    error: str


def outcome(call: Callable[..., Any], inputs: list[Any], options: dict[str, Any]) -> Outcome:
    """Results and gradients of a call on copies of its inputs, or its error."""

    def fresh(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    inputs = [fresh(value) for value in inputs]
    options = {name: fresh(value) for name, value in options.items()}
    torch.manual_seed(0)
    try:
        results = call(*inputs, **options)
        results = [out for out in (results if isinstance(results, tuple) else (results,)) if out is not None]
        leaves = [x for x in (*inputs, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
        slopes = torch.autograd.grad(results[0].float().sin().sum(), leaves, allow_unused=True) if leaves else ()
    except Exception as error:
        return Outcome([], [], repr(error))
    return Outcome(results, [slope for slope in slopes if slope is not None], "")


def layout(tensor: Tensor) -> list[int]:
    """The strides of dimensions with more than one entry."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


class Terms(NamedTuple):
    """Bounds of the absolute terms behind a result and behind any gradient, in the 2-norm, times their conditions."""

    result: float = 0.0
    slope: float = 0.0


def terms_of(q: Tensor, k: Tensor, v: Tensor) -> Terms:
    """The terms for scales of at most the default and incoming gradients of at most 1.

    A result is an average of values. The terms of the scores' gradients are ``P (|dO V| + rowsum(|dO O|))``, in each
    row at most twice the largest value in the 1-norm; those of q and k are products of these with k and q. Each
    weight carries the rounding of its score as well, in proportion to the score.
    """
    if not (q.numel() and k.numel() and v.numel()):
        return Terms()
    q1, k1, v1 = (x.detach().double().abs().sum(-1).max().item() for x in (q, k, v))
    q2, k2 = (x.detach().double().norm(dim=-1).max().item() for x in (q, k))
    condition, rows = 1 + q2 * k2 * q.shape[-1] ** -0.5, q[..., 0].numel()
    return Terms(condition * rows**0.5 * v1, condition * 2 * rows * v1 * max(1, q1, k1))


def assert_as_plain(call: Callable[..., Any], *inputs: Any, terms: Terms | None = None, **options: Any) -> Report:
    """Asserts that the accelerated call raises as the plain one does, or is as near to the plain one in fp64.

    In the mean square, its error may be at most twice that of the plain call in the same dtype, plus one rounding of
    the result, or of the ``terms`` that it sums, which may cancel.
    """
    want = outcome(call, list(inputs), options)
    with qkv.accelerate() as report:
        got = outcome(call, list(inputs), options)
    assert got.error == want.error
    if want.error:
        return report
    wide = {name: cast(value, torch.float64) for name, value in options.items()}
    exact = outcome(call, [cast(value, torch.float64) for value in inputs], wide)
    eps, terms = torch.finfo(want.results[0].dtype).eps, terms or Terms()
    for ours, theirs, true in zip(got.results, want.results, exact.results, strict=True):
        assert layout(ours) == layout(theirs)
        assert_as_near(ours, theirs, true, eps * (true.nan_to_num().norm().item() + terms.result))
    for ours, theirs, true in zip(got.slopes, want.slopes, exact.slopes, strict=True):
        assert_as_near(ours, theirs, true, eps * (true.nan_to_num().norm().item() + terms.slope))
    return report


def assert_as_near(ours: Tensor, theirs: Tensor, true: Tensor, rounding: float) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    ours, theirs, true = (value.double().nan_to_num() for value in (ours, theirs, true))
    assert (ours - true).norm() <= 2 * (theirs - true).norm() + rounding


SHAPES = [  # query, key, value
    *[((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)), ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))],
    *[((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 8))],
    *[((4, 5, 8), (4, 7, 8), (4, 7, 8)), ((4, 5, 8), (2, 7, 8), (2, 7, 8)), ((5, 8), (7, 8), (7, 8))],
    *[((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)), ((2, 2, 3, 5, 8), (4, 1, 3, 7, 8), (4, 1, 3, 7, 8))],
    *[((2, 3, 5, 8), (3, 7, 8), (3, 7, 8)), ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), ((3, 5, 8), (7, 8), (7, 8))],
    *[((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)), ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8))],
    *[((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)), ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8))],
    *[((2, 3, 5, 8), (2, 3, 7, 6), (2, 3, 7, 8)), ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 6, 8)), ((8,), (8,), (8,))],
]


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A mask of a kind, whose first row hides all keys if there are rows.

    Except with the lowest number: for a row of it alone, torch's backward in fp64, the reference here, takes each
    weight for 1, instead of their sum.
    """
    keep = torch.rand(shape) < 0.6
    if keep.dim() > 1 and keep.numel():
        keep[..., 0, :] = False
    if kind == "the lowest number":
        keep[..., :1] = True
    score = torch.randn(shape).to(dtype)
    return {
        "none": None,
        "boolean": keep,
        "scores": score,
        "scores of fp32": score.float(),
        "learned scores": score.clone().requires_grad_(),
        "minus infinity": score.masked_fill(~keep, -torch.inf),
        "learned, with minus infinity": score.masked_fill(~keep, -torch.inf).requires_grad_(),
        "the lowest number": score.masked_fill(~keep, torch.finfo(dtype).min),
        "integers": keep.long(),
        "scores of fp64": score.double(),
    }[kind]


KINDS = ["none", "boolean", "scores", "scores of fp32", "learned scores", "minus infinity"]
KINDS += ["learned, with minus infinity", "the lowest number", "integers", "scores of fp64"]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_all_combinations_of_arguments_give_the_results_of_torch(shapes: tuple[tuple[int, ...], ...]) -> None:
    choose = random.Random(0).choice
    lq, lk = shapes[0][-2:-1] or (1,), shapes[1][-2:-1] or (1,)
    lead = shapes[0][:-2]
    mask_shapes = [lq + lk, (1, *lk), (*lq, 1), lk, lead + lq + lk, (1,) * len(lead) + lq + lk, (9, *lq, *lk), (4, *lk)]
    for kind in KINDS:
        for shape in mask_shapes:
            dtype = choose([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
            tensors = [torch.randn(shape).to(dtype) for shape in shapes]
            if len(lead) == 2 and choose([False, True]):
                tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
            needs_grad = choose([False, True])
            assert_as_plain(
                F.scaled_dot_product_attention,
                *(x.requires_grad_(needs_grad) for x in tensors),
                terms=terms_of(*tensors),
                attn_mask=mask_of(kind, shape, dtype),
                is_causal=choose([False, True] if kind == "none" else [False] * 5 + [True]),
                scale=choose([None, None, 0.3, -1.0, 0.0]),
                enable_gqa=choose([False, True]),
            )


ROUTED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 4, 5, 8), {}),
    "causal, more keys than queries": ((2, 4, 9, 8), {"is_causal": True}),
    "grouped heads": ((2, 2, 5, 8), {"enable_gqa": True}),
    "boolean mask": ((2, 4, 5, 8), {"attn_mask": torch.ones(5, 5).tril().bool()}),
    "float mask": ((2, 4, 5, 8), {"attn_mask": torch.randn(2, 1, 5, 5)}),
    "learned mask": ((2, 4, 5, 8), {"attn_mask": torch.randn(4, 5, 5).requires_grad_()}),
    "scale": ((2, 4, 5, 8), {"scale": 0.5}),
}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supported_calls_are_routed(name: str, dtype: torch.dtype) -> None:
    shape, options = ROUTED[name]
    q, k = torch.randn(2, 4, 5, 8).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()
    options = {name: cast(option, dtype) for name, option in options.items()}
    report = assert_as_plain(bound_early, q, k, k, **options)
    assert (report.routed, report.fallback) == (1, 0), str(report)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 2, 3, 5, 8)], ids=str)
def test_calls_with_fewer_or_more_than_four_dimensions_are_routed(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    assert assert_as_plain(bound_early, q, q, q, is_causal=True, terms=terms_of(q, q, q)).routed == 1


FALLBACK: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fp64": (lambda q: bound_early(q.double(), q.double(), q.double()), "no fp64"),
    "vmap": (lambda q: torch.vmap(lambda x: bound_early(x, x, x))(q[None]), ""),
    "torch.func.grad": (lambda q: torch.func.grad(lambda x: bound_early(x, q, q).sum())(q), "functorch"),
    "forward mode": (lambda q: slope(q), "no forward-mode"),
    "a dispatch mode": (lambda q: counted(q), "another dispatch mode is active"),
    "a mask of a subclass": (lambda q: own_class(q), "tensor subclasses"),
    "a strided last dimension": (lambda q: bound_early(q, q.mT.contiguous().mT, q), "last dimension"),
    "the unfused kernel": (lambda q: unfused(q), "sdpa_kernel excludes fused kernels"),
    "our own call of torch": (lambda q: qkv.attention(q, q, q, backend="sdpa"), "own call"),
    "dropout of everything": (lambda q: bound_early(q, q, q, dropout_p=1.0), "dropout must be"),
    "nested tensors": (lambda q: nested(q), ""),
    "meta tensors": (lambda q: bound_early(*[q.to("meta")] * 3).shape, ""),
}


def own_class(q: Tensor) -> Tensor:
    class Own(Tensor):
        pass

    return bound_early(q, q, q, torch.ones(5, 5).tril().bool().as_subclass(Own)).as_subclass(Tensor)


def slope(q: Tensor) -> Tensor | None:
    with forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        return forward_ad.unpack_dual(bound_early(dual, q, q, dropout_p=1e-30)).tangent


def counted(q: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        bound_early(q, q, q)
    return counter.get_total_flops()


def unfused(q: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        out = bound_early(q := q.clone().requires_grad_(), q, q)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)[0]


def nested(q: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([q[0], q[1]])
    return bound_early(rows, rows, rows).to_padded_tensor(0.0)


@pytest.mark.parametrize("name", FALLBACK)
@pytest.mark.filterwarnings("ignore")  # of torch's own making
def test_other_calls_fall_back_to_torch_with_the_same_bits(name: str, solved: list[Tensor]) -> None:
    call, reason = FALLBACK[name]
    q = torch.randn(2, 3, 5, 8)
    want = call(q)
    with qkv.accelerate() as report:
        got = call(q)
    assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
    assert report.routed == 0 and len(solved) == 0
    assert all(call.reason is not None and reason in call.reason for call in report.calls), str(report)
    assert report.fallback > 0 or not reason


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore")  # of the compilers' own making
def test_compiled_traced_and_exported_models_fall_back_to_torch(training: bool) -> None:
    model = Attend().train(training)
    x = torch.randn(2, 9, 16)
    want, plain = model(x), torch.export.export(model, (x,)).graph_module.code
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with qkv.accelerate() as report:
        torch.testing.assert_close(compiled(x), want)
        assert torch.export.export(model, (x,)).graph_module.code == plain
    assert report.routed == 0
    with qkv.accelerate():
        assert "aten::scaled_dot_product_attention" in str(torch.jit.trace(model, x).inlined_graph)
        assert "aten._scaled_dot_product_flash_attention_for_cpu" in make_fx(model)(x).code
    qkv.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.compile(lambda x: model(x).sin(), backend="aot_eager")(x), want.sin())


def samples(name: str, dtype: torch.dtype, needs_grad: bool) -> list[Any]:
    """The sample inputs of an operator in torch's own tests."""
    from torch.testing._internal.common_methods_invocations import op_db

    operator = next(operator for operator in op_db if operator.name == f"nn.functional.{name}")
    return list(operator.sample_inputs("cpu", dtype, requires_grad=needs_grad))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.bfloat16, torch.float64))],
)
@pytest.mark.filterwarnings("ignore")  # of torch.testing
def test_sample_inputs_of_torch_give_its_results(dtype: torch.dtype) -> None:
    routed = fallback = 0
    for needs_grad in (True, False):
        for sample in samples("scaled_dot_product_attention", dtype, needs_grad):
            options = sample.kwargs | {"dropout_p": 0.0}  # draws differ; dropout has tests of its own
            terms = terms_of(sample.input, *sample.args)
            report = assert_as_plain(bound_early, sample.input, *sample.args, **options, terms=terms)
            routed, fallback = routed + report.routed, fallback + report.fallback
        for sample in samples("multi_head_attention_forward", dtype, needs_grad):
            # At most 1: products of three numbers of 9 leave nothing of a softmax but its largest weight.
            sample = sample.transform(lambda x: x.detach().div(9).requires_grad_(needs_grad))
            call = F.multi_head_attention_forward
            assert_as_plain(call, sample.input, *sample.args, **sample.kwargs)
            options = sample.kwargs | {"need_weights": False, "training": False}
            report = assert_as_plain(call, sample.input, *sample.args, **options)
            routed, fallback = routed + report.routed, fallback + report.fallback
    assert fallback > 0 and (routed > 0) == (dtype is not torch.float64)


MODULES: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "length first": {},
    "other widths": {"batch_first": True, "kdim": 12, "vdim": 20},
    "no bias": {"batch_first": True, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "odd heads": {"batch_first": True, "num_heads": 3},
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_multihead_attention_gives_the_results_of_torch(name: str, mode: str) -> None:
    module = nn.MultiheadAttention(**{"embed_dim": 24, "num_heads": 4, **MODULES[name]}).train(mode == "training")
    wide = copy.deepcopy(module).double()
    widths = (24, module.kdim, module.vdim)
    first = (3, 7) if module.batch_first else (7, 3)
    per_head = torch.rand(3 * module.num_heads, 7, 7) < 0.3
    padding = torch.arange(7) > torch.tensor([[6], [4], [2]])
    causal = torch.ones(7, 7).triu(1).bool()
    routed = 0

    def call(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = (wide if inputs[0].dtype is torch.float64 else module)(*inputs, **options)
        return found

    for shape in (first, (7,)):
        x = torch.randn(*shape, 24)
        inputs = [x] * 3 if widths == (24,) * 3 else [x, *(torch.randn(*shape, width) for width in widths[1:])]
        masks = [{}, {"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}, {"attn_mask": torch.randn(7, 7)}]
        if shape == first:
            masks += [{"key_padding_mask": padding}, {"attn_mask": per_head}]
            masks += [{"attn_mask": causal, "key_padding_mask": padding}]
        for options in masks:
            for need_weights in ({"need_weights": False}, {"need_weights": True, "average_attn_weights": False}):
                with torch.set_grad_enabled(mode == "training"):
                    routed += assert_as_plain(call, *inputs, **options, **need_weights).routed
    assert routed >= 4


def test_fused_inference_is_routed_unless_torch_returns_nan() -> None:
    module, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(3, 6, 16)
    causal, per_head = torch.ones(6, 6).triu(1).bool(), torch.rand(6, 6, 6) < 0.3
    padding, empty = (torch.arange(6) >= torch.tensor([[6], [4], [last]]) for last in (2, 0))
    masks: list[tuple[dict[str, Any], str]] = [({}, ""), ({"attn_mask": causal}, ""), ({"attn_mask": per_head}, "")]
    masks += [({"key_padding_mask": padding}, ""), ({"key_padding_mask": padding, "attn_mask": causal}, "")]
    masks += [({"key_padding_mask": empty}, "a query sees no key"), ({"attn_mask": causal | True}, "sees no key")]
    masks += [({"need_weights": True}, "need_weights=True")]
    for context in (torch.no_grad, torch.inference_mode):
        for options, reason in masks:
            with context():
                want = module(x, x, x, **{"need_weights": False, **options})[0]
                with qkv.accelerate() as report:
                    got = module(x, x, x, **{"need_weights": False, **options})[0]
            torch.testing.assert_close(got, want, equal_nan=True)
            assert layout(got) == layout(want)
            (call,) = report.calls
            assert "torch.nn.modules.activation" in call.where
            assert reason in call.reason if reason and call.reason else call.reason is None and not reason
            assert want.isnan().any() == ("sees no key" in reason)


def test_fused_inference_with_other_keys_falls_back_to_torch() -> None:
    x, y = torch.randn(2, 3, 5, 16)
    module = nn.MultiheadAttention(16, 2)
    weights = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    with torch.no_grad():
        want = torch._native_multi_head_attention(x, y, y, 16, 2, *weights, None, False)[0]
        with qkv.accelerate() as report:
            assert torch.equal(torch._native_multi_head_attention(x, y, y, 16, 2, *weights, None, False)[0], want)
    assert (report.routed, report.fallback) == (0, 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_with_fused_layers_and_nested_tensors() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    with torch.no_grad():
        want, padded = encoder(x), encoder(x, src_key_padding_mask=padding)
        with qkv.accelerate() as report:
            torch.testing.assert_close(encoder(x), want)
            assert (report.routed, report.fallback) == (2, 0)
            assert torch.equal(encoder(x, src_key_padding_mask=padding), padded)  # zeros where there is padding
            assert (report.routed, report.fallback) == (2, 0)
    qkv.accelerate(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), want)
        assert torch.equal(encoder(x, src_key_padding_mask=padding), padded)


class Attend(nn.Module):
    """A module that calls torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return bound_early(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def call_of_attention(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_function_is_routed_under_every_name() -> None:
    q = torch.randn(1, 2, 5, 8)
    calls: list[Callable[[Tensor], Tensor]] = [call_of_attention, torch.jit.script(call_of_attention)]
    names = [bound_early, functools.partial(bound_early), torch.ops.aten.scaled_dot_product_attention]
    calls += [lambda q, name=name: name(q, q, q) for name in names]
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        for call in calls:
            with context(), qkv.accelerate() as report:
                call(q + 0)
            assert report.routed == 1, call


def test_leaving_a_block_restores_the_state_before_also_after_errors(solved: list[Tensor]) -> None:
    q = torch.randn(1, 2, 5, 8)
    with qkv.accelerate() as outer:
        with qkv.accelerate() as inner:
            bound_early(q, q, q)
        with pytest.raises(RuntimeError, match="Expected size"), qkv.accelerate():
            bound_early(q, q[..., :4], q)
        bound_early(q, q, q)
    assert (inner.routed, outer.routed, len(solved)) == (1, 1, 2)
    with pytest.raises(ZeroDivisionError), qkv.accelerate():
        _ = 1 / 0
    bound_early(q, q, q)
    assert len(solved) == 2


def test_a_block_is_in_effect_in_its_thread_only(solved: list[Tensor]) -> None:
    q, entered, done = torch.randn(1, 2, 5, 8), threading.Event(), threading.Event()

    def other() -> None:
        with qkv.accelerate():
            entered.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    want = bound_early(q, q, q)
    assert len(solved) == 0
    with qkv.accelerate():
        bound_early(q, q, q)
    assert len(solved) == 1
    done.set()
    thread.join()
    assert torch.equal(bound_early(q, q, q), want) and len(solved) == 1


def test_threads_inside_and_outside_of_blocks_do_not_disturb_each_other() -> None:
    q, module = torch.randn(1, 2, 5, 8), nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x, stop, errors = torch.randn(1, 5, 16), threading.Event(), []
    want = bound_early(q, q, q)

    def outside() -> None:
        with torch.no_grad():
            while not stop.is_set():
                module(x, x, x, need_weights=False)
                if not torch.equal(bound_early(q, q, q), want):
                    errors.append("routed")

    threads = [threading.Thread(target=outside) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        with qkv.accelerate() as report:
            bound_early(q, q, q)
        assert report.routed == 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_model_is_accelerated_in_place_and_back(solved: list[Tensor]) -> None:
    model, x = nn.Sequential(Attend(), Attend()), torch.randn(2, 9, 16)
    want = model(x)
    assert qkv.accelerate(qkv.accelerate(model)) is model
    torch.testing.assert_close(model(x), want)
    assert len(solved) == 2
    model[0](x), model[1].forward(x)  # on its own, and past __call__
    assert len(solved) == 4
    assert "causal" in inspect.signature(model[0].forward).parameters
    assert model[0].forward.__name__ == "forward"
    with qkv.accelerate() as report:
        model(x)
    assert report.routed == 2
    assert qkv.accelerate(model, enabled=False) is model
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(x), want) and len(solved) == 6
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got int"):
        qkv.accelerate(3)


def test_copies_and_pickles_of_a_model_are_accelerated_and_independent(solved: list[Tensor]) -> None:
    model, x = qkv.accelerate(nn.Sequential(Attend())), torch.randn(2, 9, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    nn.init.zeros_(model[0].project.weight)
    nn.init.zeros_(model[0].project.bias)
    for number, copied in enumerate(copies, 1):
        assert copied(x).abs().max() > 0 and len(solved) == number
        assert list(copied.state_dict()) == list(model.state_dict())
        assert "forward" not in vars(qkv.accelerate(copied, enabled=False)[0])


def test_pickles_of_torchs_encoders_are_accelerated(solved: list[Tensor]) -> None:
    """They contain a module list, which has no forward to pickle."""
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    model = qkv.accelerate(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want, count = model(x), len(solved)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), want) and len(solved) == 2 * count > 0


def test_a_forward_that_changes_later_takes_effect(solved: list[Tensor]) -> None:
    class Other(Attend):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model, x = qkv.accelerate(Attend()), torch.randn(2, 9, 16)
    want = model(x)
    model.__class__ = Other
    torch.testing.assert_close(model(x), want + 1)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    traced, y = qkv.accelerate(graph), torch.randn(2, 3)
    out = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(out):
        out.args = (graph.graph.call_function(torch.mul, (out.args[0], 2)),)
    before = traced(y)
    graph.recompile()
    torch.testing.assert_close(traced(y), 2 * before)
    assert len(solved) == 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_an_accelerated_model_can_be_exported(strict: bool) -> None:
    model, x = qkv.accelerate(nn.Sequential(Attend())), torch.randn(2, 9, 16)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


def test_lazily_negated_tensors_fall_back_to_torch(solved: list[Tensor]) -> None:
    q, score = torch.randn(1, 2, 5, 8), torch.randn(5, 5, dtype=torch.complex64).conj().imag
    assert score.is_neg()
    want = F.scaled_dot_product_attention(q, q, q, attn_mask=score)
    with qkv.accelerate() as report:
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, attn_mask=score), want)
        got = F.scaled_dot_product_attention(q, torch._neg_view(q), q)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, -q, q))
    assert (report.routed, report.fallback) == (0, 2) and not solved


def test_a_forward_set_on_an_instance_is_kept() -> None:
    model = Attend()
    model.forward = own = lambda x: x + 1
    assert qkv.accelerate(model)(torch.zeros(1)) == 1
    assert qkv.accelerate(model, enabled=False).forward is own


def test_activation_checkpoints_recompute_what_they_saved(solved: list[Tensor]) -> None:
    block, x = qkv.accelerate(Attend()), torch.randn(2, 9, 16, requires_grad=True)
    for reentrant in (True, False):
        x.grad = None
        with set_checkpoint_early_stop(False):
            checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(x.grad, torch.autograd.grad(block(x).square().sum(), x)[0])
    assert len(solved) == 6


def test_a_second_derivative_is_refused_and_not_dropped() -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    with qkv.accelerate():
        (first,) = torch.autograd.grad(bound_early(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), x)


def test_dropout_drops_the_expected_fraction_and_scales_the_rest() -> None:
    count, rate = 200, 0.3
    q, eye = torch.zeros(2, 2, count, 8, requires_grad=True), torch.eye(count).expand(2, 2, -1, -1)
    torch.manual_seed(5)
    with qkv.accelerate() as report:
        weights = bound_early(q, q, eye, dropout_p=rate)
        torch.manual_seed(5)
        again = bound_early(q, q, eye, dropout_p=rate)
        other = bound_early(q, q, eye, dropout_p=rate)
    assert report.routed == 3 and torch.equal(weights, again) and not torch.equal(weights, other)
    kept = weights[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / count / (1 - rate)))
    draws = weights.numel()
    deviation = (rate * (1 - rate) / draws) ** 0.5
    assert abs(1 - kept.numel() / draws - rate) < 5 * deviation


def test_autocast_has_the_dtype_of_torch() -> None:
    q = torch.randn(2, 3, 5, 8)
    with torch.autocast("cpu"):
        report = assert_as_plain(bound_early, q, q, q, attn_mask=torch.randn(5, 5))
    assert report.routed == 1


def test_the_report_is_a_table_of_calls_and_reasons() -> None:
    q = torch.randn(1, 2, 5, 8)
    with qkv.accelerate() as report:
        assert "need_weights=False" in str(report)
        for x in (q, q, q.double()):
            bound_early(x, x, x)
    head, routed, fallback = str(report).splitlines()
    assert head.split() == ["calls", "where", "query", "key", "by"]
    assert (
        routed.startswith("2 ")
        and "test_the_report_is_a_table_of_calls_and_reasons" in routed
        and routed.endswith("qkv")
    )
    assert fallback.startswith("1 ") and fallback.endswith("(1, 2, 5, 8)  (1, 2, 5, 8)  torch: the kernel has no fp64")
    assert (report.routed, report.fallback) == (2, 1)
