"""`unpad` follows the execution: which layers run, in which order, and what runs between or within them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from integrations.transformers.unpadding import IDS, LEFT, PACKED, PADDED, RIGHT, bert, hidden, llama, tokens_seen
from torch import Tensor, nn

from qkv import kernels
from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers import output_capturing, unpadding
from qkv.integrations.transformers.unpadding import unpad

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),  # of transformers' own making
]


def close(got: Tensor, want: Tensor, keep: Tensor = RIGHT) -> None:
    """Equal at real tokens, up to two orders of adding up a few dozen numbers of the order of one."""
    assert got.shape == want.shape
    torch.testing.assert_close(got[keep], want[keep], atol=4e-6, rtol=4e-5)


def layers(model: Any) -> nn.ModuleList:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def set_layers(model: Any, chosen: list[nn.Module]) -> None:
    if hasattr(model, "encoder"):
        model.encoder.layer = nn.ModuleList(chosen)
    else:
        model.layers = nn.ModuleList(chosen)
        model.config.num_hidden_layers = len(chosen)


# Changes of the list of layers, and how many run.
ORDERS: dict[str, tuple[Callable[[list[nn.Module]], list[nn.Module]], int]] = {
    "fewer": (lambda these: these[:2], 2),
    "the last alone": (lambda these: these[2:], 1),
    "reversed": (lambda these: these[::-1], 3),
    "one shared": (lambda these: [these[0], these[1], these[0]], 3),
    "one twice in a row": (lambda these: [these[1], these[1], these[2]], 3),
    "more": (lambda these: [*these, *these], 6),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [bert, llama])
def test_layers_in_any_number_and_order(make: Any, order: str, when: str) -> None:
    choose, count = ORDERS[order]
    reference, model = make(), make()
    set_layers(reference, choose([*layers(reference)]))
    if when == "after":
        unpad(model)
    set_layers(model, choose([*layers(model)]))
    if when == "before":
        unpad(model)
    with torch.no_grad(), tokens_seen() as seen:
        got = hidden(model, RIGHT, use_cache=False)
    assert seen == [PACKED] * count
    close(got, hidden(reference, RIGHT, use_cache=False))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_configuration_of_fewer_layers(count: int) -> None:
    reference, model = llama(), unpad(llama())
    for each in (reference, model):
        each.config.num_hidden_layers = count
    with torch.no_grad(), tokens_seen() as seen:
        got = hidden(model, LEFT, use_cache=False)
    assert seen == [PACKED] * count
    close(got, hidden(reference, LEFT, use_cache=False), LEFT)


def test_layerdrop() -> None:
    """The same seed drops the same layers."""
    sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 6, "decoder_layers": 1, "encoder_ffn_dim": 16}
    config = transformers.BartConfig(
        **sizes, encoder_layerdrop=0.5, dropout=0.0, decoder_ffn_dim=16, encoder_attention_heads=4
    )
    integration.register()
    model = transformers.BartModel(config).train()
    model.set_attn_implementation("qkv")

    def encoded() -> Tensor:
        torch.manual_seed(5)
        return model.encoder(input_ids=IDS, attention_mask=RIGHT.long()).last_hidden_state

    want = encoded()
    unpad(model)
    with tokens_seen() as seen:
        got = encoded()
    assert seen == [PACKED] * 4  # of six, by this seed
    close(got, want)


def test_an_early_exit() -> None:
    """A layer that ends the call by an exception leaves nothing behind."""

    class Enough(Exception):  # noqa: N818
        pass

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise Enough

    found: list[Tensor] = []
    reference, model = bert(), unpad(bert())
    for each in (reference, model):
        handle = each.encoder.layer[1].register_forward_hook(leave)
        with pytest.raises(Enough):
            hidden(each, RIGHT)
        handle.remove()
    close(found[1], found[0])
    close(hidden(model, RIGHT), hidden(reference, RIGHT))
    assert not unpadding._calls.packed


# Interventions in the middle of a model: they add to the first token of each text in the padded batch.
def steered(out: Tensor) -> Tensor:
    assert out.shape[:2] == PADDED, "the batch is not as it was given"
    return torch.cat([out[:, :1] + 5, out[:, 1:]], dim=1)


class Steering(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return on_first(self.inner(*args, **kwargs))


def on_first(out: Any) -> Any:
    return (steered(out[0]), *out[1:]) if isinstance(out, tuple) else steered(out)


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.shape[:2] == PADDED
    output[:, 0] += 5


def by_forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, args, out: on_first(out))


def by_hook_that_sees_arguments(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, args, out: (steered(args[0]), on_first(out))[1], prepend=True)


def by_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _module, args: (steered(args[0]), *args[1:]))


def by_first_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _module, args: (steered(args[0]), *args[1:]), prepend=True)


def by_patch(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: on_first(inner(*args, **kwargs))  # type: ignore[method-assign]


INTERVENTIONS: dict[str, Callable[[Any], None]] = {
    "a hook behind a layer": lambda model: by_forward_hook(layers(model)[1]),
    "a hook in place": lambda model: layers(model)[1].register_forward_hook(in_place),
    "a hook that sees arguments": lambda model: by_hook_that_sees_arguments(layers(model)[1]),
    "a hook before a layer": lambda model: by_pre_hook(layers(model)[1]),
    "the first hook before a layer": lambda model: by_first_pre_hook(layers(model)[1]),
    "a hook before the first layer": lambda model: by_pre_hook(layers(model)[0]),
    "a hook behind the last layer": lambda model: by_forward_hook(layers(model)[2]),
    "a hook within a layer": lambda model: by_forward_hook(part(model)),
    "a hook before a part": lambda model: by_pre_hook(part(model)),
    "a patched layer": lambda model: by_patch(layers(model)[1]),
    "a patched part": lambda model: by_patch(part(model)),
}

REPLACEMENTS: dict[str, Callable[[Any], None]] = {
    "a module around a layer": lambda model: layers(model).__setitem__(1, Steering(layers(model)[1])),
    "a module within a layer": lambda model: set_part(model, Steering(part(model))),
    "an adapter": lambda model: set_projection(model, Adapted(projection(model))),
}


class Adapted(nn.Module):
    """Like adapters of peft, some of which depend on the position of tokens."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(self.down.weight), nn.init.normal_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x - x[:, :1]))


