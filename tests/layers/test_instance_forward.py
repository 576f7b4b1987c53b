"""A forward that is set on one module: how long it lives, and what happens with others over and under it."""

import copy
import functools
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.projection import ProjectedForward

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Double(InstanceForward):
    """Twice the module's own."""

    def call(self, *args: Any) -> Tensor:
        found: Tensor = 2 * self.forward(*args)
        return found


def made() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "twin", [lambda module: module, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_module_is_freed_when_it_is_deleted(twin: Callable[[nn.Module], nn.Module]) -> None:
    module = made()
    for kind in (ProjectedForward, Double, Double):
        kind.set_on(module)
    module = twin(module)
    module(X)
    found = weakref.ref(module.weight)
    del module
    assert found() is None


def test_a_forward_without_its_module_says_so() -> None:
    module = made()
    Double.set_on(module)
    forward = module.forward
    del module
    with pytest.raises(ReferenceError, match=r"^Double: the module must exist .*; it was deleted. Keep the module"):
        forward(X)


def test_copies_and_pickles_know_their_own_module() -> None:
    module = made()
    Double.set_on(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        nn.init.zeros_(twin.weight)
        assert torch.equal(twin(X), 2 * twin.bias.expand(2, 8)) and twin.forward.module is twin
    shallow = copy.copy(module)
    assert torch.equal(shallow(X), module(X))
    Double.take_back(shallow)
    assert "forward" not in vars(shallow) and torch.equal(2 * shallow(X), module(X))  # the other one's stays


def test_a_stack_is_taken_back_as_a_whole() -> None:
    module = made()
    want = module(X)
    for _ in range(3):
        Double.set_on(module)
    assert torch.equal(module(X), 8 * want)
    InstanceForward.take_back(module)
    assert "forward" not in vars(module)


def test_one_that_others_keep_out_of_sight_calls_the_module() -> None:
    module = made()
    want = module(X)
    Double.set_on(module)
    kept = module.forward
    module.forward = lambda x: kept(x) + 1
    torch.testing.assert_close(module(X), 2 * want + 1)
    Double.take_back(module)
    torch.testing.assert_close(module(X), want + 1)


class Hook:
    """A hook of the package accelerate."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def attach(module: Any, hook: Hook) -> None:
    """``accelerate.hooks.add_hook_to_module``."""
    old = module._old_forward if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else module.forward
    module._old_forward, module._hf_hook = old, hook

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


def detach(module: Any) -> None:
    """``accelerate.hooks.remove_hook_from_module``."""
    if hasattr(module, "_hf_hook"):
        del module._hf_hook
    if hasattr(module, "_old_forward"):
        module.forward = module._old_forward
        del module._old_forward


class Attend(nn.Module):
    """A module with a linear layer that calls torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = made()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)[None]
        return nn.functional.scaled_dot_product_attention(x, x, x)[0]


STEPS: dict[str, Callable[[nn.Module, Hook], Any]] = {
    "attach": lambda module, hook: [attach(each, hook) for each in module.modules()],
    "detach": lambda module, hook: [detach(each) for each in module.modules()],
    "accelerate": lambda module, hook: qkv.accelerate(module),
    "back": lambda module, hook: qkv.accelerate(module, enabled=False),
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
def test_hooks_that_replace_the_forward_over_and_under_ours(order: tuple[str, ...]) -> None:
    module, hook = Attend(), Hook()
    want = module(X)
    for number, step in enumerate(order):
        STEPS[step](module, hook)
        done, hook.calls = order[: number + 1], 0
        torch.testing.assert_close(module(X), want)
        is_hooked = "attach" in done and "detach" not in done[done.index("attach") :]
        assert hook.calls == 2 * is_hooked
        if "back" in done and "accelerate" not in done[done.index("back") :]:
            attributes = [value for each in module.modules() for value in vars(each).values()]
            assert not any(isinstance(value, InstanceForward) for value in attributes)
    assert qkv.accelerate(module) is module
    torch.testing.assert_close(copy.deepcopy(module)(X), want)
