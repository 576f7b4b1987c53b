"""Sliding windows: w/2 tokens on each side, or the last w; linear cost, and a cache of bounded memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qkv
from qkv import Mask, kernels


class Count(TorchDispatchMode):
    """Counts what every operation writes, and the scores that attention computes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.scores = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not leaf._is_view()]
        self.bytes += sum(leaf.nbytes for leaf in written)
        self.largest = max([self.largest, *(leaf.numel() for leaf in written)])
        if "flash_attention" in func.name():
            q, k = (args[0], args[1]) if "backward" not in func.name() else (args[1], args[2])
            self.scores += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if func.name() in ("qkv::forward", "qkv::backward"):
            self.scores += kernels.count_scores(kernels.Call(*args[: len(kernels.Call._fields)]))
        return out


@contextmanager
def counting() -> Iterator[Count]:
    with Count() as count:
        yield count


def cost(make: Callable[[], qkv.Attention], length: int) -> Count:
    layer, x = make(), torch.randn(1, length, 16, requires_grad=True)
    with counting() as count:
        layer(x).sum().backward()
    return count


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"sink_tokens": 4}, {"sink_logits": True}, {"num_kv_heads": 1}], ids=str
)
def test_time_and_memory_are_linear_in_the_length_forward_and_backward(options: dict[str, Any]) -> None:
    once, twice = (cost(lambda: qkv.SlidingWindowAttention(16, 2, 64, **options), n) for n in (4096, 8192))
    assert once.scores > 0 and twice.scores <= 2.05 * once.scores
    assert twice.bytes <= 2.05 * once.bytes
    assert twice.largest < 4096**2  # nowhere a dense mask


@pytest.mark.parametrize("causal", [False, True])
def test_a_dilated_window_sees_as_many_keys_further_apart(causal: bool) -> None:
    layer = qkv.SlidingWindowAttention(16, 2, 4, causal=causal, sink_tokens=1, dilation=3)
    seen = (layer.attention_weights(torch.randn(1, 30, 16))[0, 0, 14] > 0).nonzero().flatten().tolist()
    assert seen == [0, *((5, 8, 11, 14) if causal else (8, 11, 14, 17, 20))]
    if causal:
        x, cache = torch.randn(2, 30, 16), layer.make_cache()
        with torch.no_grad():
            steps = [layer(part, cache=cache) for part in x.split([7, 1, 20, 2], dim=1)]
            torch.testing.assert_close(torch.cat(steps, dim=1), layer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"dilation must be at least 1; got 0"):
        qkv.SlidingWindowAttention(16, 2, 4, dilation=0)


def test_the_counter_detects_quadratic_cost() -> None:
    once, twice = (cost(lambda: qkv.CausalAttention(16, 2), n) for n in (512, 1024))
    assert 3.9 * once.scores <= twice.scores <= 4 * once.scores  # less what blocks around the diagonal share


def test_linear_with_padding_and_documents_too() -> None:
    def bytes_of(length: int) -> int:
        layer, x = qkv.SlidingWindowAttention(16, 2, 64), torch.randn(2, length, 16, requires_grad=True)
        mask = Mask.padding(torch.tensor([length, length - 99])) & Mask.documents(torch.arange(length)[None] // 500)
        with counting() as count:
            layer(x, mask=mask).sum().backward()
        return count.bytes

    assert bytes_of(8192) <= 2.05 * bytes_of(4096)


def receptive_field(depth: int, **options: Any) -> tuple[int, int]:
    """Distances from the middle token to the first and the last input that ``depth`` stacked layers let through."""
    layers = [qkv.SlidingWindowAttention(8, 2, 6, **options).double() for _ in range(depth)]
    x = torch.randn(1, 61, 8, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y)
    (grad,) = torch.autograd.grad(y[0, 30].sum(), x)
    reached = grad[0].abs().sum(-1).nonzero().flatten()
    assert len(reached) == reached[-1] - reached[0] + 1, "the field has holes"
    return 30 - int(reached[0]), int(reached[-1]) - 30


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_stacked_layers_widen_the_receptive_field_to_as_many_windows(depth: int) -> None:
    assert receptive_field(depth) == (3 * depth, 3 * depth)
    assert receptive_field(depth, causal=True) == (5 * depth, 0)


def test_the_two_meanings_of_a_window() -> None:
    longformer = qkv.SlidingWindowAttention(8, 1, 6).attention_weights(torch.randn(1, 20, 8))[0, 0] > 0
    mistral = qkv.SlidingWindowAttention(8, 1, 6, causal=True).attention_weights(torch.randn(1, 20, 8))[0, 0] > 0
    assert longformer[10].nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 12, 13]
    assert mistral[10].nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("sink_tokens", [0, 3])
@torch.no_grad()
def test_the_memory_of_the_cache_stops_growing(sink_tokens: int) -> None:
    cache, sizes = qkv.SlidingKVCache(window=16, sink_tokens=sink_tokens), set()
    for chunk in (5, 90, *[1] * 400, 33, *[1] * 10):
        k = torch.randn(2, 3, chunk, 4)
        keys = cache.append(k, k)
        sizes.add(cache.nbytes)
        assert keys.k.shape[2] <= sink_tokens + 2 * 16 + chunk
    assert cache.length == 5 + 90 + 400 + 33 + 10
    assert sizes == {2 * 2 * 3 * (sink_tokens + 32) * 4 * 4}


def test_decoding_over_a_window_reads_the_window_alone_and_without_a_mask() -> None:
    from qkv.problem import make_problem, trim

    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 4096, 8)
    problem = trim(make_problem("test", q, k, k, mask=Mask.causal(window=64), offset=4095))
    assert problem.k.shape[2] == 64 and problem.mask == Mask.full()
    assert problem.k.data_ptr() == k[:, :, -64:].data_ptr()
