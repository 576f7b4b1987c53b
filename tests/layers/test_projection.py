"""`project` skips `Module.__call__` of unmodified linear layers only, for every public way to modify one.

And torch's product, where the kernel is faster: the tests of few rows take the kernel for all that it can compute.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import qkv
from qkv import kernels
from qkv.convert import convert_layer, prune_heads
from qkv.kernels import linear as linear_kernel
from qkv.layers.projection import project, reroute

NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def by_modules(layer: qkv.Attention, x: Tensor) -> Tensor:
    """The function of the layer, by calls of its modules."""

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(layer.q_proj(x)), heads(layer.k_proj(x)), heads(layer.v_proj(x))
    out: Tensor = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return out


def linears(layer: qkv.Attention) -> list[nn.Linear]:
    return [getattr(layer, name) for name in NAMES]


def each(change: Callable[[nn.Linear], Any]) -> Callable[[qkv.Attention], None]:
    def change_all(layer: qkv.Attention) -> None:
        for linear in linears(layer):
            change(linear)

    return change_all


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[qkv.Attention], None]:
    def replace(layer: qkv.Attention) -> None:
        for name in NAMES:
            setattr(layer, name, make(getattr(layer, name)))

    return replace


def double(*call: Any) -> Tensor:
    result: Tensor = call[-1]
    return 2 * result


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Lora(nn.Module):
    """A wrapper as in peft: it contains the layer and forwards ``weight``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.up, self.down = base, nn.Linear(32, 4), nn.Linear(4, 32)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.down(self.up(x))
        return out


