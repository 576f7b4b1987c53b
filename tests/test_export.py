"""torch.export and ONNX: what is exported from one example computes what the layer does, at other lengths as well."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import Mask

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")

E = 24
OPEN = torch.export.Dim.DYNAMIC


class Padded(nn.Module):
    """A layer whose padding is an input, as it is to a program without Python."""

    def __init__(self, layer: qkv.Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, keep: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer(x, context, mask=Mask.padding(keep))


class DecodingStep(nn.Module):
    """A step of decoding, whose past is an input and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = qkv.RotaryEmbedding(4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        offset = past_k.shape[2]
        k = torch.cat([past_k, self.rotary(k, offset)], dim=2)
        v = torch.cat([past_v, v], dim=2)
        return qkv.attention(self.rotary(q, offset), k, v, mask=Mask.causal(), offset=offset), k, v


class Window(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return qkv.attention(x, x, x, mask=Mask.sliding(20), backend="sdpa")


def sequence(batch: int, lq: int, lk: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, lq, E),)


def padded_sequence(batch: int, lq: int, lk: int) -> tuple[Tensor, ...]:
    """The first row of the batch is not padded, the last one nothing but padding."""
    keep = torch.arange(lq) < torch.linspace(lq, 0, batch)[:, None]
    return torch.randn(batch, lq, E), keep


def padded_context(batch: int, lq: int, lk: int) -> tuple[Tensor, ...]:
    keep = torch.arange(lk) < torch.linspace(lk, 0, batch)[:, None]
    return torch.randn(batch, lq, E), keep, torch.randn(batch, lk, 20)


class Case(NamedTuple):
    module: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]] = sequence
    attention: dict[str, int] | None = None
    """What must hold of ONNX's own attention: its number of inputs, key heads and ``is_causal``; None where the
    formula is written out."""
    opset: int = 23
    """23 is the first with attention of its own"""


CASES = {
    "multi-head": Case(lambda: qkv.MultiHeadAttention(E, 6), attention={"inputs": 3, "kv_heads": 6, "is_causal": 0}),
    "causal, groups, rotary, norms": Case(
        lambda: qkv.CausalAttention(E, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4), qk_norm=True),
        attention={"inputs": 3, "kv_heads": 2, "is_causal": 1},
    ),
    "padding, window, sink tokens, groups, narrow values": Case(
        lambda: Padded(qkv.SlidingWindowAttention(E, 6, 6, sink_tokens=1, num_kv_heads=2, value_dim=3)),
        padded_sequence,
        attention={"inputs": 4, "kv_heads": 2, "is_causal": 0},
    ),
    "padding, causal, groups": Case(
        lambda: Padded(qkv.CausalAttention(E, 6, num_kv_heads=2)),
        padded_sequence,
        attention={"inputs": 4, "kv_heads": 2, "is_causal": 0},
    ),
    "cross, padding, groups": Case(
        lambda: Padded(qkv.CrossAttention(E, 6, context_dim=20, num_kv_heads=2)),
        padded_context,
        attention={"inputs": 4, "kv_heads": 2, "is_causal": 0},
    ),
    "padding, multi-query, alibi, sink logits": Case(
        lambda: Padded(qkv.MultiQueryAttention(E, 6, mask=Mask.causal(), alibi=torch.ones(6), sink_logits=True)),
        padded_sequence,
        opset=20,
    ),
}
each_case = pytest.mark.parametrize("name", CASES)

EACH_OPSET = ("padding, window, sink tokens, groups, narrow values", "padding, multi-query, alibi, sink logits")
"""One case by ONNX's own attention and one by the formula, for `make test`: each model takes ten seconds."""

EXAMPLE = (2, 11, 7)
SIZES = [EXAMPLE, (3, 5, 9), (1, 40, 40)]


