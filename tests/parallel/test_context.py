"""`Context` and `over`: models that cannot pass a layout along, and what would leave out tokens of other ranks."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel.ranks import Ranks, mesh
from parallel.sharded import joined
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import qkv
from qkv import Mask, parallel
from qkv.parallel.runs import zigzag

Of = Callable[[int], Ranks]
N = 37
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)),
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=9)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, sliding_window=9, num_local_experts=2, num_experts_per_tok=1)
    ),
}
LAYOUTS = {"zigzag": zigzag(N, 2), "ragged": (((30, 37), (0, 11)), ((11, 30),))}
"""Each rank has tokens, without which transformers makes no masks."""


def marked(model: nn.Module, mark: str = "model.layers.*.self_attn") -> nn.Module:
    qkv.register()
    model.set_attn_implementation("qkv")
    return parallelize_module(model, mesh(), {mark: parallel.Context()})


def logits(model: nn.Module, ids: Tensor, layout: Any, mask: Mask | None) -> dict[str, Tensor]:
    """Logits of this rank's tokens, and the gradient of the first layer's weights."""
    model = marked(model)
    tokens = parallel.Tokens(layout, mesh())
    with parallel.over(tokens, mask=mask):
        out = model(tokens.take(ids), position_ids=tokens.positions[None], use_cache=False).logits
    out.float().square().sum().backward()
    return {"logits": out.detach(), "weight": model.model.layers[0].self_attn.q_proj.weight.grad}


@pytest.mark.parametrize("runs", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_over_ranks_is_the_model(ranks: Of, name: str, runs: str) -> None:
    torch.manual_seed(0)
    model, ids = MODELS[name](), torch.randint(50, (2, N))
    results = ranks(2).run(logits, model, ids, LAYOUTS[runs], None)
    model.set_attn_implementation("eager")
    want = model(ids).logits
    want.square().sum().backward()
    torch.testing.assert_close(joined([one["logits"] for one in results], LAYOUTS[runs], 1), want, rtol=1e-4, atol=1e-5)
    total = sum(one["weight"] for one in results)
    torch.testing.assert_close(total, model.model.layers[0].self_attn.q_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_documents_of_all_tokens_are_named_with_the_layout(ranks: Of) -> None:
    torch.manual_seed(0)
    model, ids = MODELS["Mistral"](), torch.randint(50, (1, N))
    mask = Mask.documents(torch.arange(N)[None] // 14)
    results = ranks(2).run(logits, model, ids, LAYOUTS["zigzag"], mask)
    model.set_attn_implementation("eager")
    seen = (Mask.causal(window=9) & mask).visible(N, N)
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    want = model(ids, attention_mask=hidden).logits
    torch.testing.assert_close(
        joined([one["logits"] for one in results], LAYOUTS["zigzag"], 1), want, rtol=1e-4, atol=1e-5
    )


def of_layers(layer: nn.Module, x: Tensor, layout: Any) -> Tensor:
    tokens = parallel.Tokens(layout, mesh())
    model = parallelize_module(nn.ModuleDict({"attention": layer}), mesh(), {"attention": parallel.Context()})
    with parallel.over(tokens):
        return model["attention"](tokens.take(x))


def test_a_layer_of_ours_may_be_marked_too(ranks: Of) -> None:
    torch.manual_seed(0)
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=2), torch.randn(2, N, 24)
    with torch.no_grad():
        results = ranks(2).run(of_layers_without_gradients, layer, x, LAYOUTS["ragged"])
        torch.testing.assert_close(joined(results, LAYOUTS["ragged"], 1), layer(x))


def of_layers_without_gradients(layer: nn.Module, x: Tensor, layout: Any) -> Tensor:
    with torch.no_grad():
        return of_layers(layer, x, layout)


def of_other_threads() -> None:
    """Gradient checkpointing whose backward pass is in another thread, as torch's own of a GPU."""
    tokens = parallel.Tokens.zigzag(N, mesh())
    layer = parallelize_module(qkv.CausalAttention(24, 6), mesh(), parallel.Context())
    x = tokens.take(torch.randn(1, N, 24))
    gradients, errors = [], []

    def backward(leaf: Tensor, out: Tensor) -> None:
        try:
            gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
        except ValueError as error:
            errors.append(str(error))

    def run(leaf: Tensor, out: Tensor) -> None:
        thread = threading.Thread(target=backward, args=(leaf, out))
        thread.start()
        thread.join()

    with parallel.over(parallel.Tokens.even(N, mesh())), parallel.over(tokens):
        leaf = x.clone().requires_grad_()
        backward(leaf, layer(leaf))
        leaf = x.clone().requires_grad_()
        run(leaf, checkpoint(layer, leaf, use_reentrant=False))
        torch.testing.assert_close(gradients[1], gradients[0])
        leaf = x.clone().requires_grad_()
        out = checkpoint(layer, leaf, use_reentrant=False)
        is_open, may_close = threading.Event(), threading.Event()

        def other() -> None:
            with parallel.over(tokens):
                is_open.set()
                may_close.wait()

        thread = threading.Thread(target=other)
        thread.start()
        is_open.wait()
        run(leaf, out)  # of which thread is it?
        may_close.set()
        thread.join()
    assert len(gradients) == 2 and "must be within `with parallel.over(tokens):`" in errors[0]
    run(leaf, out)
    assert len(gradients) == 2 and len(errors) == 2


