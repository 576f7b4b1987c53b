"""`project` skips `Module.__call__` of unmodified linear layers only, for every public way to modify one."""

import copy
import functools
from collections.abc import Callable
from typing import Any

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
from qkv.convert import convert_layer, prune_heads
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
