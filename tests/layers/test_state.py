"""Constants of layers, such as frequencies, stay exact in fp32 through casts, meta construction, copies and tracing."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv import Mask
from qkv.layers import constants

SCHEDULE = [1.0, 0.3, 0.01, 0.007]  # not exact in bf16


def build() -> qkv.Attention:
    """A layer with all parameters and constants."""
    return qkv.Attention(
        32,
        4,
        num_kv_heads=2,
        mask=Mask.causal(),
        rotary=qkv.RotaryEmbedding(8, frequencies=SCHEDULE, position_scale=0.7),
        qk_norm=True,
        gate=True,
        sink_logits=True,
        alibi=[1 / 3, 0.1, 0.01, 0.001],
    )


def build_by_base() -> qkv.Attention:
    return qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8, base=500.0))


BUILDERS = [build, build_by_base]
each_layer = pytest.mark.parametrize("make", BUILDERS)


@pytest.fixture(autouse=True)
def empty_cache_of_constants() -> Iterator[None]:
    """Clears the cache of constants, so that tests do not depend on each other."""
    torch.manual_seed(0)
    constants.kept.cache_clear()
    yield
    constants.kept.cache_clear()


def by_buffers(module: nn.Module) -> nn.Module:
    """Casts parameters and buffers one by one, as deepspeed does."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.bfloat16()
    return module


def by_default_dtype(module: nn.Module) -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    return module


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half and back": lambda module: module.half().bfloat16(),
    "_apply": lambda module: module._apply(lambda tensor: tensor.bfloat16()),
    "buffers one by one": by_buffers,
    "attributes that are tensors": lambda module: by_attributes(module),
    "the default dtype": by_default_dtype,
}


def by_attributes(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, value.bfloat16())
    return module


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("given", [None, SCHEDULE])
def test_rotation_stays_in_fp32(cast: str, given: list[float] | None) -> None:
    rotary, x = qkv.RotaryEmbedding(8, frequencies=given), torch.randn(1, 1, 3, 8).bfloat16()
    want, before = rotary(x, 4096), rotary.frequencies
    try:
        got = CASTS[cast](rotary)(x, 4096)
        assert rotary.frequencies.dtype is torch.float32
        assert torch.equal(rotary.frequencies, before)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@each_layer
@pytest.mark.parametrize("cast", ["to", "buffers one by one", "attributes that are tensors"])
def test_a_cast_layer_has_the_positions_of_one_built_in_that_dtype(
    cast: str, make: Callable[[], qkv.Attention]
) -> None:
    layer, x = make(), torch.randn(1, 700, 32).bfloat16()
    layer = CASTS[cast](layer).bfloat16()
    with torch.device("cpu"):
        other = make().bfloat16()
    other.load_state_dict(layer.state_dict())
    other.rotary = make().rotary
    assert torch.equal(layer(x), other(x))
    alibi = make().alibi
    assert alibi is None or torch.equal(layer.alibi, alibi)  # type: ignore[arg-type]


@each_layer
def test_all_tensors_of_a_layer_are_in_its_state_dict(make: Callable[[], qkv.Attention]) -> None:
    layer = make()
    layer(torch.randn(1, 5, 32))
    assert not list(layer.buffers())
    for part in layer.modules():
        assert not [name for name, value in vars(part).items() if isinstance(value, Tensor)]
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


FILLS: dict[str, Callable[[qkv.Attention, dict[str, Tensor]], object]] = {
    "to_empty, load": lambda layer, state: poisoned(layer.to_empty(device="cpu")).load_state_dict(state),
    "assign": lambda layer, state: layer.load_state_dict(state, assign=True),
    "tensor by tensor": lambda layer, state: [
        layer.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], nn.Parameter(value))
        for name, value in state.items()
    ],
}


def poisoned(layer: qkv.Attention) -> qkv.Attention:
    """The layer with NaN in all tensors, since ``to_empty`` leaves them uninitialised."""
    for tensor in [*layer.parameters(), *layer.buffers()]:
        tensor.data.fill_(torch.nan)
    return layer


@each_layer
@pytest.mark.parametrize("fill", FILLS)
def test_a_layer_built_on_meta_and_loaded_computes_the_same(fill: str, make: Callable[[], qkv.Attention]) -> None:
    source, x = make(), torch.randn(2, 50, 32)
    nn.init.normal_(source.q_proj.weight)
    with torch.device("meta"):
        layer = make()
        layer(torch.randn(2, 50, 32))  # as for shape inference; it must leave no state
    FILLS[fill](layer, source.state_dict())
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer.rotary.frequencies, source.rotary.frequencies)  # type: ignore[union-attr]