class Scaled(Tensor):
    """Quantised weights as in torchao: a tensor subclass that implements its own products."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> "Scaled":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=codes.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda x: 2 * x.codes if isinstance(x, cls) else x, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return cls(out / 2) if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else out


def by_plain_attribute(linear: nn.Linear) -> None:
    """Sets the weight as an attribute, as MAML and WeightDrop do."""
    for name in ("weight", "bias"):
        value = 2.0 * getattr(linear, name)
        delattr(linear, name)
        setattr(linear, name, value)


def behind_a_parameter(linear: nn.Linear) -> None:
    linear.__dict__["weight"] = 2.0 * linear.weight


def by_buffer(linear: nn.Linear) -> None:
    value = 2.0 * linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", value)


def own_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: 2 * F.linear(x, linear.weight, linear.bias)  # type: ignore[method-assign]


def quantise(layer: qkv.Attention) -> None:
    torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True)


# Each changes what the four modules compute when they are called.
CHANGES: dict[str, Callable[[qkv.Attention], None]] = {
    "forward hook": each(lambda linear: linear.register_forward_hook(double)),
    "forward hook with kwargs": each(lambda linear: linear.register_forward_hook(double, with_kwargs=True)),
    "forward hook, always called": each(lambda linear: linear.register_forward_hook(double, always_call=True)),
    "forward pre-hook": each(lambda linear: linear.register_forward_pre_hook(lambda _, args: (2 * args[0],))),
    "own forward": each(own_forward),
    "subclass": each(lambda linear: setattr(linear, "__class__", Subclass)),
    "parametrization": each(lambda linear: parametrize.register_parametrization(linear, "weight", Doubled())),
    "weight_norm": each(lambda linear: scaled_norm(parametrizations.weight_norm(linear))),
    "spectral_norm": each(lambda linear: parametrizations.spectral_norm(linear).eval()),  # training moves it
    "pruning": each(lambda linear: prune.l1_unstructured(linear, "weight", 0.5)),
    "plain attributes": each(by_plain_attribute),
    "an attribute before the parameter": each(behind_a_parameter),
    "buffer": each(by_buffer),
    "wrapped": replaced(lambda linear: nn.Sequential(linear, nn.Tanh())),
    "LoRA": replaced(Lora),
    "weights of a class of their own": each(
        lambda linear: setattr(linear, "weight", nn.Parameter(Scaled(linear.weight.detach()), requires_grad=False))
    ),
    "dynamic quantisation": quantise,
    "no bias any more": each(lambda linear: (nn.init.ones_(linear.bias), setattr(linear, "bias", None))),
    # What linear.compile() sets; dynamo itself has nothing to compile in a linear layer alone.
    "compiled": each(lambda linear: setattr(linear, "_compiled_call_impl", doubling(linear._call_impl))),
}


def scaled_norm(linear: nn.Module) -> None:
    nn.init.constant_(linear.parametrizations.weight.original0, 3.0)  # type: ignore[arg-type,union-attr]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
def test_modified_modules_are_called(name: str) -> None:
    layer = qkv.MultiHeadAttention(32, 4)
    nn.init.normal_(layer.q_proj.bias)
    before = layer(X)
    torch.testing.assert_close(before, by_modules(layer, X))
    CHANGES[name](layer)
    got = layer(X)
    torch.testing.assert_close(got, by_modules(layer, X))
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
def test_modules_that_were_rerouted_compute_what_was_changed(name: str) -> None:
    """Whether they were changed before or after."""

    def made(*changes: Callable[[qkv.Attention], Any]) -> Tensor:
        torch.manual_seed(0)
        layer = qkv.MultiHeadAttention(32, 4)
        nn.init.normal_(layer.q_proj.bias)
        for change in changes:
            torch.manual_seed(1)
            change(layer)
        torch.testing.assert_close(layer(X), by_modules(layer, X))
        return by_modules(layer, X)

    want = made(CHANGES[name])
    torch.testing.assert_close(made(reroute, CHANGES[name]), want)
    torch.testing.assert_close(made(CHANGES[name], reroute), want)


def test_hooks_of_a_module_are_called() -> None:
    calls: list[str] = []
    layer = qkv.MultiHeadAttention(32, 4)
    for linear in linears(layer):
        linear.register_full_backward_hook(lambda *_: calls.append("full backward"))
        linear.register_full_backward_pre_hook(lambda *_: calls.append("full backward pre"))
    layer(X.clone().requires_grad_()).sum().backward()
    assert sorted(calls) == ["full backward"] * 4 + ["full backward pre"] * 4


GLOBAL_HOOKS: list[Callable[..., Any]] = [
    torch_module.register_module_forward_pre_hook,
    torch_module.register_module_forward_hook,
    torch_module.register_module_full_backward_hook,
    torch_module.register_module_full_backward_pre_hook,
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_all_modules_are_called(register: Callable[..., Any]) -> None:
    layer, called = qkv.MultiHeadAttention(32, 4), []
    handle = register(lambda module, *_: called.append(module))
    try:
        layer(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert all(linear in called for linear in linears(layer))


def doubling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Linear, "forward"),
        (nn.Linear, "__call__"),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        (F, "linear"),
    ],
)
def test_patches_of_torch_are_called(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    linear = nn.Linear(32, 32)
    plain = linear(X)
    monkeypatch.setattr(owner, name, doubling(getattr(owner, name)))
    assert torch.equal(project(linear, X), 2 * plain)
    monkeypatch.undo()
    assert torch.equal(project(linear, X), plain)


def test_patches_from_before_the_import_are_called() -> None:
    """In a new process: a function that is already patched on import is not taken for that of torch."""
    import subprocess
    import sys

    program = """
import functools, torch
own = torch.nn.Linear.forward
torch.nn.Linear.forward = functools.wraps(own)(lambda self, x: 2 * own(self, x))
from qkv.layers.projection import project
linear, x = torch.nn.Linear(3, 3), torch.ones(3)
assert torch.equal(project(linear, x), 2 * own(linear, x))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


class Counted(TorchFunctionMode):
    def __init__(self) -> None:
        self.functions: list[Any] = []
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        self.functions: list[Any] = []
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counted, Recorded])
def test_modes_see_the_operators_of_a_module_call(mode: type[Counted] | type[Recorded]) -> None:
    linear = nn.Linear(32, 32)
    with mode() as ours:
        project(linear, X)
    with mode() as theirs:
        linear(X)
    assert ours.functions[-1] == theirs.functions[-1] and ours.functions


