"""What others do to a model after `accelerate`, or it to itself: the same as to a model of transformers alone."""

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations.transformers.one_line import IDS, LEFT, model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import qkv

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own making


def linears(of: nn.Module) -> list[nn.Linear]:
    return [module for module in of.modules() if type(module) is nn.Linear]


def saved_and_loaded(of: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(of, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def assigned(of: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(value.shape, generator=generator) / 4 for name, value in of.state_dict().items()}
    of.load_state_dict(state, assign=True)
    return of


def materialised(of: Any) -> Any:
    """To no memory and back, as a loader of large models does."""
    state, buffers = copy.deepcopy(of.state_dict()), {name: buffer.clone() for name, buffer in of.named_buffers()}
    of = of.to("meta").to_empty(device="cpu")
    of.load_state_dict(state)
    for name, buffer in of.named_buffers():
        buffer.copy_(buffers[name])
    return of


def pruned(of: Any) -> Any:
    for linear in linears(of):
        prune.l1_unstructured(linear, "weight", 0.5)
    return of


def with_norms(of: Any) -> Any:
    for linear in linears(of):
        parametrizations.weight_norm(linear)
        linear.parametrizations.weight.original0.data *= 1.5
    return of


def resized(of: Any) -> Any:
    of.resize_token_embeddings(111, mean_resizing=False)
    with torch.no_grad():
        for table in (of.get_input_embeddings(), of.get_output_embeddings()):
            table.weight[97:] = 0.1
    return of


def without_a_layer(of: Any) -> Any:
    of.model.layers, of.config.num_hidden_layers = of.model.layers[:1], 1
    return of


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half": lambda of: of.half(),
    "bfloat16": lambda of: of.to(torch.bfloat16),
    "double": lambda of: of.double(),
    "there and back": lambda of: of.double().float(),
    "meta and back": materialised,
    "load_state_dict(assign=True)": assigned,
    "weight norms": with_norms,
    "pruning": pruned,
    "quantize_dynamic": lambda of: torch.ao.quantization.quantize_dynamic(of, {nn.Linear}),
    "quantize_dynamic in place": lambda of: torch.ao.quantization.quantize_dynamic(of, {nn.Linear}, inplace=True),
    "other embeddings": resized,
    "fewer layers": without_a_layer,
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "DataParallel": lambda of: nn.DataParallel(of).module,
    "share_memory": lambda of: of.share_memory(),
    "tied": lambda of: setattr(of.lm_head, "weight", of.model.embed_tokens.weight) or of,
    "untrained": lambda of: of.requires_grad_(False),
    "eval": lambda of: of.train().eval(),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_of_the_model_is_in_effect(name: str) -> None:
    theirs, ours = CHANGES[name](model()), CHANGES[name](qkv.accelerate(model()))
    want, got = (each(IDS, attention_mask=LEFT).logits for each in (theirs, ours))
    assert got.dtype is want.dtype
    error = {torch.float32: 1e-4, torch.float64: 1e-9}.get(got.dtype, 0.06)
    scale = float(want.abs().max())
    real = LEFT.bool()
    # Quantisation of activations may round a number the other way.
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=scale * (0.02 if "quantize" in name else error))
    options = {"attention_mask": LEFT, "max_new_tokens": 3, "do_sample": False}
    if got.dtype in (torch.float32, torch.float64) and "quantize" not in name:
        assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))
    again = qkv.accelerate(ours, enabled=False)(IDS, attention_mask=LEFT).logits
    torch.testing.assert_close(again[real], want[real], rtol=0, atol=0 if "quantize" not in name else scale * 0.02)


def test_on_meta_a_model_has_shapes() -> None:
    ours = qkv.accelerate(model()).to("meta")
    assert ours(IDS.to("meta")).logits.shape == (2, 9, 97)
    with torch.device("meta"):
        empty = qkv.accelerate(model())
    assert empty(IDS.to("meta")).logits.device.type == "meta"


class FaultError(Exception):
    """An error of somebody else's module."""


def raise_fault(*call: Any) -> None:
    raise FaultError


@pytest.mark.parametrize("place", ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.o_proj", "model.norm"])
@torch.no_grad()
def test_an_error_inside_leaves_the_model_as_it_was(place: str) -> None:
    ours = qkv.accelerate(model(), unpad=True)
    want = ours(IDS, attention_mask=LEFT).logits
    cache = ours(IDS[:1, :5], use_cache=True).past_key_values
    step = ours(IDS[:1, 5:6], past_key_values=copy.deepcopy(cache)).logits
    handle = ours.get_submodule(place).register_forward_pre_hook(raise_fault)
    for call in (lambda: ours(IDS, attention_mask=LEFT), lambda: ours.generate(IDS, attention_mask=LEFT)):
        with pytest.raises(FaultError):
            call()
    handle.remove()
    assert torch.equal(ours(IDS, attention_mask=LEFT).logits, want)
    assert torch.equal(ours(IDS[:1, 5:6], past_key_values=cache).logits, step)
    with qkv.accelerate() as report:
        q = torch.randn(1, 2, 3, 8)
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert report.routed == 1


def test_threads_call_one_model_while_another_is_taken_and_given_back() -> None:
    ours, other = qkv.accelerate(model(), unpad=True), model()
    same: list[bool] = []

    def call(keep: Tensor) -> None:
        with torch.no_grad():
            want = ours(IDS, attention_mask=keep).logits
            same.extend(torch.equal(ours(IDS, attention_mask=keep).logits, want) for _ in range(15))

    threads = [threading.Thread(target=call, args=(keep,)) for keep in (LEFT, LEFT.flip(1), torch.ones_like(LEFT))]
    for thread in threads:
        thread.start()
    for _ in range(10):
        qkv.accelerate(qkv.accelerate(other, unpad=True), enabled=False)
    for thread in threads:
        thread.join()
    assert same == [True] * 45