@each_layer
def test_a_layer_loaded_by_transformers_computes_the_same(make: Callable[[], qkv.Attention], tmp_path: object) -> None:
    import transformers

    class Config(transformers.PreTrainedConfig):  # type: ignore[misc,name-defined]
        model_type = "of_a_layer"

    class Model(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.attention = make()
            self.post_init()

    model, x = Model(Config()), torch.randn(1, 50, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(Model.from_pretrained(tmp_path).attention(x), model.attention(x))
    low = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(low.attention.rotary.frequencies, model.attention.rotary.frequencies)


@each_layer
def test_reset_parameters_after_to_empty_gives_a_fresh_layer(make: Callable[[], qkv.Attention]) -> None:
    with torch.device("meta"):
        layer = make()
    poisoned(layer.to_empty(device="cpu"))
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = make()
    torch.manual_seed(3)
    fresh.reset_parameters()
    for name, parameter in fresh.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name
    x = torch.randn(2, 9, 32)
    assert torch.equal(layer(x), fresh(x))


@each_layer
def test_each_module_with_parameters_resets_them(make: Callable[[], qkv.Attention]) -> None:
    layer = poisoned(make())
    layer.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert not [
        type(module).__name__
        for module in layer.modules()
        if list(module.parameters(recurse=False)) and not hasattr(module, "reset_parameters")
    ]


META: list[tuple[str, Callable[[Tensor], object]]] = [
    ("frequencies", lambda given: qkv.RotaryEmbedding(8, frequencies=given)),
    ("alibi", lambda given: qkv.Attention(32, 4, alibi=given)),
]


@pytest.mark.parametrize(("name", "make"), META)
def test_constants_need_numbers_without_gradient(name: str, make: Callable[[object], object]) -> None:
    numbers = [0.5, 0.25, 0.125, 1.0]
    with pytest.raises(ValueError, match=f"{name} must .* got a tensor on meta without numbers. Pass a list or"):
        make(torch.ones(4, device="meta"))
    with FakeTensorMode(), pytest.raises(ValueError, match=f"{name} must .* without numbers"):
        make(torch.ones(4))
    with pytest.raises(ValueError, match=f"{name} must be constants; got a tensor that requires a gradient"):
        make(torch.ones(4, requires_grad=True))
    given = torch.tensor(numbers)
    made = [make(numbers), make(tuple(numbers)), make(given), make(given.bfloat16()), make(given.numpy())]
    given.zero_()  # the caller's own
    for one in made:
        kept = getattr(one, name)
        assert kept.dtype is torch.float32 and kept.tolist() == numbers
        kept.zero_()  # and what is read is the reader's
        assert getattr(one, name).tolist() == numbers


def copied(layer: qkv.Attention) -> dict[str, qkv.Attention]:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return {
        "copy": copy.copy(layer),
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@each_layer
def test_copies_compute_the_same_and_are_independent(make: Callable[[], qkv.Attention]) -> None:
    layer, x = make(), torch.randn(1, 9, 32)
    want = layer(x)
    for name, other in copied(layer).items():
        assert torch.equal(other(x), want), name
        assert other.rotary is not None and layer.rotary is not None
        rotary = copy.copy(other.rotary)
        rotary.position_scale, rotary.base, other.scale = 3.0, 7.0, 2.0
        own = qkv.Attention.forward(other, x)
        assert not torch.equal(own, want), name
        assert torch.equal(layer(x), want), name
        assert not torch.equal(rotary(x[None, ..., :8], 3), layer.rotary(x[None, ..., :8], 3))


def test_a_changed_base_takes_effect_at_the_next_call() -> None:
    rotary, x = qkv.RotaryEmbedding(8), torch.randn(1, 1, 3, 8)
    rotary(x, 5)
    rotary.base = 77.0
    assert torch.equal(rotary(x, 5), qkv.RotaryEmbedding(8, base=77.0)(x, 5))


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def compiled(layer: qkv.Attention, x: Tensor) -> object:
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)


def faked(layer: qkv.Attention, x: Tensor) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return layer(mode.from_tensor(x)), build_by_base()(torch.randn(1, 5, 32))


def under(context: Callable[[], object]) -> Callable[[qkv.Attention, Tensor], object]:
    def run(layer: qkv.Attention, x: Tensor) -> object:
        with context():  # type: ignore[attr-defined]
            return layer(x)

    return run


FIRST: dict[str, Callable[[qkv.Attention, Tensor], object]] = {
    "inference mode": under(torch.inference_mode),
    "no_grad": under(torch.no_grad),
    "a mode of dispatch": under(Recording),
    "a device": under(lambda: torch.device("meta")),
    "compile": compiled,
    "export": lambda layer, x: torch.export.export(layer.eval(), (x,)),
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    "fake tensors": faked,
    "vmap": lambda layer, x: torch.vmap(layer)(x[None]),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jacobian": lambda layer, x: torch.func.jacrev(lambda x: layer(x).sum())(x),
    "meta": lambda layer, x: copy.deepcopy(layer).to("meta")(x.to("meta")),
}


@each_layer
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.filterwarnings("ignore")  # of the tracers' own making
def test_the_first_call_does_not_affect_later_ones(first: str, make: Callable[[], qkv.Attention]) -> None:
    layer, x = make(), torch.randn(2, 9, 32)
    gc.freeze()  # what was there before need not be looked through
    FIRST[first](layer, x)
    gc.collect()
    gc.unfreeze()
    x.requires_grad_()
    got = layer(x)
    got.square().sum().backward()
    constants.kept.cache_clear()
    y = x.detach().clone().requires_grad_()
    want = layer(y)
    want.square().sum().backward()
    assert type(got) is Tensor and got.device.type == "cpu" and not got.is_inference()
    assert torch.equal(got, want) and torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_constants_are_computed_once() -> None:
    layer, x = build(), torch.randn(1, 1, 32)
    layer(x)
    before = constants.kept.cache_info().misses
    for _ in range(3):
        layer(x)
    assert constants.kept.cache_info().misses == before > 0
