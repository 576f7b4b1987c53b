"""`qkv.parallel` on cards, by NCCL: what the tests of ``tests/parallel`` prove on a CPU, in one script.

    torchrun --nproc-per-node 2 tests/gpu/parallel.py      two cards, or more: one each
    torchrun --nproc-per-node 1 tests/gpu/parallel.py      one card: the same calls, which send nothing
    torchrun --nproc-per-node 2 tests/gpu/parallel.py cpu  gloo, to try the script itself

Rank 0 prints a line a check; the script ends with 1 if one fails, on any rank. NCCL refuses two ranks on one card.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import qkv
from qkv import Mask, parallel

N = 203
SCHEMES = ("gather", "heads", "merge")
HALF = 2e-2
"""What bf16 rounds off in these calls."""
FULL = 1e-5


class Place:
    """The mesh, and numbers that are the same on all ranks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.device = mesh, torch.device(mesh.device_type)
        self.ids = torch.arange(N, device=self.device)[None] // 71

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, dtype)

    def layouts(self) -> Iterator[parallel.Tokens]:
        yield parallel.Tokens.even(N, self.mesh)
        yield parallel.Tokens.zigzag(N, self.mesh)
        ranks = self.mesh.size()
        if ranks > 1:  # from the third rank on, none has a token
            yield parallel.Tokens([[(0, 100), (150, N)], [(100, 150)], *([] for _ in range(ranks - 2))], self.mesh)

    def masks(self) -> dict[str, Mask]:
        return {
            "full": Mask.full(),
            "causal": Mask.causal(),
            "window and sinks": Mask.causal(window=30, sink_tokens=2),
            "sliding": Mask.sliding(window=20),
            "documents": Mask.causal() & Mask.documents(self.ids),
            "padding": Mask.padding(torch.tensor([N, 57], device=self.device)),
        }


