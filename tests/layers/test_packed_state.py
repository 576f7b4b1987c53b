"""``load_state_dict`` takes packed projections whose order is known, leaves the rest strict, and copies."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
SIZES = [24, 8, 12]


def build() -> qkv.Attention:
    """A layer whose queries, keys and values have different numbers of rows."""
    layer = qkv.Attention(24, 6, num_kv_heads=2, value_dim=6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def packed(layer: qkv.Attention, form: str, prefix: str = "") -> dict[str, Tensor]:
    """The layer's state dict in another form; ``{}`` of the form is weight or bias."""
    state = layer.state_dict()
    packed = {
        form.format(part): torch.cat([state[f"{letter}_proj.{part}"] for letter in "qkv"])
        for part in ("weight", "bias")
    }
    out = "out_proj" if form.startswith("in_") else "o_proj"
    packed |= {f"{out}.{part}": state[f"out_proj.{part}"] for part in ("weight", "bias")}
    return {prefix + name: tensor for name, tensor in packed.items()}


FORMS = ["in_proj_{}", "qkv_proj.{}", "Wqkv.{}"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("assign", [False, True])
def test_packed_projections_are_loaded(form: str, assign: bool) -> None:
    source, layer = build(), build()
    state = packed(source, form)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in state.items()}
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer(X), source(X))
    assert state.keys() == before.keys()
    assert all(tensor.data_ptr() == before[name][0] for name, tensor in state.items())
    storages = [parameter.untyped_storage().data_ptr() for parameter in layer.parameters()]
    assert len(set(storages)) == len(storages)
    assert not {layer.q_proj.weight.data_ptr(), layer.v_proj.bias.data_ptr()} & {old[0] for old in before.values()}
    assert set(layer.state_dict()) == set(source.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_inside_of_a_model_and_copies_load_as_well(form: str) -> None:
    source = build()
    model = nn.Sequential(nn.Linear(24, 24), build())
    state = {**{f"0.{name}": tensor for name, tensor in model[0].state_dict().items()}, **packed(source, form, "1.")}
    for twin in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(state)
        assert torch.equal(twin[1](X), source(X))


def test_the_state_dict_of_torchs_module_is_that_of_from_torch() -> None:
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    ours = qkv.MultiHeadAttention(24, 4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X, X, X)[0])
    theirs = nn.MultiheadAttention(24, 4, kdim=10, vdim=10, batch_first=True)
    cross, context = qkv.CrossAttention(24, 4, context_dim=10), torch.randn(2, 7, 10)
    cross.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(cross(X, context), theirs(X, context, context)[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other sizes": (
        {"in_proj_weight": torch.zeros(72, 24)},
        r"in_proj_weight must have 44 rows, 24 of queries, 8 of keys and 12 of values; got shape \(72, 24\)",
    ),
    "both forms": ({"in_proj_weight": torch.zeros(44, 24), **build().state_dict()}, 'Unexpected .*"in_proj_weight"'),
    "an order that is not known": ({"c_attn.weight": torch.zeros(44, 24)}, 'Unexpected .*"c_attn.weight"'),
    "qkv_proj of CodeGen": (
        {"qkv_proj.weight": torch.zeros(44, 24), "out_proj.weight": torch.zeros(24, 36)},
        'Unexpected .*"qkv_proj.weight"',
    ),
    "another one": ({"query_key_value.weight": torch.zeros(44, 24)}, 'Unexpected .*"query_key_value.weight"'),
    "added keys": ({**packed(build(), "in_proj_{}"), "bias_k": torch.zeros(1, 1, 24)}, 'Unexpected .*"bias_k"'),
    "a part": ({"Wqkv.weight": torch.zeros(44, 24)}, 'Missing .*"q_proj.bias"'),
    "another width": ({"Wqkv.weight": torch.zeros(44, 23)}, "size mismatch for q_proj.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_as_before(name: str) -> None:
    state, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        build().load_state_dict(state)
