"""Which modules of other than transformers' models `accelerate` routes calls of torch's attention in."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as bound

import qkv
from qkv.integrations.torch.reachable import reaches_attention


class Adapter(nn.Module):
    """A linear layer with an adapter of low rank, as in peft: no attention, but a name of it in its other methods."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.active = nn.Linear(8, 8), {"default": 2.0}, ["default"]
        self.low = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.high = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    def sizes(self) -> bool:
        return isinstance(self.base_layer, nn.MultiheadAttention)

    def adapted(self, x: Tensor) -> Tensor:
        found: Tensor = sum(
            self.high[name](F.dropout(self.low[name](x), 0.0)) * self.scaling[name] for name in self.active
        )
        return found

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.base_layer(x, *args) + self.adapted(x)
        return out


class Split(nn.Module):
    """Queries, keys and values of a module that attends, by each class below in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.project(x).chunk(3, dim=-1)


class Attend(Split):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.split(x))


class ByAnotherName(Split):
    def forward(self, x: Tensor) -> Tensor:
        return bound(*self.split(x))


def helper(*tensors: Tensor) -> Tensor:
    return (lambda *three: bound(*three))(*tensors)


class ByAFunction(Split):
    def forward(self, x: Tensor) -> Tensor:
        return helper(*self.split(x))


class ByAMethod(Split):
    def compute(self, x: Tensor) -> Tensor:
        return helper(*self.split(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


TABLE = {"torch": helper}


class ByATable(Split):
    def forward(self, x: Tensor) -> Tensor:
        return TABLE["torch"](*self.split(x))


class Processor:
    """As in diffusers."""

    def __call__(self, module: Split, x: Tensor) -> Tensor:
        return bound(*module.split(x))


class ByAProcessor(Split):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class ByAnAttribute(Split):
    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(TABLE["torch"])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.split(x))


class ByInheritance(ByAFunction):
    pass


class BySuper(ByAFunction):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ByAStaticMethod(Split):
    @staticmethod
    def compute(tensors: tuple[Tensor, ...]) -> Tensor:
        return helper(*tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.split(x))


class ByAnOperator(Split):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.scaled_dot_product_attention(*self.split(x))
        return found


ATTENDING = [Attend, ByAnotherName, ByAFunction, ByAMethod, ByATable, ByAProcessor, ByAnAttribute, ByInheritance]


@pytest.mark.parametrize("kind", [*ATTENDING, BySuper, ByAStaticMethod, ByAnOperator])
def test_modules_that_attend(kind: type[Split]) -> None:
    x, module = torch.randn(2, 3, 8), nn.Sequential(kind())
    want = module(x)
    assert reaches_attention(module[0]) and not reaches_attention(module)
    torch.testing.assert_close(qkv.accelerate(module)(x), want)
    module[0](x)
    assert qkv.report(module).routed == 2
    assert "torch's attention" in str(qkv.report(module))


@pytest.mark.parametrize("make", [Adapter, lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(Adapter(), nn.ReLU()))])
def test_modules_with_linear_layers_alone(make: Any) -> None:
    module, x = make(), torch.randn(2, 8)
    want, forwards = module(x), sum(type(each) is nn.Linear for each in module.modules())
    torch.testing.assert_close(qkv.accelerate(module)(x), want)
    assert sum("forward" in vars(each) for each in module.modules()) == forwards
    assert {part.subject for part in qkv.report(module).parts} == {"linear layers"}


def test_code_with_variables_that_are_not_set_yet() -> None:
    class Recursive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if len(x) < 2 else later(x)

    module = Recursive()
    assert not reaches_attention(module)

    def later(x: Tensor) -> Tensor:
        return bound(x, x, x)

    assert reaches_attention(module)


def test_torchs_own_modules_and_their_subclasses() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    attending = [nn.MultiheadAttention(8, 2), Mine(8, 2), nn.TransformerEncoderLayer(8, 2)]
    assert all(map(reaches_attention, [*attending, torch.fx.symbolic_trace(nn.Linear(2, 2))]))
    assert not any(map(reaches_attention, [nn.Linear(2, 2), nn.Sequential(*attending), nn.LayerNorm(2)]))