def near(found: Tensor, want: Tensor, what: str, tolerance: float = FULL) -> None:
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def schemes(place: Place) -> None:
    """Every scheme, mask and layout, forward and backward, is one process."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, HALF)):
        whole = [place.randn(2, heads, N, 32, seed=heads, dtype=dtype).requires_grad_() for heads in (8, 2, 4)]
        whole[2] = place.randn(2, 2, N, 32, seed=9, dtype=dtype).requires_grad_()
        towards = place.randn(2, 8, N, 32, seed=1, dtype=dtype)
        for name, mask in place.masks().items():
            options: dict[str, Any] = {"mask": mask, "sink_logits": place.randn(8, seed=5)}
            out = qkv.attention(*whole, **options)
            want = [out, *torch.autograd.grad(out, whole, towards)]
            for tokens in place.layouts():
                for scheme in SCHEMES:
                    parts = [tokens.take(x.detach(), dim=2).requires_grad_() for x in whole]
                    own = parallel.attention(*parts, tokens, scheme=scheme, **options)
                    found = [own, *torch.autograd.grad(own, parts, tokens.take(towards, dim=2))]
                    for what, one, other in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
                        near(one, tokens.take(other, dim=2), f"{scheme}, {name}, {dtype}, {tokens}: {what}", tolerance)


def repeats(place: Place) -> None:
    """Gradients that are summed over ranks have the same bits each time."""
    tokens = parallel.Tokens.zigzag(N, place.mesh)
    for scheme in SCHEMES:
        found = []
        for _ in range(2):
            parts = [tokens.take(place.randn(1, 4, N, 32, seed=s), dim=2).requires_grad_() for s in range(3)]
            out = parallel.attention(*parts, tokens, mask=Mask.causal(), scheme=scheme)
            found.append(torch.autograd.grad(out.sum(), parts))
        # Kernels of torch may sum dq in another order each time; keys' gradients are sums of what ranks found.
        for one, other in zip(*found, strict=True):
            near(one, other, f"{scheme}: from run to run")


def joining(place: Place) -> None:
    """What is taken comes back, in order, and gradients are sums."""
    x = place.randn(2, N, 5).requires_grad_()
    for tokens in place.layouts():
        whole = tokens.join(tokens.take(x))
        assert torch.equal(whole, x)
        (gradient,) = torch.autograd.grad(whole.sum(), x)
        near(tokens.take(gradient), torch.full_like(tokens.take(x), place.mesh.size()), "gradient of join")


def layers(place: Place) -> None:
    """A layer with tokens=, and marked by Context."""
    torch.manual_seed(0)
    layer = qkv.CausalAttention(64, 8, num_kv_heads=2, rotary=qkv.RotaryEmbedding(8), qk_norm=True).to(place.device)
    x = place.randn(2, N, 64)
    want = layer(x)
    for tokens in place.layouts():
        near(layer(tokens.take(x), tokens=tokens), tokens.take(want), f"tokens=, {tokens}", 1e-4)
    tokens = parallel.Tokens.zigzag(N, place.mesh)
    parallelize_module(layer, place.mesh, parallel.Context())
    with parallel.over(tokens):
        near(layer(tokens.take(x)), tokens.take(want), "over()", 1e-4)


def heads(place: Place) -> None:
    """A layer whose heads are over ranks, and the gradients of all of its parameters."""
    found: dict[bool, dict[str, Tensor]] = {}
    for cut in (False, True):
        torch.manual_seed(0)
        layer: nn.Module = qkv.CausalAttention(64, 8, num_kv_heads=2, qk_norm=True, sink_logits=True).to(place.device)
        if cut:
            parallelize_module(layer, place.mesh, parallel.Heads())
        out = layer(place.randn(2, 50, 64))
        F.mse_loss(out, place.randn(2, 50, 64, seed=1)).backward()
        gradients = {name: one.grad for name, one in layer.named_parameters()}
        whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in gradients.items()}
        found[cut] = {"out": out, **whole}
    for name, want in found[False].items():
        near(found[True][name], want, name, 1e-4)


def decoding(place: Place) -> None:
    """Steps over a sharded cache are those over a whole one, with the same bits on all ranks."""
    torch.manual_seed(0)
    layer = qkv.CausalAttention(64, 8, num_kv_heads=2, rotary=qkv.RotaryEmbedding(8)).to(place.device).eval()
    x, outs = place.randn(2, 60, 64), []
    for cache in (qkv.KVCache(), parallel.ShardedKVCache(place.mesh, block=7)):
        with torch.no_grad():
            outs.append(torch.cat([layer(part, cache=cache) for part in x.split([50, 1, 1, 8], dim=1)], dim=1))
    near(outs[1], outs[0], "steps", 1e-4)
    first = outs[1].clone()
    distributed.broadcast(first, 0)
    assert torch.equal(first, outs[1]), "ranks have other bits"


def compiled(place: Place) -> None:
    """Under torch.compile."""
    tokens = parallel.Tokens.even(N, place.mesh)
    parts = [tokens.take(place.randn(1, 4, N, 32, seed=seed), dim=2) for seed in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel.attention(q, k, v, tokens, mask=Mask.causal(), scheme="gather")

    backend = "inductor" if place.device.type == "cuda" else "aot_eager"
    near(torch.compile(call, backend=backend)(*parts), call(*parts), "compiled", 1e-4)


def devices(place: Place) -> None:
    """Tensors of another device than the mesh's are refused."""
    tokens = parallel.Tokens.even(N, place.mesh)
    elsewhere = torch.randn(1, 4, tokens.rows, 32, device="meta")
    with pytest.raises(ValueError, match="on the device of the mesh"):
        parallel.attention(elsewhere, elsewhere, elsewhere, tokens)


CHECKS: tuple[Callable[[Place], None], ...] = (
    schemes, repeats, joining, layers, heads, decoding, compiled, devices,
)  # fmt: skip


def main() -> int:
    """Runs all checks."""
    kind = "cpu" if "cpu" in sys.argv[1:] else "cuda"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if kind == "cpu" else "nccl")
    place, failed = Place(init_device_mesh(kind, (distributed.get_world_size(),))), 0
    for check in CHECKS:
        verdict = torch.zeros(1, device=place.device)
        try:
            check(place)
        except Exception:
            verdict += 1
            print(f"rank {distributed.get_rank()}: {check.__name__}", traceback.format_exc(), sep="\n", file=sys.stderr)
        distributed.all_reduce(verdict)
        failed += bool(verdict)
        if distributed.get_rank() == 0:
            summary = (check.__doc__ or "").splitlines()[0]
            print(f"{'failed' if verdict else 'passed'}: {check.__name__}: {summary}", flush=True)
    distributed.destroy_process_group()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