@pytest.mark.filterwarnings("ignore")  # torch's own, of forward mode
def test_functional_calls_and_transforms_use_the_weights_passed() -> None:
    layer = qkv.MultiHeadAttention(32, 4)
    parameters = {name: 2 * parameter.detach() for name, parameter in layer.named_parameters()}
    doubled = copy.deepcopy(layer)
    doubled.load_state_dict(parameters)
    torch.testing.assert_close(torch.func.functional_call(layer, parameters, (X,)), doubled(X))
    stacked = {name: torch.stack([value, value / 2]) for name, value in parameters.items()}
    each_of_two = torch.vmap(lambda given: torch.func.functional_call(layer, given, (X,)))(stacked)
    torch.testing.assert_close(each_of_two, torch.stack([doubled(X), layer(X)]))
    step = (X,), (torch.ones_like(X),)
    torch.testing.assert_close(
        torch.func.jvp(lambda x: project(layer.q_proj, x), *step), torch.func.jvp(layer.q_proj, *step)
    )


def test_autocast_and_dtypes_are_those_of_a_module_call() -> None:
    linear = nn.Linear(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(linear, X), linear(X))
    wide = copy.deepcopy(linear).double()
    assert torch.equal(project(wide, X.double()), wide(X.double()))


def test_a_replica_of_data_parallel_computes_the_same() -> None:
    """Made as by ``torch.nn.parallel.replicate``, which itself needs GPUs."""
    layer = qkv.MultiHeadAttention(32, 4)
    modules = list(layer.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.0)
    assert torch.equal(replicas[id(layer)](X), layer(X))