def projection(model: Any) -> Any:
    layer = layers(model)[1]
    return layer.attention.self.query if hasattr(layer, "attention") else layer.self_attn.q_proj


def set_projection(model: Any, module: nn.Module) -> None:
    layer: Any = layers(model)[1]
    if hasattr(layer, "attention"):
        layer.attention.self.query = module
    else:
        layer.self_attn.q_proj = module


def part(model: Any) -> nn.Module:
    layer = layers(model)[1]
    return layer.intermediate if hasattr(layer, "intermediate") else layer.mlp


def set_part(model: Any, module: nn.Module) -> None:
    layer: Any = layers(model)[1]
    setattr(layer, "intermediate" if hasattr(layer, "intermediate") else "mlp", module)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("make", [bert, llama])
def test_hooks_and_patches_see_the_padded_batch(make: Any, name: str, when: str) -> None:
    reference, model = make(), make()
    INTERVENTIONS[name](reference)
    for step in ("before", "after"):
        if step == when:
            INTERVENTIONS[name](model)
        elif step == "before" or when == "before":
            unpad(model)
    want = hidden(reference, RIGHT, use_cache=False)
    with tokens_seen() as seen:
        got = hidden(model, RIGHT, use_cache=False)
    assert len(seen) == 3 and seen.count(PACKED) in (2, 3)
    close(got, want)


@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("make", [bert, llama])
def test_replaced_modules_see_the_padded_batch(make: Any, name: str) -> None:
    reference, model = make(), unpad(make())
    for each in (reference, model):
        REPLACEMENTS[name](each)
    want = hidden(reference, RIGHT, use_cache=False)
    with tokens_seen() as seen:
        got = hidden(model, RIGHT, use_cache=False)
    assert len(seen) == 3 and seen.count(PACKED) in (2, 3)
    close(got, want)
    with pytest.raises(ValueError, match=r"unpad: model must .*; got "):
        unpad(reference)  # what custom modules do with padding is unknown


@pytest.mark.parametrize("where", ["layer", "part"])
@pytest.mark.parametrize("kind", ["full", "pre"])
def test_backward_hooks_see_the_gradients_of_the_padded_batch(where: str, kind: str) -> None:
    reference, model = bert(), unpad(bert())
    found: list[list[Tensor]] = []
    for each in (reference, model):
        seen: list[Tensor] = []
        found.append(seen)
        module = each.encoder.layer[1] if where == "layer" else part(each)
        keep = lambda _module, *gradients, seen=seen: seen.extend(g for group in gradients for g in group)
        if kind == "full":
            module.register_full_backward_hook(keep)
        else:
            module.register_full_backward_pre_hook(keep)
        hidden(each, RIGHT)[RIGHT].square().sum().backward()
    assert len(found[0]) == len(found[1]) > 0
    for got, want in zip(found[1], found[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None and want.shape[:2] == PADDED:
            close(got, want)


def test_hooks_of_all_modules_see_the_padded_batch() -> None:
    model, shapes = unpad(bert()), set()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: shapes.add(tuple(args[0].shape[:2])) if isinstance(module, nn.Linear) else None
    )
    hidden(model.encoder and model, RIGHT)
    handle.remove()
    assert PACKED not in shapes and PADDED in shapes
    with tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PACKED] * 3


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_capturing_outputs_once_does_not_prevent_packing_later(what: str) -> None:
    """After the first request, the layers keep hooks of transformers."""
    model = unpad(bert())
    model(input_ids=IDS, attention_mask=RIGHT.long(), **{what: True})
    assert any(module._forward_hooks for module in model.encoder.layer[0].modules())
    with tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PACKED] * 3
    with tokens_seen() as seen:
        out = model(input_ids=IDS, attention_mask=RIGHT.long(), **{what: True})
    assert seen == [PADDED] * 3
    assert all(state.shape[0] == 4 for state in out[what.removeprefix("output_")])


# If undocumented attributes are missing, models run padded.
HIDDEN = {
    "transformers' collector": lambda patch: patch.setattr(output_capturing, "MODULE", "transformers.utils"),
    "the module of it": lambda patch: patch.setattr(output_capturing, "MODULE", "transformers.elsewhere"),
    "torch's global hooks": lambda patch: patch.setattr(unpadding, "has_global_hooks", lambda: True),
    "torch's hooks of a module": lambda patch: patch.setattr(unpadding, "_HOOKS", ("_elsewhere",)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_undetectable_hooks_run_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    want = model(input_ids=IDS, attention_mask=RIGHT.long(), output_hidden_states=True)
    unpad(model)
    HIDDEN[name](monkeypatch)
    with tokens_seen() as seen:
        got = hidden(model, RIGHT)
    assert seen == [PADDED] * 3 and torch.equal(got, want.last_hidden_state)
