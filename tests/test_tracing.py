"""A traced program applies the padding, documents and NaN of its inputs, not those of its example.

Every tracer of torch, on models of transformers and on layers; the example has no padding, and its masks hide nothing.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import qkv
from qkv import Mask

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracers' own making

Program = Callable[..., Tensor]
Tracer = Callable[[nn.Module, tuple[Tensor, ...], Path], Program]


def by_jit(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    traced: Program = torch.jit.trace(module, example, strict=False, check_trace=False)
    return traced


def by_compile(**options: Any) -> Tracer:
    def trace(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
        compiled = torch.compile(module, backend="aot_eager", **options)
        compiled(*example)
        return compiled

    return trace


def by_export(*, strict: bool) -> Tracer:
    return lambda module, example, folder: torch.export.export(module, example, strict=strict).module()


def by_make_fx(mode: str) -> Tracer:
    return lambda module, example, folder: make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(*example)


def by_onnx(*, dynamo: bool) -> Tracer:
    def trace(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
        import onnxruntime

        file = str(folder / "model.onnx")
        if dynamo:
            torch.onnx.export(module, example, dynamo=True, opset_version=20, verbose=False).save(file)
        else:
            torch.onnx.export(module, example, file, dynamo=False, opset_version=17)
        session = onnxruntime.InferenceSession(file)
        names = [given.name for given in session.get_inputs()]

        def run(*inputs: Tensor) -> Tensor:
            assert len(names) == len(inputs), f"the program takes {names} alone"
            given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return run

    return trace


TRACERS: dict[str, Tracer] = {
    "jit": by_jit,
    "compile": by_compile(fullgraph=True),
    "compile, dynamic": by_compile(dynamic=True),
    "export": by_export(strict=False),
    "export, strict": by_export(strict=True),
    "make_fx": by_make_fx("real"),
    "make_fx, fake": by_make_fx("fake"),
    "make_fx, symbolic": by_make_fx("symbolic"),
    "onnx": by_onnx(dynamo=True),
    "onnx, traced": by_onnx(dynamo=False),
}
SLOW = ("compile, dynamic", "export, strict", "make_fx, fake", "make_fx, symbolic", "onnx")
"""They take seconds on models and on a layer of many masks. On a small layer all take part in `make test`."""

each_tracer_in_time = pytest.mark.parametrize(
    "tracer", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in TRACERS]
)


each_tracer_of_auto_in_time = pytest.mark.parametrize(
    ("backend", "tracer"),
    [
        pytest.param(backend, tracer, marks=pytest.mark.long if tracer in SLOW or backend == "sdpa" else ())
        for backend in ("auto", "sdpa")
        for tracer in TRACERS
    ],
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.compiler.reset()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        yield
    logging.disable(logging.NOTSET)


BATCH, LENGTH, WIDTH = 2, 12, 48
KEEP = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])


def close(got: Tensor, want: Tensor) -> None:
    """Equal up to rounding: sums of a few dozen numbers of order one in two orders, a few layers deep."""
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


class Hidden(nn.Module):
    """A model of transformers, from ids and padding to hidden states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        from qkv.integrations.transformers import attention as integration

        integration.register()
        sizes = {"vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            kind, **sizes, num_attention_heads=6, num_key_value_heads=2, sliding_window=7
        )
        self.model = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data *= 3 if parameter.dim() > 1 else 1

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, attention_mask=keep, use_cache=False).last_hidden_state
        return found


@each_tracer_in_time
@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_a_model_traced_without_padding_applies_padding(kind: str, tracer: str, tmp_path: Path) -> None:
    model = Hidden(kind)
    ids, ones = torch.randint(3, 96, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.long)
    model.model.set_attn_implementation("eager")
    want = model(ids, KEEP.long())
    model.model.set_attn_implementation("qkv")
    program = TRACERS[tracer](model, (ids, ones), tmp_path)
    close(program(ids, KEEP.long())[KEEP], want[KEEP])