def rounding(want: Tensor, length: int) -> float:
    """How far two fp32 layers may be apart: four projections sum ``E`` products each, and attention ``length``.

    A sum of n terms is off by n roundings of its largest part at most.
    """
    return (4 * E + length) * torch.finfo(torch.float32).eps * max(1.0, want.abs().max().item())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The exporter logs what other libraries are not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class OnnxModel:
    """What onnxruntime computes of an exported module, or of a program that it became before."""

    def __init__(
        self,
        module: nn.Module | torch.export.ExportedProgram,
        example: tuple[Tensor, ...] = (),
        shapes: Any = None,
        opset: int = 23,
    ) -> None:
        import onnx
        import onnxruntime as runtime

        program = torch.onnx.export(
            module, example, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        model = program.model_proto
        onnx.checker.check_model(model, full_check=True)
        self.graph = model.graph
        self.session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [entry.name for entry in self.session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(out) for out in self.session.run(None, feed)]

    @property
    def attention(self) -> dict[str, int] | None:
        """What `Case.attention` asks of ONNX's own attention; None where there is none."""
        nodes = [node for node in self.graph.node if node.op_type == "Attention"]
        if not nodes:
            return None
        (node,) = nodes
        shapes = {info.name: info.type.tensor_type.shape.dim for info in self.graph.value_info}
        return {
            "inputs": len(node.input),
            "kv_heads": shapes[node.input[1]][1].dim_value,
            "is_causal": next(attribute.i for attribute in node.attribute if attribute.name == "is_causal"),
        }


def open_lengths(inputs: Sequence[Tensor]) -> list[dict[int, Any]]:
    return [{0: OPEN, 1: OPEN} for _ in inputs]


@functools.cache
def exported(name: str, opset: int) -> tuple[nn.Module, OnnxModel]:
    """The module of a case, and what it became."""
    case = CASES[name]
    module, example = case.module().eval(), case.inputs(*EXAMPLE)
    return module, OnnxModel(module, example, open_lengths(example), opset)


@each_case
def test_a_program_computes_the_same_at_other_lengths(name: str) -> None:
    case = CASES[name]
    module, example = case.module().eval(), case.inputs(*EXAMPLE)
    program = torch.export.export(module, example, dynamic_shapes=open_lengths(example)).module()
    for sizes in SIZES:
        if sizes[0] == 1:  # torch takes an open size to be at least 2
            continue
        inputs = case.inputs(*sizes)
        torch.testing.assert_close(program(*inputs), module(*inputs))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EACH_OPSET else pytest.mark.long) for name in CASES]
)
def test_an_onnx_model_computes_the_same_at_other_lengths(name: str) -> None:
    case = CASES[name]
    module, model = exported(name, case.opset)
    for batch, lq, lk in SIZES:
        inputs = case.inputs(batch, lq, lk)
        with torch.no_grad():
            want = module(*inputs)
        torch.testing.assert_close(model(*inputs)[0], want, rtol=0, atol=rounding(want, max(lq, lk)))
    assert model.attention == case.attention


# With the formula, and with ONNX's own attention, in models that the test above exports anyway.
@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("padding, multi-query, alibi, sink logits", 20),
        ("padding, window, sink tokens, groups, narrow values", 23),
        pytest.param("cross, padding, groups", 20, marks=pytest.mark.long),
        pytest.param("cross, padding, groups", 23, marks=pytest.mark.long),
    ],
)
def test_rows_without_keys_are_0_and_hidden_nan_stays_hidden_in_onnx(name: str, opset: int) -> None:
    module, model = exported(name, opset)
    x, keep, *context = CASES[name].inputs(2, 5, 7)
    with torch.no_grad():
        want = module(x, keep, *context)
    clean = model(x, keep, *context)[0]
    torch.testing.assert_close(clean, want, rtol=0, atol=rounding(want, 7))
    assert not keep[1].any() and torch.equal(clean[1], torch.zeros(5, E))
    keep[0, 4:] = False
    clean = model(x, keep, *context)[0]
    (context[0] if context else x)[~keep] = torch.nan
    finite = ~x.isnan().any(-1)
    assert finite.any() and torch.equal(model(x, keep, *context)[0][finite], clean[finite])


@pytest.mark.parametrize(
    ("length", "strict"),
    [
        pytest.param(length, strict, marks=pytest.mark.long if strict else ())
        for length in (5, 300)  # no longer than the window, and as long as blocks of one
        for strict in (False, True)
    ],
)
def test_a_window_is_kept_whatever_the_length_of_the_example(length: int, strict: bool) -> None:
    example = torch.randn(2, 3, length, 4)
    program = torch.export.export(Window(), (example,), dynamic_shapes=[{2: OPEN}], strict=strict)
    run = program.module()
    for other in (3, 40, 400):
        x = torch.randn(2, 3, other, 4)
        want = Window()(x)
        torch.testing.assert_close(run(x), want, rtol=0, atol=rounding(want, other))


@pytest.mark.long
def test_a_window_is_kept_in_onnx_whatever_the_length_of_the_example() -> None:
    model = OnnxModel(Window().eval(), (torch.randn(2, 3, 300, 4),), [{2: OPEN}])
    for length in (3, 40, 400):
        x = torch.randn(2, 3, length, 4)
        want = Window()(x)
        torch.testing.assert_close(model(x)[0], want, rtol=0, atol=rounding(want, length))


def test_a_program_of_cross_attention_takes_equal_lengths_too() -> None:
    layer, example = qkv.CrossAttention(E, 6), (torch.randn(2, 5, E), torch.randn(2, 7, E))
    program = torch.export.export(layer.eval(), example, dynamic_shapes=open_lengths(example)).module()
    x, context = torch.randn(2, 2, 9, E).unbind()
    torch.testing.assert_close(program(x, context), layer(x, context))


def test_a_decoding_step_takes_any_cache_length_in_onnx() -> None:
    step = DecodingStep()

    def inputs(batch: int, past: int) -> tuple[Tensor, ...]:
        new = torch.randn(batch, 6, 1, 4), torch.randn(batch, 2, 1, 4), torch.randn(batch, 2, 1, 4)
        return *new, torch.randn(batch, 2, past, 4), torch.randn(batch, 2, past, 4)

    model = OnnxModel(step.eval(), inputs(2, 7), [{0: OPEN}] * 3 + [{0: OPEN, 2: OPEN}] * 2)
    for batch, past in [(2, 7), (1, 1), (3, 300)]:
        given = inputs(batch, past)
        for got, want in zip(model(*given), step(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=rounding(want, past + 1))
