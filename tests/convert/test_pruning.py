"""A pruned layer or model computes what the whole one does with the columns of the removed heads' outputs at 0."""

import pytest
import torch
from convert import models

import qkv
from qkv.convert import CheckpointError, convert_state_dict, prune_heads, prune_state_dict

EXACT = 1e-11
"""Some thousand roundings of fp64, relative to the largest result."""


def random_layer():
    """12 query heads on 4 KV heads, and one of everything that query heads have of their own."""
    torch.manual_seed(3)
    per_head = {
        "alibi": torch.rand(12),
        "sink_logits": True,
        "gate": True,
        "mask": qkv.Mask.dense(torch.rand(12, 5, 5) < 0.8),
    }
    layer = qkv.Attention(24, 12, num_kv_heads=4, head_dim=6, value_dim=5, **per_head).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


@pytest.mark.parametrize(
    ("removed", "num_heads", "num_kv_heads"),
    [
        ([], 12, 4),
        ([0, 4, 8, 9], 8, 4),
        ([3, 4, 5], 9, 3),
        ([0, 1, 2, 3, 4, 5, 9, 10, 11], 3, 1),
        ([1, 2, 3, 4, 5, 6, 8, 9, 10], 3, 3),
    ],
)
def test_pruned_layer_equals_one_with_removed_outputs_at_0(removed, num_heads, num_kv_heads):
    layer, x = random_layer(), torch.randn(2, 5, 24, dtype=torch.float64)
    pruned = prune_heads(layer, removed)
    assert (pruned.num_heads, pruned.num_kv_heads) == (num_heads, num_kv_heads)
    assert pruned.q_proj.weight.data_ptr() != layer.q_proj.weight.data_ptr()
    with torch.no_grad():
        whole = layer(x)
        layer.out_proj.weight.unflatten(1, (12, 5))[:, removed] = 0.0
        want = layer(x)
        assert (pruned(x) - want).abs().max() <= EXACT * want.abs().max()
        assert not removed or (whole - want).abs().max() > 0.1


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            [0, 3, 4, 9, 10, 11],
            r"groups that are kept must keep the same number of query heads; got heads \[0, 3, 4, 9, 10, 11\], "
            r"which leave \[2, 1, 3, 0\] in the groups of the 4 KV heads\. Remove 1 of \[1, 2\] and 2 of \[6, 7, 8\] "
            r"as well; or keep 1 of \[0\] and 2 of \[3, 4\]; or remove all of \[1, 2\] and \[5\]\.",
        ),
        ([12], r"must be query heads from 0 to 11, but not all of them; got \[12\]"),
        ([-1], r"got \[-1\]"),
        (range(12), "but not all of them; got"),
    ],
)
def test_pruning_that_breaks_groups_is_refused(removed, message):
    with pytest.raises(ValueError, match=f"^prune_heads: .*{message}"):
        prune_heads(random_layer(), removed)


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"^prune_heads: layer must be a qkv\.Attention; got MultiheadAttention\."):
        prune_heads(torch.nn.MultiheadAttention(32, 4), [0])
    with pytest.raises(TypeError, match=r"^prune_heads: heads must be a list such as \[3\]; got 3\."):
        prune_heads(random_layer(), 3)


SAME = {number: [0, 1, 2 * number + 2, 2 * number + 3] for number in range(3)}
"""Two KV heads with both of their query heads stay."""
ABLE = [family for family in models.FAMILIES if family not in ("gpt2", "gpt_neox", "gpt_bigcode")]


def grouped(family):
    model = models.build(family).double()
    converted = convert_state_dict(model.state_dict(), model.config.to_dict(), 4)
    return rebuilt(converted), converted


def rebuilt(result):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**result.config)).double().eval()
    model.load_state_dict(result.state_dict)
    return model


@pytest.mark.parametrize("family", ABLE)
def test_pruned_model_equals_one_with_removed_outputs_at_0(family):
    model, converted = grouped(family)
    whole = models.logits(model)
    pruned = prune_state_dict(converted.state_dict, converted.config, SAME)
    assert (pruned.config["num_attention_heads"], pruned.config["num_key_value_heads"]) == (4, 2)
    outs = [
        part for name, part in model.named_parameters() if name.endswith(("o_proj.weight", "self_attn.dense.weight"))
    ]
    with torch.no_grad():
        for number, out in enumerate(outs):
            out.unflatten(1, (8, -1))[:, SAME[number]] = 0.0
    want = models.logits(model)
    assert (models.logits(rebuilt(pruned)) - want).abs().max() <= EXACT * want.abs().max()
    assert (whole - want).abs().max() > 0.1


def test_pruned_tensors_can_be_saved():
    import safetensors.torch as safetensors

    _, converted = grouped("llama")  # Which has biases.
    pruned = prune_state_dict(converted.state_dict, converted.config, SAME).state_dict
    saved = safetensors.load(safetensors.save(pruned))
    assert all(torch.equal(saved[name], value) for name, value in pruned.items())


@pytest.mark.parametrize(
    ("family", "removed", "message"),
    [
        (
            "llama",
            {0: [0, 1]},
            r"one of each; got layer 0: 6 on 3, layer 1: 8 on 4, layer 2: 8 on 4\.",
        ),
        ("llama", {3: [0]}, r"the model has 3 layers; got heads to remove from \[3\]"),
        (
            "llama",
            {**SAME, 1: [0]},
            r"config: layer 1: groups that are kept must keep the same number .* which leave \[1, 2, 2, 2\]",
        ),
        (
            "gpt2",
            SAME,
            r"a gpt2 model cannot express 4 query heads on 4 KV heads of width 8: .* 'transformer\.h\.0\.attn",
        ),
        ("gpt_neox", SAME, "a gpt_neox model cannot express 4 query heads on 4 KV heads of width 8"),
        ("gpt_bigcode", SAME, "a gpt_bigcode model cannot express 4 query heads on 4 KV heads of width 8"),
    ],
)
def test_models_that_cannot_be_pruned(family, removed, message):
    model = models.build(family)
    state, config = model.state_dict(), model.config.to_dict()
    if family == "llama":
        state, config = convert_state_dict(state, config, 4)
    with pytest.raises(CheckpointError, match=message):
        prune_state_dict(state, config, removed)