class Layer(nn.Module):
    """A layer, with one mask after the other as an input."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = qkv.GroupedQueryAttention(WIDTH, 6, num_kv_heads=2, mask=Mask.causal(5), backend=backend)
        self.layer.requires_grad_(False).eval()

    def forward(self, x: Tensor, keep: Tensor, lengths: Tensor, ids: Tensor, allow: Tensor) -> Tensor:
        masks = (Mask.padding(keep), Mask.padding(lengths), Mask.documents(ids), Mask.dense(allow))
        return torch.stack([self.layer(x, mask=mask) for mask in masks])


LENGTHS, IDS = KEEP.sum(dim=1), torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3
ALLOW = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2)[None, None].repeat(BATCH, 1, 1, 1)
HIDES_NOTHING = (KEEP | True, LENGTHS * 0 + LENGTH, IDS * 0, ALLOW | True)


@each_tracer_of_auto_in_time
def test_a_layer_traced_with_masks_that_hide_nothing_applies_masks(backend: str, tracer: str, tmp_path: Path) -> None:
    layer, x = Layer(backend), torch.randn(BATCH, LENGTH, WIDTH)
    want = layer(x, KEEP, LENGTHS, IDS, ALLOW)
    program = TRACERS[tracer](layer, (x, *HIDES_NOTHING), tmp_path)
    close(program(x, KEEP, LENGTHS, IDS, ALLOW), want)


@pytest.mark.parametrize(
    ("backend", "tracer"),
    [
        pytest.param(backend, tracer, marks=pytest.mark.long if backend == "sdpa" and tracer != "jit" else ())
        for backend in ("auto", "sdpa")
        for tracer in TRACERS
    ],
)
def test_a_layer_traced_on_finite_inputs_hides_nan(backend: str, tracer: str, tmp_path: Path) -> None:
    class Padded(Layer):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.layer(x, mask=Mask.padding(keep))
            return out

    layer, x = Padded(backend), torch.randn(BATCH, LENGTH, WIDTH)
    want = layer(x, KEEP)
    program = TRACERS[tracer](layer, (x, KEEP), tmp_path)
    close(program(x.masked_fill(~KEEP[..., None], torch.nan), KEEP)[KEEP], want[KEEP])


class Positions(nn.Module):
    """Prefixes, chunks, dilation, global tokens and integers as padding, with tensors as inputs."""

    def forward(self, x: Tensor, lengths: Tensor, flags: Tensor) -> Tensor:
        masks = (
            Mask.prefix(lengths) & Mask.chunked(7, start=2),
            Mask.sliding(4, dilation=2) | Mask.global_tokens(flags),
            Mask.causal() & Mask.padding(flags),
        )
        return torch.stack([qkv.attention(x, x, x, mask=mask) for mask in masks])


@pytest.mark.parametrize(
    "tracer",
    [pytest.param(name, marks=() if name in ("jit", "compile", "export") else pytest.mark.long) for name in TRACERS],
)
def test_traced_masks_of_positions_read_their_inputs(tracer: str, tmp_path: Path) -> None:
    x, flags = torch.randn(BATCH, 2, LENGTH, 8), (torch.arange(LENGTH)[None] % torch.tensor([[4], [5]]) == 1).long()
    given = x, torch.tensor([5, 9]), flags
    program = TRACERS[tracer](Positions(), (x, torch.tensor([1, 1]), flags * 0 + 1), tmp_path)
    close(program(*given), Positions()(*given))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_a_jit_trace_in_training_is_saved_and_has_the_gradients(backend: str, tmp_path: Path) -> None:
    layer, x = Layer(backend).requires_grad_(True), torch.randn(BATCH, LENGTH, WIDTH)
    given = (x, KEEP, LENGTHS, IDS, ALLOW)
    with torch.enable_grad():
        traced = torch.jit.trace(layer, (x, *HIDES_NOTHING))
        torch.jit.save(traced, tmp_path / "layer.pt")
        program = torch.jit.load(tmp_path / "layer.pt")
        wants = torch.autograd.grad(layer(*given).square().sum(), list(layer.parameters()))
        for got, want in zip(
            torch.autograd.grad(program(*given).square().sum(), list(program.parameters())), wants, strict=True
        ):
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


class Step(nn.Module):
    """A few tokens of rows that stand at different positions."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, offset: Tensor) -> Tensor:
        mask = Mask.causal(6) & Mask.documents(ids)
        return qkv.attention(q, k, v, mask=mask, offset=offset, backend=self.backend)


@each_tracer_of_auto_in_time
def test_a_step_traced_at_some_positions_is_taken_at_others(backend: str, tracer: str, tmp_path: Path) -> None:
    q, k, v = torch.randn(BATCH, 4, 3, 8), torch.randn(BATCH, 2, LENGTH, 8), torch.randn(BATCH, 2, LENGTH, 8)
    step, offset = Step(backend), torch.tensor([LENGTH - 3, 2])
    program = TRACERS[tracer](step, (q, k, v, IDS, torch.zeros_like(offset)), tmp_path)
    close(program(q, k, v, IDS, offset), step(q, k, v, IDS, offset))


class Merged(nn.Module):
    """Two halves of the keys, with all that asks for the lse."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [
            qkv.attention_with_lse(
                q, k[:, :, part], v[:, :, part], sink_logits=sinks, mask=Mask.causal(), offset=-start
            )
            for start, part, sinks in ((0, slice(0, 3), self.sinks), (3, slice(3, 6), None))
        ]
        out, lse = qkv.merge(pieces)
        return torch.cat([out, lse[..., None]], dim=-1)


@pytest.mark.parametrize(
    ("tracer", "dtype"),
    [("jit", torch.float64), *((tracer, torch.float32) for tracer in ("jit", "compile", "export", "make_fx"))],
)
def test_a_trace_in_training_merges_pieces(tracer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = Merged().to(dtype)
    example, given = (tuple(torch.randn(3, 1, 2, 6, 4, dtype=dtype).unbind()) for _ in range(2))
    with torch.enable_grad():
        program = TRACERS[tracer](module, example, tmp_path)
        if tracer == "jit":
            torch.jit.save(program, tmp_path / "merged.pt")  # type: ignore[no-untyped-call, arg-type]
        close(program(*given), module(*given))


def test_a_softcap_is_exported_to_onnx_by_the_tracer(tmp_path: Path) -> None:
    class Capped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return qkv.attention(q, k, v, softcap=2.0, mask=Mask.causal())

    given = tuple(torch.randn(3, 1, 2, 6, 4).unbind())
    close(TRACERS["onnx, traced"](Capped(), given, tmp_path)(*given), Capped()(*given))
