"""Multi-head, cross-attention and causal attention: layers compared with the sentences that define them."""

from typing import Any

import torch
from torch import nn

import qkv


@torch.no_grad()
def multi_head() -> dict[str, Any]:
    """The layer against its heads computed one by one, and against torch's layer with the same weights."""
    torch.manual_seed(0)
    heads, width = 6, 8
    layer = qkv.MultiHeadAttention(heads * width, heads).double()
    x = torch.randn(2, 20, heads * width, dtype=torch.float64)
    outputs = []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        q, k, v = (x @ p.weight[rows].mT + p.bias[rows] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        outputs.append((q @ k.mT / width**0.5).softmax(-1) @ v)
    one_by_one = layer.out_proj(torch.cat(outputs, dim=-1))
    theirs = nn.MultiheadAttention(heads * width, heads, batch_first=True).double().eval()
    ours, back = qkv.MultiHeadAttention.from_torch(theirs), layer.to_torch().eval()
    return {
        "heads": heads,
        "one_by_one_error": (layer(x) - one_by_one).abs().max().item(),
        "from_torch_error": (ours(x) - theirs(x, x, x)[0]).abs().max().item(),
        "to_torch_error": (layer(x) - back(x, x, x)[0]).abs().max().item(),
    }


@torch.no_grad()
def cross() -> dict[str, Any]:
    """Outputs against sums of the context's values, and how often a context is projected in decoding."""
    torch.manual_seed(0)
    layer = qkv.CrossAttention(48, 6, context_dim=20).double().eval()
    x, context = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((7, 48), (19, 20)))
    weights = layer.attention_weights(x, context)
    values = layer.v_proj(context).unflatten(-1, (6, 8)).transpose(1, 2)
    sums = layer.out_proj((weights @ values).transpose(1, 2).flatten(2))
    whole = layer(x, context)
    projections: list[str] = []
    layer.k_proj.register_forward_hook(lambda *_: projections.append("keys"))
    cache = qkv.CrossKVCache()
    steps = [layer(x[:, :1], context, cache=cache), *(layer(x[:, n : n + 1], cache=cache) for n in range(1, 7))]
    return {
        "queries": x.shape[1],
        "keys": context.shape[1],
        "width": x.shape[2],
        "context_width": context.shape[2],
        "sum_error": (weights.sum(-1) - 1).abs().max().item(),
        "sum_of_values_error": (whole - sums).abs().max().item(),
        "steps": len(steps),
        "projections": len(projections),
        "steps_error": (torch.cat(steps, dim=1) - whole).abs().max().item(),
    }


def causal() -> dict[str, Any]:
    """Gradients of outputs by later inputs, and decoding in chunks against the full pass."""
    torch.manual_seed(0)
    layer = qkv.CausalAttention(48, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(8))
    length = 40
    x = torch.randn(1, length, 48, requires_grad=True)
    rows = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0][0].norm(dim=-1) for out in layer(x)[0]]
    gradients = torch.stack(rows)
    later = torch.ones(length, length).triu(1).bool()
    errors = {}
    with torch.no_grad():
        whole = layer.eval()(x)
        for name, cuts in (
            ("token by token", [1] * length),
            ("a prompt and tokens", [30, *[1] * 10]),
            ("uneven", [1, 7, 2, 19, 11]),
        ):
            cache = qkv.KVCache()
            parts = [layer(part, cache=cache) for part in x.split(cuts, dim=1)]
            errors[name] = (torch.cat(parts, dim=1) - whole).abs().max().item()
    return {
        "length": length,
        "later_pairs": int(later.sum()),
        "later_gradients": int((gradients[later] != 0).sum()),
        "earlier_pairs": int((~later).sum()),
        "earlier_gradients": int((gradients[~later] != 0).sum()),
        "largest": whole.abs().max().item(),
        "chunk_errors": errors,
    }
