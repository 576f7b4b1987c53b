"""All decoder layers of a step at once: the bits of layer after layer, whatever family and cache; what may be done to a
model before a step, between steps and within one; and loops in the source of forwards, which are changed exactly or not
at all.
"""

import copy
import functools
import importlib.util
import inspect
import io
import itertools
import linecache
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import pytest
import torch
from integrations.transformers.test_attention_step import IDS, KINDS, assert_same, decoded, double
from integrations.transformers.test_decoder_step import OTHERS, Other, made, negated
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama

import qkv
from qkv import QKVCache, kernels
from qkv.integrations.transformers.steps import decoder_step
from qkv.integrations.transformers.steps.layer_loops import Call, with_layers_at_once
from qkv.integrations.transformers.steps.model_forward import ModelForward

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),
]

CALLS_PLAINLY = "__call__" not in vars(GradientCheckpointingLayer)
"""Whether calling a layer is calling its forward: in transformers 5.20, which checkpoints calls, layers are modules."""


RUN = decoder_step.run


def at_most(layers: int) -> int:
    return layers if CALLS_PLAINLY else min(layers, 1)


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers in each call so far. Other products are the kernel's, so that bits agree."""
    torch.manual_seed(0)
    torch.compiler.reset()
    counts: list[int] = []
    run = decoder_step.run

    def counted(layers: Sequence[decoder_step.Layer], x: Tensor) -> tuple[int, Tensor]:
        done, out = run(layers, x)
        counts.append(done)
        return done, out

    monkeypatch.setattr(decoder_step, "run", counted)
    monkeypatch.setattr(kernels, "is_faster", lambda x, weight: kernels.has_few_rows(x))
    monkeypatch.setattr(kernels, "gains_from_rows", lambda x: kernels.has_few_rows(x) and x.numel() <= 16 * x.shape[-1])
    monkeypatch.setattr(kernels, "gains_from_few_rows", lambda x, weight: x.numel() <= 16 * x.shape[-1])
    return counts


def ours(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return qkv.accelerate(made(kind, dtype, **{"num_hidden_layers": 3, **options}))


def layer_by_layer(of: Any) -> Any:
    """A copy of a model that calls its layers one after another."""
    copied = copy.deepcopy(of)
    found = [module for module in copied.modules() if type(vars(module).get("forward")) is ModelForward]
    assert found
    for module in found:
        del vars(module)["forward"]
    return copied


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), *((kind, torch.float32) for kind in KINDS if kind not in OTHERS)],
    ids=str,
)
def test_it_has_the_bits_of_layer_after_layer(kind: str, dtype: torch.dtype, written: list[int]) -> None:
    """In chunks, with padding, and over int8: windows move for some, and end what is at once."""
    mine = ours(kind, dtype, num_hidden_layers=2)
    each, keep = layer_by_layer(mine), torch.ones(IDS.shape, dtype=torch.long)
    keep[0, :4] = 0
    assert torch.equal(decoded(mine), decoded(each)) and max(written) == at_most(2)
    caches = [QKVCache(of, dtype="int8") for of in (mine, each)]
    assert torch.equal(*map(decoded, (mine, each), caches))
    assert_same(*caches)
    calls = {"attention_mask": keep[:, :7], "use_cache": False}
    with torch.no_grad():
        assert torch.equal(*(of(IDS[:, :7], **calls).logits for of in (mine, each)))


