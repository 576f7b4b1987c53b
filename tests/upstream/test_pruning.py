"""Complaints of users who prune heads."""

import torch
from torch import Tensor, nn

import qkv


def test_transformers_41076_heads_are_masked_and_removed() -> None:
    """``head_mask`` and ``prune_heads`` are gone (huggingface/transformers#41076, huggingface/transformers#27044).

    A hook on out_proj weighs heads, with gradients that rank them; a layer of the heads that stay has their rows and
    columns.
    """
    torch.manual_seed(0)
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=3), torch.randn(2, 7, 24)
    head_mask = torch.ones(6, requires_grad=True)

    def weigh(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return (inputs[0].unflatten(2, (6, 4)) * head_mask[:, None]).flatten(2)

    want = layer(x)
    hook = layer.out_proj.register_forward_pre_hook(weigh)
    torch.testing.assert_close(layer(x), want)
    towards = torch.randn_like(want)
    (slopes,) = torch.autograd.grad(layer(x), head_mask, towards)
    with torch.no_grad():
        head_mask[:] = torch.tensor([1, 1, 0, 0, 1, 1])  # the second group
    without = layer(x)
    hook.remove()
    # A head's share of the output is linear in its weight.
    torch.testing.assert_close((towards * (want - without)).sum(), slopes[2:4].sum(), rtol=1e-4, atol=1e-5)

    pruned, kept = qkv.CausalAttention(24, 4, num_kv_heads=2, head_dim=4), torch.tensor([True, False, True])
    rows = {
        "q_proj": kept.repeat_interleave(8),
        "k_proj": kept.repeat_interleave(4),
        "v_proj": kept.repeat_interleave(4),
    }
    state = layer.state_dict()
    for name, value in state.items():
        projection = name.split(".")[0]
        state[name] = value[rows[projection]] if projection in rows else value
    state["out_proj.weight"] = state["out_proj.weight"][:, rows["q_proj"]]
    pruned.load_state_dict(state)
    torch.testing.assert_close(pruned(x), without)
