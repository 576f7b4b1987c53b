"""Whether a module is as it was: every public way of changing it is seen, and nothing of it is kept."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import qkv
from qkv.layers.tree_state import ClassState, TreeState


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.SiLU())
        self.scale, self.sizes = 0.5, (3, 3)
        self.table = torch.ones(2)


def renamed(module: nn.Module, before: str, after: str) -> None:
    module._modules = {after if name == before else name: part for name, part in module._modules.items()}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda block: setattr(block, "scale", 0.25),
    "an attribute of a part": lambda block: setattr(block.first, "in_features", 4),
    "a new attribute": lambda block: setattr(block.inner[1], "mine", 1),
    "an attribute that is gone": lambda block: delattr(block, "sizes"),
    "a tensor that is an attribute": lambda block: setattr(block, "table", torch.ones(2)),
    "training": lambda block: block.inner[1].eval(),
    "a forward": lambda block: setattr(block.first, "forward", lambda x: x),
    "a compiled call": lambda block: setattr(block, "_compiled_call_impl", lambda x: x),
    "a class": lambda block: setattr(block.first, "__class__", type("Mine", (nn.Linear,), {})),
    "a hook": lambda block: block.first.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda block: block.inner[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.register_full_backward_hook(lambda *_: None),
    "a backward pre-hook": lambda block: block.register_full_backward_pre_hook(lambda *_: None),
    "a parameter": lambda block: setattr(block.first, "weight", nn.Parameter(torch.ones(3, 3))),
    "a parameter that is shared": lambda block: setattr(block.second, "weight", block.first.weight),
    "a bias that is gone": lambda block: setattr(block.first, "bias", None),
    "a bias that has come": lambda block: setattr(block.second, "bias", nn.Parameter(torch.ones(3))),
    "a new parameter": lambda block: block.register_parameter("gain", nn.Parameter(torch.ones(1))),
    "a part": lambda block: setattr(block, "first", nn.Linear(3, 3)),
    "a part of a part": lambda block: block.inner.__setitem__(0, nn.Identity()),
    "a part that is gone": lambda block: delattr(block, "second"),
    "a part that is None": lambda block: setattr(block, "second", None),
    "a new part": lambda block: block.add_module("third", nn.Identity()),
    "parts in each other's places": lambda block: vars(block)["_modules"].update(
        first=block.second, second=block.first
    ),
    "parts by other names": lambda block: renamed(block, "second", "third"),
    "pruning": lambda block: prune.l1_unstructured(block.first, "weight", 0.5),
    "a parametrization": lambda block: parametrize.register_parametrization(block.first, "weight", nn.Identity()),
    "another dictionary": lambda block: setattr(block.first, "__dict__", {**vars(block.first), "in_features": 5}),
    "assigned parameters": lambda block: block.load_state_dict(copy.deepcopy(block.state_dict()), assign=True),
    "another device": lambda block: block.to_empty(device="meta"),
    "ours that were taken back": lambda block: qkv.accelerate(block, enabled=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str) -> None:
    block = qkv.accelerate(Block())
    state = TreeState(block)
    before = state.parameters()
    assert before is not None
    assert all(one is two for one, two in zip(filter(torch.is_tensor, before), block.parameters(), strict=True))
    CHANGES[name](block)
    assert state.parameters() is None
    has_hooks = name.startswith(("a hook", "a pre-hook", "a backward", "pruning"))
    assert has_hooks or TreeState(block).parameters() is not None


def test_what_lies_within_is_not_compared() -> None:
    block = Block()
    state = TreeState(block)
    block.load_state_dict(Block().state_dict())
    block.table.zero_()
    block.first.weight.data = torch.ones(3, 3)
    block.requires_grad_(False)
    parameters = state.parameters()
    assert parameters is not None and parameters[0] is block.first.weight
    assert [each is None for each in parameters] == [False, False, False, True, False, False]


def test_equal_attributes_are_the_same() -> None:
    block = Block()
    state = TreeState(block)
    block.sizes, block.scale = tuple(map(int, "33")), 1 / 2
    assert state.parameters() is not None


def test_a_forward_that_was_taken_back_out_of_sight_is_seen() -> None:
    linear = qkv.accelerate(nn.Linear(3, 3))
    state, ours = TreeState(linear), vars(linear)["forward"]
    assert state.parameters() is not None
    del vars(linear)["forward"]
    qkv.accelerate(linear, enabled=False)
    vars(linear)["forward"] = ours
    assert state.parameters() is None


@pytest.mark.parametrize("change", ["a parameter", "a part", "bias"])
def test_nothing_is_kept_of_what_is_gone(change: str) -> None:
    block = Block()
    state = TreeState(block)
    assert state.parameters() is not None
    gone = weakref.ref(block.first.bias if change == "bias" else block.first.weight)
    CHANGES["a bias that is gone" if change == "bias" else change](block)
    assert gone() is None
    whole = weakref.ref(block)
    del block
    gc.collect()
    assert whole() is None and state.parameters() is None


class Base(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Kind(Base):
    pass


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a method": lambda patch: patch.setattr(Kind, "forward", lambda self, x: -x),
    "an inherited method": lambda patch: patch.setattr(Base, "forward", lambda self, x: -x),
    "a method of all modules": lambda patch: patch.setattr(
        nn.Module, "_call_impl", functools.wraps(nn.Module._call_impl)(lambda *call: None)
    ),
    "an attribute of the class": lambda patch: patch.setattr(Kind, "weight", 1, raising=False),
    "a function of torch": lambda patch: patch.setattr(F, "silu", lambda x: x),
}


@pytest.mark.parametrize("name", PATCHES)
def test_changes_of_classes_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ClassState([Kind, nn.Linear])
    assert state.is_current()
    with monkeypatch.context() as patch:
        PATCHES[name](patch)
        assert not state.is_current()
    assert state.is_current()


def test_another_base_is_seen() -> None:
    state, bases = ClassState([Kind]), Kind.__bases__
    Kind.__bases__ = (nn.Module,)
    assert not state.is_current()
    Kind.__bases__ = bases
    assert state.is_current()