@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3"])
def test_generation(kind: str, written: list[int]) -> None:
    mine = ours(kind, num_hidden_layers=2)
    each, keep = layer_by_layer(mine), torch.ones(2, 6, dtype=torch.long)
    keep[0, :2] = 0
    length = {"max_new_tokens": 6, "min_new_tokens": 6}
    padded = {"attention_mask": keep}
    for options in (padded, {**padded, "num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        ids = IDS[: 2 if padded.keys() <= options.keys() else 1, :6]
        assert torch.equal(*(of.generate(ids, do_sample=False, **length, **options) for of in (mine, each)))
    assert max(written) == at_most(2)


def test_reports_are_those_of_layer_after_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_step, "run", RUN)  # which looks for the frame that called the layer
    reports, texts = [], []
    for of in (mine := ours(), layer_by_layer(mine)):
        with torch.no_grad(), qkv.accelerate() as report:
            of(IDS[:, :3], use_cache=False)
        reports.append(str(report))
        with torch.no_grad():
            of(IDS[:, :3], use_cache=False)
        texts.append(str(qkv.report(of)))
    assert reports[0] == reports[1] and texts[0] == texts[1] and "modeling_llama" in reports[0]


def test_what_else_is_of_the_model() -> None:
    mine = ours(num_hidden_layers=2)
    theirs = layer_by_layer(mine)
    assert inspect.signature(mine.model.forward) == inspect.signature(theirs.model.forward)
    assert mine.model.forward.__name__ == "forward" and type(mine.model) is type(theirs.model)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert vars(mine.model).keys() - vars(theirs.model).keys() == {"forward"}
    qkv.accelerate(mine, enabled=False)
    assert "forward" not in vars(mine.model)


# What may be done to a model between two steps.


def layer_of(of: Any, index: int = 1) -> Any:
    return of.model.layers[index]


def adds_a_hook(to: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """A hook of a layer, which adds one to a part of a later layer."""

    def change(of: Any) -> None:
        def hook(*call: Any) -> None:
            if not to(of)._forward_hooks:
                to(of).register_forward_hook(double)

        layer_of(of, 0).register_forward_hook(hook)

    return change


def replaces_a_later_layer(of: Any) -> None:
    """Seen in the next step: the loop goes through a list of its own."""
    layer_of(of, 0).register_forward_hook(lambda *call: of.model.layers.__setitem__(2, Other(layer_of(of, 1))))


class Backwards(nn.ModuleList):
    """Layers that come in another order."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


class Loading(nn.ModuleList):
    """Layers that lend their weights to one at a time, as those that are read from a disk."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)

    def __iter__(self) -> Iterator[nn.Module]:
        for layer in super().__iter__():
            layer.mlp.up_proj.weight.mul_(2)
            yield layer
            layer.mlp.up_proj.weight.mul_(0.5)


def listed(kind: type[nn.ModuleList]) -> Callable[[Any], Any]:
    return lambda of: setattr(of.model, "layers", kind(list(of.model.layers)))


def becomes_a_subclass(of: Any) -> None:
    kind = type(layer_of(of))
    layer_of(of).__class__ = type("Mine", (kind,), {"forward": negated(kind.forward)})


def wrapped_forward(of: Any) -> None:
    """As the package accelerate does."""
    of.model._old_forward = of.model.forward
    of.model.forward = lambda *args, **kwargs: of.model._old_forward(*args, **kwargs)


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "nothing": (lambda of: None, 3),
    "a hook of the model": (lambda of: of.model.register_forward_pre_hook(lambda *call: None), 3),
    "a hook of a layer": (lambda of: layer_of(of).register_forward_hook(double), 1),
    "a hook before a layer": (lambda of: layer_of(of).register_forward_pre_hook(lambda _, args: 2 * args[0]), 1),
    "a hook of a part": (lambda of: layer_of(of).mlp.register_forward_hook(double), 1),
    "a hook that adds one to a later layer": (adds_a_hook(lambda of: layer_of(of, 2)), 1),
    "a hook that adds one to a later part": (adds_a_hook(lambda of: layer_of(of, 2).mlp), 1),
    "a hook that replaces a later layer": (replaces_a_later_layer, 2),
    "a forward of a layer": (lambda of: setattr(layer_of(of), "forward", negated(layer_of(of).forward)), 1),
    "a forward of the model": (wrapped_forward, 3),
    "a layer that is compiled": (
        lambda of: setattr(layer_of(of), "_compiled_call_impl", negated(layer_of(of)._call_impl)),
        1,
    ),
    "a subclass of a layer": (becomes_a_subclass, 1),
    "fewer layers": (lambda of: setattr(of.config, "num_hidden_layers", 2), 2),
    "the last layer removed": (lambda of: of.model.layers.__delitem__(2), 2),
    "no layer": (lambda of: setattr(of.model, "layers", nn.ModuleList()), 0),
    "another order": (lambda of: setattr(of.model, "layers", nn.ModuleList(reversed(of.model.layers))), 3),
    "a layer twice": (lambda of: of.model.layers.__setitem__(1, layer_of(of, 0)), 1),
    "a cache of two layers": (lambda of: setattr(layer_of(of).self_attn, "layer_idx", 0), 1),
    "another module": (lambda of: of.model.layers.__setitem__(1, Other(layer_of(of))), 1),
    "layers that come in another order": (listed(Backwards), 1),
    "layers that are loaded one after another": (listed(Loading), 1),
    "weights": (lambda of: layer_of(of).mlp.up_proj.weight.mul_(2), 3),
    "a layer given back": (lambda of: qkv.accelerate(layer_of(of), enabled=False), 1),
    "a part given back": (lambda of: qkv.accelerate(layer_of(of).mlp, enabled=False), 1),
    "given back and taken": (lambda of: qkv.accelerate(qkv.accelerate(of, enabled=False)), 3),
    "another attention": (lambda of: of.set_attn_implementation("sdpa"), 0),
    "training": (lambda of: of.train(), 3),
    "fp64": (lambda of: of.double(), 0),
    "a layer of another dtype": (lambda of: layer_of(of).bfloat16(), 1),
    "a layer without memory": (lambda of: layer_of(of).to("meta"), 1),
}
"""Each with the most layers at once after it."""


@torch.no_grad()
def steps(of: Any, cache: Any, first: int, tokens: Sequence[int]) -> list[Any]:
    """Logits of steps, up to an error, and then the lengths of the cache."""
    found: list[Any] = []
    with suppress_into(found):
        for start, count in zip(itertools.accumulate(tokens, initial=first), tokens, strict=False):
            found.append(of(IDS[:, start : start + count], past_key_values=cache).logits)
    return [*found, [layer.get_seq_length() for layer in cache.layers]]


@contextmanager
def suppress_into(found: list[Any]) -> Iterator[None]:
    """Context manager that appends the text of an error instead of raising it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        found.append(str(error))


def assert_alike(one: list[Any], two: list[Any]) -> None:
    assert len(one) == len(two)
    for mine, its in zip(one, two, strict=True):
        assert torch.equal(mine, its) if isinstance(mine, Tensor) and isinstance(its, Tensor) else mine == its


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_is_changed_between_steps(name: str, written: list[int]) -> None:
    change, most = CHANGES[name]
    mine, found = ours(), []
    for of in (layer_by_layer(mine), mine):
        cache = QKVCache(of)
        found.append(steps(of, cache, 0, [9, 1]))
        written.clear()
        change(of)
        found[-1] += steps(of, cache, 10, [1, 1, 3])
    assert_alike(*found)
    assert max(written, default=0) == at_most(most)


class Watching(TorchFunctionMode):
    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


@contextmanager
def patched(kind: Any) -> Iterator[None]:
    """Context manager in which a class has a forward around its own."""
    forward = kind.forward

    @functools.wraps(forward)
    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return out / 2
        out["last_hidden_state"] = -out["last_hidden_state"]
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", changed)
        yield


WITHIN: dict[str, tuple[Callable[[], AbstractContextManager[Any]], int]] = {
    "inference mode": (torch.inference_mode, 3),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), 0),
    "a mode that sees functions": (Watching, 0),
    "a mode that sees operators": (Dispatching, 0),
    "a forward of all models": (lambda: patched(modeling_llama.LlamaModel), 1),
    "a forward of all layers": (lambda: patched(modeling_llama.LlamaDecoderLayer), 0),
    "a forward of all MLPs": (lambda: patched(modeling_llama.LlamaMLP), 0),
}


@pytest.mark.parametrize("name", WITHIN)
@torch.no_grad()
def test_what_is_changed_for_a_while(name: str, written: list[int]) -> None:
    within, most = WITHIN[name]
    mine, found = ours(), []
    for of in (layer_by_layer(mine), mine):
        cache = QKVCache(of)
        found.append(steps(of, cache, 0, [9]))
        written.clear()
        with within():
            found[-1] += steps(of, cache, 9, [1, 2])
        assert max(written, default=0) == (at_most(most) if of is mine else min(most, 1))
        found[-1] += steps(of, cache, 12, [1])
    assert_alike(*found)
    assert written[-1] == at_most(3)


@torch.no_grad()
def test_hidden_states_before_and_after(written: list[int]) -> None:
    mine = ours()
    each = layer_by_layer(mine)
    for kept in ({}, {"output_hidden_states": True}, {"output_attentions": True}, {}):
        written.clear()
        found = [of(IDS[:, :3], use_cache=False, **kept) for of in (mine, each)]
        for name in ("hidden_states", "attentions"):
            assert all(map(torch.equal, *(out.get(name) or () for out in found)))
        assert torch.equal(*(out.logits for out in found)) and (at_most(3) in written) == (not kept)


def test_gradients_transforms_and_tracers(written: list[int]) -> None:
    mine = ours()
    each, x = layer_by_layer(mine), torch.randn(1, 3, 32)

    def logits(of: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: of(inputs_embeds=x, use_cache=False).logits

    doubled = {name: 2 * value for name, value in mine.named_parameters()}
    for found in (
        lambda of: torch.autograd.functional.jacobian(lambda x: logits(of)(x).sum(), x),
        lambda of: torch.func.grad(lambda x: logits(of)(x).sum())(x),
        lambda of: torch.func.jvp(logits(of), (x,), (x,))[1],
        lambda of: torch.vmap(logits(of))(x.expand(2, 1, 3, 32)),
        lambda of: torch.jit.trace(logits(of), (x,), check_trace=False)(2 * x),
    ):
        assert torch.equal(found(mine), found(each))
    assert not written
    with torch.no_grad():
        call = lambda of: torch.func.functional_call(of, doubled, (), {"inputs_embeds": x, "use_cache": False}).logits
        assert torch.equal(call(mine), call(each)) and written[0] == at_most(3)
        assert not torch.equal(call(mine), logits(mine)(x))


@torch.no_grad()
def test_copies_pickles_and_the_way_back(written: list[int]) -> None:
    mine = ours()
    want, buffer = mine.model(IDS[:, :3], use_cache=False).last_hidden_state, io.BytesIO()
    torch.save(mine.model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(mine.model), torch.load(buffer, weights_only=False)):
        written.clear()
        assert torch.equal(other(IDS[:, :3], use_cache=False).last_hidden_state, want)
        assert written[0] == at_most(3) and vars(other)["forward"].module is other
    qkv.accelerate(mine.model, enabled=False)
    assert "forward" not in vars(mine.model)
    kept = ours()
    forward = kept.model.forward
    kept.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    qkv.accelerate(kept, enabled=False)  # ours is out of sight, and calls that of the class
    written.clear()
    kept(IDS[:, :3], use_cache=False)
    assert not written


def test_threads(written: list[int]) -> None:
    mine, got = ours(), {}
    want = [mine.generate(IDS[row : row + 1, :5], max_new_tokens=8, do_sample=False) for row in (0, 1)]

    def generate(row: int) -> None:
        got[row] = mine.generate(IDS[row : row + 1, :5], max_new_tokens=8, do_sample=False)

    threads = [threading.Thread(target=generate, args=(row,)) for row in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[row], want[row]) for row in (0, 1))


# Errors, and what the kernel or a cache refuses.


@pytest.mark.parametrize("kind", ["append", "int8", "sliding", "sliding, int8"])
@pytest.mark.parametrize("most", [0, 1, 2, "no memory", "interrupted"])
@torch.no_grad()
def test_layers_that_are_refused_and_errors(most: Any, kind: str, written: list[int], monkeypatch: Any) -> None:
    mine = ours("mistral", sliding_window=5 if "sliding" in kind else None)
    caches = [QKVCache(mine, dtype="int8" if "int8" in kind else None) for _ in range(2)]
    for cache in caches:
        mine(IDS[:, :9], past_key_values=cache)
    run = kernels.decoder_layers

    def some(layers: Sequence[Any]) -> int:
        if most == "interrupted":
            run(layers)
            raise KeyboardInterrupt
        if most == "no memory":
            run(layers[:1])
            raise MemoryError
        return run(layers[:most]) if len(layers) > 1 and most else 0 if most < len(layers) else run(layers)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "decoder_layers", some)
        if isinstance(most, str):
            with pytest.raises((MemoryError, KeyboardInterrupt)):
                mine(IDS[:, 9:10], past_key_values=caches[0])
        else:
            got = mine(IDS[:, 9:10], past_key_values=caches[0]).logits
            assert torch.equal(got, layer_by_layer(mine)(IDS[:, 9:10], past_key_values=caches[1]).logits)
    assert_same(*caches)
    assert torch.equal(*(mine(IDS[:, 10:11], past_key_values=cache).logits for cache in caches))
    assert_same(*caches)


@torch.no_grad()
def test_a_cache_refuses_a_layer_in_the_middle(written: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ours()
    found = []
    for of in (mine, layer_by_layer(mine)):
        cache = QKVCache(of)
        steps(of, cache, 0, [9])
        cache.layers[1].claim = lambda *call: None
        found.append(steps(of, cache, 9, [1, 2]))
        del cache.layers[1].claim
        cache.layers[2].keys = cache.layers[2].keys[:1]  # of another batch: an error, after two layers have appended
        found[-1] += steps(of, cache, 12, [1])
    assert_alike(*found)
    assert isinstance(found[0][-2], str) and found[0][-1] == [13, 13, 12]


@torch.no_grad()
def test_a_layer_that_raises(written: list[int]) -> None:
    mine = ours()
    found = []
    for of in (mine, layer_by_layer(mine)):
        cache = QKVCache(of)
        steps(of, cache, 0, [9])

        def fails(*call: Any) -> None:
            raise ValueError("on purpose")

        hook = layer_of(of, 2).register_forward_pre_hook(fails)
        found.append(steps(of, cache, 9, [1]))
        hook.remove()
        cache.layers[0].crop(-1)
        cache.layers[1].crop(-1)
        found[-1] += steps(of, cache, 9, [1, 2])
    assert_alike(*found)
    assert found[0][:2] == ["on purpose", [10, 10, 9]]


@torch.no_grad()
def test_what_is_handed_in_is_handed_on(written: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the kernel refuses gets the very tensor, and inputs of any layout are left as they are."""
    mine = ours()
    x = torch.randn(2, 32, 3).transpose(1, 2)
    want, before = mine(inputs_embeds=x.contiguous(), use_cache=False).logits, x.clone()
    assert torch.equal(mine(inputs_embeds=x, use_cache=False).logits, want) and torch.equal(x, before)
    seen: list[Any] = []
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", _seeing(modeling_llama.LlamaRMSNorm.forward, seen))
    mine(inputs_embeds=x, use_cache=False)
    assert seen[0] is x
    monkeypatch.undo()
    seen.clear()
    monkeypatch.setattr(kernels, "decoder_layers", lambda layers: 0)
    layer_of(mine, 0).input_layernorm.forward = functools.partial(_see, seen, layer_of(mine, 0).input_layernorm.forward)
    mine(inputs_embeds=x, use_cache=False)
    assert seen[0] is x


def _see(seen: list[Any], forward: Any, x: Any) -> Any:
    seen.append(x)
    return forward(x)


def _seeing(forward: Any, seen: list[Any]) -> Any:
    def call(self: Any, x: Any) -> Any:
        seen.append(x)
        return forward(self, x)

    return call


# Loops in sources.


class Added(nn.Module):
    """Adds what it is given, and counts in which order layers are called."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Any, y: Any = 0, **given: Any) -> Any:
        if y == "fails":
            raise ValueError("on purpose")
        return 2 * x + self.number + sum(map(int, (y, *given.values())))


HEAD = """
import copy, logging
import torch
logger = logging.getLogger(__name__)

class Model(Base):
    def forward(self, x, n=None, more=(1, 2, 3), **kwargs):
        \"\"\"Of more

        than one line.
        \"\"\"
        y: int = more[0]
"""
TAKEN = {
    "the usual": """
        for layer in self.layers[:n]:
            x = layer(x, y=y, **kwargs)
        return x
    """,
    "numbered": """
        for i, layer in enumerate(self.layers[:n]):
            x = layer(
                x,
                # with a remark
                y=more[i] if n else self.number,
                **kwargs,
            )
        return x, i, layer.number
    """,
    "a part of the layers": """
        for layer in self.layers[1:n]:
            x = layer(x)
        return x, layer.number
    """,
    "no layer": """
        for layer in self.layers[:0]:
            x = layer(x, y)
        return x
    """.replace("x, y", "x, y=y"),
    "functions and lambdas beside it": """
        def within(x, k=lambda a: a):
            for layer in self.layers:
                x = layer(x)
            return k(x)
        z = (lambda layer: layer + y)(1)
        for layer in self.layers[:n]:
            x = layer(x, z=z)
        return within(x), [layer.number for layer in self.layers]
    """,
    "attempts": """
        try:
            y = more[9]
        except IndexError as error:
            y = len(str(error))
        for layer in self.layers[:n]:
            x = layer(x, y=y)
        assert x is not None
        return x
    """,
    "methods of what a file makes, and of what it imports": """
        logger.info(torch.tensor(y), copy.copy(y))
        for layer in self.layers[:n]:
            x = layer(x, y=y)
        return x
    """,
    "other loops": """
        for layer in self.layers[:n]:
            x = layer(x, y=y)
        for layer in self.layers[:n]:
            x = layer(x, y=y)
            x = x + 1
        return x
    """,
}
LEFT = {
    "two loops": """
        for layer in self.layers[:n]:
            x = layer(x)
        for layer in self.layers[:n]:
            x = layer(x)
        return x
    """,
    "layers that another may replace": """
        for layer in self.layers:
            x = layer(x)
        return x
    """,
    "another statement": """
        for layer in self.layers[:n]:
            x = layer(x)
            y += 1
        return x
    """,
    "an end": """
        for layer in self.layers[:n]:
            x = layer(x)
        else:
            x = 3
        return x
    """,
    "a condition": """
        for layer in self.layers[:n]:
            x = layer(x) if y else x
        return x
    """,
    "a call among arguments": """
        for layer in self.layers[:n]:
            x = layer(x, y=int(y))
        return x
    """,
    "x among arguments": """
        for layer in self.layers[:n]:
            x = layer(x, y=x)
        return x
    """,
    "two outputs": """
        for layer in self.layers[:n]:
            x, = [layer(x)]
        return x
    """,
    "two targets": """
        for layer in self.layers[:n]:
            x = z = layer(x)
        return x + z
    """,
    "an attribute": """
        self.x = x
        for layer in self.layers[:n]:
            self.x = layer(self.x)
        return self.x
    """,
    "positions": """
        for layer in self.layers[:n]:
            x = layer(x, y)
        return x
    """,
    "numbers in the place of x": """
        for x, layer in enumerate(self.layers[:n]):
            x = layer(x)
        return x
    """,
    "numbers that begin elsewhere": """
        for i, layer in enumerate(self.layers[:n], 1):
            x = layer(x, i=i)
        return x
    """,
    "the layer in the place of x": """
        for x in self.layers[:n]:
            x = x(x.number)
        return x
    """,
    "x that a function reads": """
        class Now:
            def __int__(self):
                return int(x)
        for layer in self.layers[:n]:
            x = layer(x, y=Now())
        return x
    """,
    "x of the file": """
        global total
        total = x
        for layer in self.layers[:n]:
            total = layer(total)
        return total
    """,
    "a loop within another statement": """
        if True:
            for layer in self.layers[:n]:
                x = layer(x)
        return x
    """,
    "a super class": """
        super().__init__
        for layer in self.layers[:n]:
            x = layer(x)
        return x
    """,
    "a private name": """
        for layer in self.layers[:n]:
            x = layer(x, y=self.__number)
        return x
    """,
}


class Base(nn.Module):
    number = _Model__number = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Added, range(3)))


def of_file(tmp_path: Path, source: str, name: str = "one") -> Any:
    """The module of a file with this source."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    vars(found)["Base"] = Base
    spec.loader.exec_module(found)
    return found


def one_by_one(calls: Sequence[Call], x: Any, model: Any) -> Any:
    for layer, given in calls:
        x = layer(x, **given)
    return x


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_a_loop_is_taken_or_left(name: str, tmp_path: Path) -> None:
    """Whatever is taken computes the same, and raises the same in the same lines."""
    kind = of_file(tmp_path, HEAD + {**TAKEN, **LEFT}[name]).Model
    runs: list[int] = []

    def run(calls: Sequence[Call], x: Any, model: Any) -> Any:
        runs.append(len(calls))
        return one_by_one(calls, x, model)

    forward = with_layers_at_once(kind.forward, run)
    assert (forward is not None) == (name in TAKEN)
    if forward is None:
        return
    assert inspect.signature(forward) == inspect.signature(kind.forward)
    for args, kwargs in [
        ((1,), {}),
        ((1, 2), {}),
        ((3,), {"more": (4, 5, 6)}),
        ((1,), {"n": 1, "kw": 3}),
        ((1, 0), {}),
    ]:
        ours, theirs = ends_of(forward, kind(), *args, **kwargs), ends_of(kind.forward, kind(), *args, **kwargs)
        assert ours == theirs
    assert len(runs) == 5
    assert ends_of(forward, kind(), 1, more=("fails",) * 3) == ends_of(kind.forward, kind(), 1, more=("fails",) * 3)
    listed = kind()
    listed.layers = Backwards(listed.layers)
    assert ends_of(forward, listed, 1) == ends_of(kind.forward, listed, 1) and len(runs) <= 6


def ends_of(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The result; or the error, and where it was raised apart from what is ours."""
    try:
        return forward(*args, **kwargs)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        return repr(error), [(each.filename, each.lineno, each.name) for each in frames if each.name not in OURS]


OURS = ("run", "one_by_one", "_call")


def test_what_has_no_source_is_left(tmp_path: Path) -> None:
    """Or another than what runs: a file that is edited, cut or gone, code that is none of a file, or is changed."""
    source = HEAD + TAKEN["the usual"]
    edits = {
        "the same": source,
        "shifted": "\n\n\n" + source,
        "another body": source.replace("y=y", "y=1"),
        "another signature": source.replace("n=None,", "*, n=None,"),
        "another name": source.replace("def forward", "def backward"),
        "blank": "\n" * 20,
        "remarks": "# one\n" * 20,
        "cut": source.split("**kwargs)\n")[0],
        "cut in a text": source.split("\n\n")[0],
        "no text": "\x00" * 20,
        "empty": "",
    }
    for name, edited in edits.items():
        kind = of_file(tmp_path, source, "edited").Model
        (tmp_path / "edited.py").write_text(edited)
        linecache.clearcache()
        forward = with_layers_at_once(kind.forward, one_by_one)
        assert (forward is not None) == (name == "the same"), name
        sys.modules.pop("edited", None)
    (tmp_path / "edited.py").unlink()
    linecache.clearcache()
    assert with_layers_at_once(of_namespace(source, "edited.py").forward, one_by_one) is None
    for file in ("<string>", "<stdin>", str(tmp_path / "gone.py")):
        assert with_layers_at_once(of_namespace(source, file).forward, one_by_one) is None
    cell = "<ipython-input-1>"
    linecache.cache[cell] = (len(source), None, source.splitlines(keepends=True), cell)
    assert with_layers_at_once(of_namespace(source, cell).forward, one_by_one) is not None
    del linecache.cache[cell]


def of_namespace(source: str, file: str) -> Any:
    names: dict[str, Any] = {"Base": Base}
    exec(compile(source, file, "exec"), names)
    return names["Model"]


def test_code_that_is_replaced(tmp_path: Path) -> None:
    """As notebooks do, which reload a file into the functions that there are."""
    kind = of_file(tmp_path, HEAD + TAKEN["the usual"], "one").Model
    other = of_file(tmp_path, HEAD + TAKEN["the usual"].replace("y=y", "y=7"), "other").Model
    assert with_layers_at_once(kind.forward, one_by_one)(kind(), 1) == kind().forward(1)
    kind.forward.__code__ = other.forward.__code__
    assert with_layers_at_once(kind.forward, one_by_one)(kind(), 1) == other().forward(1) == kind().forward(1)
    kind.forward.__code__ = (lambda self, x: x).__code__
    assert with_layers_at_once(kind.forward, one_by_one) is None


def test_wrappers(tmp_path: Path) -> None:
    """Those of transformers stay, with all that they know; within others, or beside, a forward is left."""
    forward = modeling_llama.LlamaModel.forward
    assert isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__")
    found = with_layers_at_once(forward, one_by_one)
    assert found is not None and found.__code__ is forward.__code__ and found.__globals__ is forward.__globals__
    kind = of_file(tmp_path, HEAD + TAKEN["the usual"]).Model
    for other in (
        functools.wraps(kind.forward)(lambda *args: kind.forward(*args)),
        functools.wraps(forward)(lambda *args: forward(*args)),
        functools.partial(kind.forward),
        functools.wraps(forward)(functools.lru_cache(kind.forward)),
        around(functools.lru_cache(kind.forward)),
        staticmethod(kind.forward),
        Unhashable(kind.forward),
        nn.Linear.forward,
        len,
        None,
    ):
        assert with_layers_at_once(other, one_by_one) is None


def around(function: Any) -> Any:
    """A wrapper of transformers around a function."""
    found = modeling_llama.LlamaModel.forward
    cells = (CellType(function),) * len(found.__code__.co_freevars)
    made = FunctionType(found.__code__, found.__globals__, "forward", None, cells[: len(found.__closure__)])
    return functools.update_wrapper(made, function)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def test_no_warning_is_given_twice(tmp_path: Path) -> None:
    """Of what Python warns of when it compiles a file."""
    source = HEAD + TAKEN["the usual"].replace("return x", "z = '\\d' is 'd'\n        return x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = of_file(tmp_path, source).Model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_layers_at_once(kind.forward, one_by_one) is not None


def test_subclasses_and_models_of_ones_own(tmp_path: Path, written: list[int]) -> None:
    """A subclass may inherit the loop, call it, or have one of its own."""
    source = textwrap.dedent("""
        class Inherits(LlamaModel):
            __module__ = LlamaModel.__module__  # where transformers looks whether attention can be chosen

        class Calls(LlamaModel):
            __module__ = LlamaModel.__module__

            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out["last_hidden_state"] = -out["last_hidden_state"]
                return out

        class Own(LlamaModel):
            __module__ = LlamaModel.__module__

            def forward(self, input_ids, use_cache):
                x = self.embed_tokens(input_ids)
                tables = self.rotary_emb(x, self.positions(x))
                for layer in self.layers[:]:
                    x = layer(x, position_embeddings=tables, attention_mask=None)
                return x

            def positions(self, x):
                return None or torch.arange(x.shape[1])[None]
    """)
    own = of_file(tmp_path, "import torch\nfrom transformers import LlamaModel\n" + source)
    for name, most in (("Inherits", 3), ("Calls", 1), ("Own", 3)):
        theirs = made(num_hidden_layers=3).model
        theirs.__class__ = getattr(own, name)
        mine = qkv.accelerate(theirs)
        assert ("forward" in vars(mine)) == (most > 1)
        each = copy.deepcopy(mine)
        vars(each).pop("forward", None)
        written.clear()
        with torch.no_grad():
            got, want = (of(IDS[:, :1], use_cache=False) for of in (mine, each))
        pair = [out if isinstance(out, Tensor) else out["last_hidden_state"] for out in (got, want)]
        assert torch.equal(*pair) and written[0] == at_most(most)


@torch.no_grad()
def test_code_that_is_replaced_within_a_forward_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ours()
    within = inspect.unwrap(modeling_llama.LlamaModel.forward)
    want = mine(IDS[:, :3], use_cache=False).logits

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr(within, "__code__", forward.__code__)
        with pytest.raises(NotImplementedError):
            mine(IDS[:, :3], use_cache=False)
    assert torch.equal(mine(IDS[:, :3], use_cache=False).logits, want)


@torch.no_grad()
def test_layers_that_are_refused_are_asked_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, asked = ours(num_hidden_layers=8), []
    layer_of = decoder_step.layer_of
    monkeypatch.setattr(decoder_step, "layer_of", lambda *call: (asked.append(call[0]), layer_of(*call))[1])
    cache = QKVCache(mine)
    mine(IDS[:, :3], past_key_values=cache)  # which no layer takes in one call while it is empty
    assert len(asked) <= 3 * 8  # all at first; then each by itself, and by its own forward
    asked.clear()
    mine(IDS[:, :1], past_key_values=cache)
    assert len(asked) == 8