def test_forward_passes_that_are_repeated_in_another_thread(ranks: Of) -> None:
    ranks(2).run(of_other_threads)


def _call(change: str) -> str:
    """A call that is wrong on all ranks."""
    tokens = parallel.Tokens.zigzag(N, mesh())
    layer, x = qkv.CausalAttention(24, 6), tokens.take(torch.randn(1, N, 24))
    if change == "outside":
        parallelize_module(layer, mesh(), parallel.Context())(x)
    if change == "another mesh":
        from torch.distributed.device_mesh import init_device_mesh

        other = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
        with parallel.over(tokens):
            parallelize_module(layer, other, parallel.Context())(x)
    if change == "another module":
        parallelize_module(nn.Linear(3, 3), mesh(), parallel.Context())
    if change == "tokens":
        with parallel.over(N):  # type: ignore[arg-type]
            pass
    if change == "mask":
        with parallel.over(tokens, mask=torch.ones(3)):  # type: ignore[arg-type]
            pass
    if change == "context":
        with parallel.over(tokens, context_tokens=3):  # type: ignore[arg-type]
            pass
    model = marked(MODELS["Mistral"]())
    ids, given = tokens.take(torch.zeros(1, N, dtype=torch.int64)), {"position_ids": tokens.positions[None]}
    if change == "model outside":
        model(ids, **given)
    if change == "attention of torch":
        model.set_attn_implementation("sdpa")
    if change == "cache":
        given["past_key_values"] = DynamicCache(config=model.config)
        with parallel.over(tokens):
            model(ids, **given)
            model(ids, **given)
    if change == "padding":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][:, :2] = 0
    if change == "positions":
        given["position_ids"] = torch.arange(ids.shape[1])[None]
    if change == "weights":
        given["output_attentions"] = True
    if change == "other forward":
        model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with parallel.over(tokens):
        model(ids, use_cache=False, **given)
    return "none"


MESSAGES = {
    "outside": r"CausalAttention: a layer that parallel.Context\(\) has marked .* `with parallel.over\(tokens\):`",
    "another mesh": r"the layout of parallel.over must be of the mesh of parallel.Context\(\)",
    "another module": r"the module must be an attention layer of qkv, .*; got Linear",
    "tokens": r"parallel.over: tokens must be a qkv.parallel.Tokens; got int",
    "mask": r"parallel.over: mask must be a qkv.Mask or None; got Tensor",
    "context": r"parallel.over: context_tokens must be .*; got int",
    "model outside": r"MistralAttention: a layer that parallel.Context\(\) has marked .* got a call outside",
    "attention of torch": r'MistralAttention: a module that .* has marked must be on "qkv"; got \'sdpa\'',
    "cache": r"queries and keys must be those of the \d+ tokens .*, without a cache \(use_cache=False\)",
    "padding": r"padding, documents and other masks of single tokens must be those of all ranks",
    "positions": r"position_ids must be those of the layout, tokens.positions\[None\]; got others, from 0 to 1\d",
    "weights": r"output_attentions must be None in a call over ranks",
    "other forward": r"must compute its attention by qkv; its forward did not call it",
}


def test_what_would_leave_out_the_tokens_of_other_ranks_raises_on_all(ranks: Of) -> None:
    for change, message in MESSAGES.items():
        for one in ranks(2).refused(_call, change):
            assert re.search(message, one.message), f"{change}: {one.message}"
