"""torch.compile, torch.export, torch.func, autocast, copies, pickles and construction without memory."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import qkv
from qkv import Mask

LAYERS: dict[str, Callable[[], qkv.Attention]] = {
    "multi-head": lambda: qkv.MultiHeadAttention(24, 6),
    "causal": lambda: qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4), qk_norm=True),
    "window": lambda: qkv.SlidingWindowAttention(24, 6, 4, value_dim=3, sink_tokens=1),
    "sinks and softcap": lambda: qkv.CausalAttention(24, 6, sink_logits=True, softcap=3.0, alibi=[1.0] * 6),
    "sinks": lambda: qkv.CausalAttention(24, 6, num_kv_heads=1, sink_logits=True),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@each_layer
@pytest.mark.filterwarnings("ignore")  # of the compiler's own dependencies
def test_compiled_without_a_graph_break_it_computes_the_same(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 11, 24, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = layer(x), compiled(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want)))
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(compiled(x), layer(x))


# With gradients, the C++ compiler takes half a minute; what is compiled is the same as without it, above.
@pytest.mark.parametrize("needs_grad", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_to_machine_code_it_computes_the_same(needs_grad: bool) -> None:
    layer, x = LAYERS["causal"]().requires_grad_(needs_grad), torch.randn(2, 11, 24, requires_grad=needs_grad)
    compiled = torch.compile(layer, fullgraph=True)
    mask = Mask.padding(torch.tensor([11, 7]))
    want, got = layer(x, mask=mask), compiled(x, mask=mask)
    torch.testing.assert_close(got, want)
    if needs_grad:
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want)))


# A dtype changes none of what is compiled, but where "auto" leaves fp64 to sdpa: each other pair takes 7 seconds.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float32),
        pytest.param("sdpa", torch.float64, marks=pytest.mark.long),
        pytest.param("reference", torch.float32, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_for_any_number_of_heads_and_with_one_tensor_for_two(backend: str, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return qkv.attention(q, k, k, mask=Mask.causal(), backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for heads, kv_heads in ((4, 4), (6, 2)):
        tensors = [torch.randn(2, n, 5, 8, dtype=dtype, requires_grad=True) for n in (heads, kv_heads)]
        got, want = compiled(*tensors), attend(*tensors)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in (got, want)]
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_exported_with_a_dynamic_length_while_gradients_are_recorded(strict: bool) -> None:
    layer = qkv.CausalAttention(16, 4).double()
    shapes = ({1: torch.export.Dim("length", min=1, max=64)},)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict).module()
    for length in (6, 9):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        torch.testing.assert_close(program(x), layer(x))


CACHES = [qkv.KVCache, qkv.Int8KVCache, lambda: qkv.SlidingKVCache(6)]


@pytest.mark.parametrize("make", CACHES, ids=["kv", "int8", "sliding"])
@pytest.mark.parametrize("grad", [False, True])
def test_caches_under_vmap(make: Callable[[], qkv.KVCache], grad: bool) -> None:
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=2, mask=Mask.causal(6)), torch.randn(3, 2, 5, 24)
    layer.requires_grad_(False)

    def decode(x: Tensor) -> Tensor:
        cache = make()
        return torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1], dim=1)], dim=1)

    with torch.set_grad_enabled(grad):
        got, want = torch.func.vmap(decode)(x), torch.stack([decode(each) for each in x])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


# Each compilation takes a second; of the quick tests, cache/test_model.py compiles a cache that grows.
@pytest.mark.parametrize(
    "cached", ["reserved", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("kv", "sliding"))]
)
@pytest.mark.filterwarnings("ignore")
def test_decoding_steps_do_not_recompile(cached: str) -> None:
    window = 6 if cached == "sliding" else None
    layer = qkv.Attention(24, 6, num_kv_heads=2, mask=Mask.causal(window), rotary=qkv.RotaryEmbedding(4)).eval()
    make = {
        "kv": qkv.KVCache,
        "reserved": lambda: qkv.KVCache(capacity=64),
        "sliding": lambda: qkv.SlidingKVCache(6),
    }[cached]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, cache = torch.randn(2, 60, 24), make()
    with torch.no_grad():
        want = layer(x)
        got = [compiled(x[:, :5], cache=cache)]
        counts = []
        for i in range(5, 60):
            got.append(compiled(x[:, i : i + 1], cache=cache))
            counts.append(counter.frame_count)
    torch.testing.assert_close(torch.cat(got, dim=1), want)
    # Each branch of a cache (append, grow, roll) compiles once, and once more for sizes that vary; then never again.
    assert counts[-1] == counts[30], f"compiled again while decoding: {counts}"
    assert counts[-1] <= {"reserved": 2, "kv": 7, "sliding": 8}[cached], counts


@each_layer
@pytest.mark.filterwarnings("ignore")
def test_exported_it_computes_the_same(name: str) -> None:
    layer, x = LAYERS[name]().eval(), torch.randn(2, 11, 24)
    length = torch.export.Dim("length", min=8, max=100)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    for other in (x, torch.randn(2, 17, 24)):
        torch.testing.assert_close(program.module()(other), layer(other))


@each_layer
def test_vmap_over_a_stack_of_batches_equals_a_loop(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(3, 2, 11, 24)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))


@each_layer
def test_functional_gradients_equal_those_of_autograd(name: str) -> None:
    layer, x = LAYERS[name]().double(), torch.randn(2, 11, 24, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(list(got.values()), list(want))


def test_per_sample_gradients() -> None:
    layer, x = LAYERS["causal"](), torch.randn(3, 7, 24)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        alone = torch.func.grad(loss)(parameters, x[index])
        for name, grad in alone.items():
            torch.testing.assert_close(each[name][index], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of tracing itself
def test_traced_it_computes_the_same_on_other_inputs() -> None:
    layer, x, other = LAYERS["causal"]().eval(), torch.randn(2, 11, 24), torch.randn(2, 11, 24)
    with torch.no_grad():
        for traced in (torch.jit.trace(layer, x), make_fx(layer)(x)):
            torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.filterwarnings("ignore")  # of torch's own making
def test_forward_mode_derivatives_are_right_or_refused_and_never_dropped() -> None:
    q, step = torch.randn(1, 2, 5, 8), torch.full((1, 2, 5, 8), 1e-3)

    def slope(backend: str) -> Tensor | None:
        with forward_ad.dual_level():
            out = qkv.attention(forward_ad.make_dual(q, torch.ones_like(q)), q, q, backend=backend)
            return forward_ad.unpack_dual(out).tangent

    want = (qkv.attention(q + step, q, q) - qkv.attention(q - step, q, q)) / 2e-3
    for backend in ("reference", "auto"):
        torch.testing.assert_close(slope(backend), want, rtol=1e-2, atol=1e-3)
    with pytest.raises(qkv.BackendError, match="no forward-mode derivatives"):
        slope("native")
    with pytest.raises(NotImplementedError):  # torch's own kernel
        slope("sdpa")


@pytest.mark.filterwarnings("ignore")  # of torch's own making
def test_forward_mode_of_functions_jacobians_and_hessians() -> None:
    layer, x = LAYERS["causal"]().eval().double(), torch.randn(1, 3, 24, dtype=torch.float64)
    reverse = torch.func.jacrev(layer)(x)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), reverse)
    _, found = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(found, reverse.sum(dim=(3, 4, 5)))

    def slopes(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    hessian, step = torch.func.hessian(lambda x: layer(x).square().sum())(x).flatten(3).sum(3), 1e-6
    torch.testing.assert_close(hessian, (slopes(x + step) - slopes(x - step)) / (2 * step), rtol=1e-6, atol=1e-6)


@each_layer
def test_under_autocast_it_computes_in_the_lower_precision(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 11, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        scores = torch.randn(1, 2, 3, 4)
        assert qkv.attention(scores, scores, scores).dtype == torch.bfloat16
        mixed = qkv.attention(scores, scores.bfloat16(), scores)
        assert mixed.dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert (out.float() - layer(x)).abs().max() < 0.05 * layer(x).abs().max()
    out.square().sum().backward()


@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_what_is_given_and_nothing_else(backend: str, dtype: torch.dtype) -> None:
    leaves = [torch.randn(2, heads, 11, 8).requires_grad_() for heads in (4, 2, 2)]
    options = {"mask": Mask.causal(7), "softcap": None if backend == "sdpa" else 3.0}
    for call in (qkv.attention_with_lse, lambda q, k, v, **options: (qkv.attention_weights(q, k, **options),)):
        chosen = {"backend": backend} if call is qkv.attention_with_lse else {}
        with torch.autocast("cpu", dtype=dtype):
            found = call(*leaves, **options, **chosen)
        want = call(*(x.to(dtype) for x in leaves), **options, **chosen)
        for got, rounded in zip(found, want, strict=True):
            assert got.dtype is rounded.dtype and torch.equal(got, rounded)
        gradients = [torch.autograd.grad(x[0].float().square().sum(), leaves[:2]) for x in (found, want)]
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@each_layer
def test_deep_copies_pickles_and_state_dicts_compute_the_same(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 11, 24)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    other = LAYERS[name]()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), want)


@each_layer
def test_built_on_meta_and_loaded_later(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.randn(2, 11, 24, device="meta")).shape == (2, 11, 24)
    source = LAYERS[name]()
    layer.load_state_dict(source.state_dict(), assign=True)


def test_the_device_argument_reaches_every_parameter() -> None:
    layer = qkv.Attention(24, 6, qk_norm=True, sink_logits=True, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_hooks_and_replaced_projections_are_honoured() -> None:
    layer, x, calls = qkv.MultiHeadAttention(24, 6), torch.randn(2, 5, 24), []
    layer.q_proj.register_forward_hook(lambda *_: calls.append("hook"))
    layer.k_proj.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    patched = layer.v_proj.forward
    layer.v_proj.forward = lambda x: (calls.append("patched"), patched(x))[1]  # type: ignore[method-assign]
    layer.out_proj = torch.nn.Sequential(layer.out_proj, torch.nn.Identity())
    layer(x)
    assert sorted(calls) == ["hook", "patched", "pre-hook"]
    assert sum(1 for _ in layer.out_proj) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex", "reference"])
def test_on_cuda_it_computes_what_the_reference_does_on_cpu(backend: str) -> None:
    q, k, v = torch.randn(2, 6, 300, 64), torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    for mask in (Mask.full(), Mask.causal(), Mask.causal(40, sink_tokens=2)):
        want = qkv.attention(q, k, v, mask=mask, backend="reference")
        got = qkv.attention(q.cuda(), k.cuda(), v.cuda(), mask=mask, backend=backend)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