def fsdp1(layer: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(layer, device_id=torch.device("cpu"), **options)


def fsdp1_each(layer: qkv.Attention) -> nn.Module:
    for name in NAMES:
        setattr(layer, name, fsdp1(getattr(layer, name)))
    return fsdp1(layer)


def fsdp2(layer: qkv.Attention) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for linear in linears(layer):
        fully_shard(linear, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    return layer


def mixed(layer: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecision

    return fsdp1(layer, mixed_precision=MixedPrecision(torch.bfloat16, buffer_dtype=torch.bfloat16))


WRAPPERS: dict[str, Callable[[qkv.Attention], nn.Module]] = {
    "FSDP1": fsdp1,
    "FSDP1 with the parameters as they are": lambda layer: fsdp1(layer, use_orig_params=True),
    "FSDP1 of each": fsdp1_each,
    "FSDP1 in bf16": mixed,
    "FSDP2": fsdp2,
    "DDP": nn.parallel.DistributedDataParallel,
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, of a group of one
def test_sharded_and_replicated_layers_compute_the_same(name: str, one_process: None) -> None:
    layer = qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8), qk_norm=True, sink_logits=True, alibi=[1.0] * 4)
    x = X.repeat(1, 60, 1)
    want = copy.deepcopy(layer)
    wrapped = WRAPPERS[name](layer)
    got = wrapped(x)
    if name == "FSDP1 in bf16":
        assert torch.equal(got, want.bfloat16()(x.bfloat16()))
        return
    torch.testing.assert_close(got, want(x))
    got.square().sum().backward()
    want(x).square().sum().backward()
    total = sum(parameter.grad.sum() for parameter in want.parameters())  # type: ignore[union-attr]
    found = sum(parameter.grad.sum() for parameter in wrapped.parameters())  # type: ignore[union-attr]
    found = found.full_tensor() if hasattr(found, "full_tensor") else found  # type: ignore[union-attr]
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-3)


def as_torchs(layer: qkv.Attention) -> Callable[[Tensor], Tensor]:
    module = layer.to_torch()
    return lambda x: module(x, x, x)[0]


COPIES: dict[str, Callable[[qkv.Attention], Callable[[Tensor], Tensor]]] = {
    "to_torch": as_torchs,
    "convert_layer": lambda layer: convert_layer(layer, 4),
    "convert_layer, aligned": lambda layer: convert_layer(layer, 4, how="aligned"),
    "prune_heads": lambda layer: prune_heads(layer, []),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
def test_conversions_copy_effective_weights_or_refuse(name: str) -> None:
    for change in ("parametrization", "weight_norm", "pruning", "plain attributes", "no bias any more"):
        layer = qkv.MultiHeadAttention(32, 4)
        CHANGES[change](layer)
        torch.testing.assert_close(COPIES[name](layer)(X), layer(X))
    for change in ("subclass", "LoRA", "wrapped", "dynamic quantisation"):
        layer = qkv.MultiHeadAttention(32, 4)
        CHANGES[change](layer)
        with pytest.raises(
            TypeError, match=r"q_proj must be an nn\.Linear with the forward of nn\.Linear; got .*\. Merge adapters"
        ):
            COPIES[name](layer)


def test_from_torch_copies_effective_weights() -> None:
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    parametrize.register_parametrization(theirs, "in_proj_weight", Doubled())
    parametrize.register_parametrization(theirs.out_proj, "weight", Doubled())
    torch.testing.assert_close(qkv.MultiHeadAttention.from_torch(theirs)(X), theirs(X, X, X)[0])


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the kernel computes, of whatever size."""
    computed: list[Tensor] = []

    def fast_linear(*tensors: Any) -> Tensor | None:
        out = kernels.linear.fast_linear(*tensors)
        computed.extend([] if out is None else [out])
        return out

    monkeypatch.setattr(kernels, "is_faster", lambda x, weight: True)
    monkeypatch.setattr(kernels, "fast_linear", fast_linear)
    return computed


has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_project is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)


@has_fast_path
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
def test_modified_modules_are_called_with_few_rows(name: str, products: list[Tensor]) -> None:
    layer = qkv.MultiHeadAttention(32, 4)
    x = X[0, :3]
    with torch.no_grad():
        torch.testing.assert_close(project(layer.q_proj, x), layer.q_proj(x))
        assert len(products) == 1
        CHANGES[name](layer)
        torch.testing.assert_close(project(layer.q_proj, x), layer.q_proj(x))
    is_plain = name == "no bias any more"
    assert len(products) == 1 + is_plain


def tied(linear: nn.Linear) -> nn.Linear:
    other = nn.Linear(32, 32)
    other.weight = linear.weight
    return other


def sliced(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(torch.randn(40, 50)[4:36, 7:39])
    return linear


def replaced_data(linear: nn.Linear) -> nn.Linear:
    linear.weight.data = torch.randn(32, 32)
    return linear


def loaded_state(linear: nn.Linear) -> nn.Linear:
    linear.load_state_dict(nn.Linear(32, 32).state_dict(), assign=True)
    return linear


def without_gradient(linear: nn.Linear) -> nn.Linear:
    return linear.requires_grad_(False)


PLAIN: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    "as made": lambda linear: linear,
    "without bias": lambda _: nn.Linear(32, 32, bias=False),
    "tied": tied,
    "rows of a larger matrix": sliced,
    "other data": replaced_data,
    "loaded": loaded_state,
    "copied": copy.deepcopy,
    "shared": nn.Linear.share_memory,
    "evaluated": nn.Linear.eval,
    "bf16": nn.Linear.bfloat16,
    "fp16": nn.Linear.half,
    "frozen": without_gradient,
}


@has_fast_path
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (16, 32), (2, 8, 32), (1, 1, 1, 32)], ids=str)
def test_plain_layers_go_to_the_kernel(name: str, shape: tuple[int, ...], products: list[Tensor]) -> None:
    linear = PLAIN[name](nn.Linear(32, 32))
    x = torch.randn(shape).to(linear.weight.dtype)
    contexts = [torch.no_grad, torch.inference_mode, *([torch.enable_grad] if name == "frozen" else [])]
    for index, context in enumerate(contexts, start=1):
        with context():
            got, want = project(linear, x), linear(x)
        torch.testing.assert_close(got, want)
        assert len(products) == index and got.is_inference() == want.is_inference() and not got.requires_grad


class Doubling(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        return 2 * out.as_subclass(Tensor) if func is F.linear else out


def negated(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def of_double_precision(linear: nn.Linear, x: Tensor) -> Tensor:
    return project(linear.double(), x.double())


def with_transposed_weight(linear: nn.Linear, x: Tensor) -> Tensor:
    linear.weight = nn.Parameter(linear.weight.mT)
    return project(linear, x)


def functional(linear: nn.Linear, x: Tensor) -> Tensor:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return project(self.linear, x)

    weights = {f"linear.{name}": value for name, value in linear.named_parameters()}
    out: Tensor = torch.func.vmap(
        lambda weights: torch.func.functional_call(Projected(), weights, (x,)), randomness="error"
    )({name: value[None] for name, value in weights.items()})
    return out[0]


def with_forward_gradient(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(project(linear, dual))
        assert out.tangent is not None
        return out.primal.clone()


def traced(linear: nn.Linear, x: Tensor) -> Tensor:
    linear.requires_grad_(False)
    out: Tensor = torch.jit.trace(lambda x: project(linear, x), (x,), check_trace=False)(x)
    return out


def in_mode(mode: Callable[[], Any]) -> Callable[[nn.Linear, Tensor], Tensor]:
    def call(linear: nn.Linear, x: Tensor) -> Tensor:
        with mode():
            return project(linear, x)

    return call


# Each is a product that torch computes, or records, and how it differs from the usual one.
WATCHED: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "gradient of the weight": in_mode(torch.enable_grad),
    "gradient of x": in_mode(torch.enable_grad),
    "autocast": in_mode(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "function mode": in_mode(Counted),
    "dispatch mode": in_mode(Recorded),
    "device": in_mode(lambda: torch.device("cpu")),
    "functional call": functional,
    "forward gradient": with_forward_gradient,
    "x of a class of its own": lambda linear, x: project(linear, x.as_subclass(Doubling)) / 2,
    "x negated": lambda linear, x: project(linear, negated(x)),
    "weight transposed": with_transposed_weight,
    "fp64": of_double_precision,
    "compiled": lambda linear, x: torch.compile(project, backend="eager")(linear, x),
    "traced": traced,
    "17 rows": lambda linear, x: project(linear, x.repeat(6, 1)[:17])[:3],
}


@has_fast_path
@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.filterwarnings("ignore")  # torch's own, of tracing and forward mode
def test_torch_computes_what_is_watched(name: str, products: list[Tensor]) -> None:
    linear, x = nn.Linear(32, 32), X[0, :3].clone()
    if name == "gradient of x":
        linear.requires_grad_(False)
        x.requires_grad_()
    with torch.no_grad():
        if name == "weight transposed":
            want = F.linear(x, linear.weight.mT, linear.bias)
        else:
            want = linear(x)
        got = WATCHED[name](linear, x)
    assert not products
    assert got.requires_grad == name.startswith("gradient")
    tolerance = 0.05 if name == "autocast" else 1e-5
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@has_fast_path
def test_without_memory_or_with_other_widths_torch_raises(products: list[Tensor]) -> None:
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            project(linear, torch.randn(3, 31))
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            project(linear, X[0].bfloat16())
        freed = nn.Linear(32, 32)
        freed.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
            project(freed, X[0])
        assert project(linear.to("meta"), X[0].to("meta")).is_meta
        assert project(linear, torch.randn(0, 32, device="meta")).shape == (0, 32)
    assert not products


@has_fast_path
def test_patches_of_torchs_product_are_called_with_few_rows(
    monkeypatch: pytest.MonkeyPatch, products: list[Tensor]
) -> None:
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        plain = linear(X[0])
        monkeypatch.setattr(F, "linear", doubling(F.linear))
        assert torch.equal(project(linear, X[0]), 2 * plain)
    assert not products


@has_fast_path
def test_layers_take_the_kernel_where_it_is_faster() -> None:
    layer = qkv.CausalAttention(512, 4).bfloat16()
    x = torch.randn(1, 1, 512, dtype=torch.bfloat16)
    weight = layer.q_proj.weight
    with torch.no_grad(), kernels.use(kernels.loaded()._replace(isa="avx2")):
        assert kernels.is_faster(x, weight)
        assert torch.equal(project(layer.q_proj, x), kernels.fast_linear(x, weight, layer.q_proj.bias))
        torch.testing.assert_close(layer(x), layer.float()(x.float()).bfloat16(), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_programs_of_accelerated_layers_in_bf16_contain_the_operator_for_few_rows_of_large_weights() -> None:
    torch.compiler.reset()
    found: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, example: object) -> object:
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    model = qkv.accelerate(nn.Sequential(nn.Linear(576, 576, dtype=torch.bfloat16)))
    program = torch.compile(model, backend=record, fullgraph=True, dynamic=False)
    with mock.patch.dict(
        linear_kernel._FEWEST, {(kernels.loaded().isa, torch.bfloat16): (linear_kernel._NEVER, *[1] * 16)}
    ):
        for rows in (1, 40):
            x = torch.randn(rows, 576, dtype=torch.bfloat16)
            torch.testing.assert_close(program(x), model(x), rtol=2e-2, atol=2e-2)
    assert ["qkv.linear" in names for names in found] == [True, False]
