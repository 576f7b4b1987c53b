"""Appends by the kernel, compared with those by torch, and the appends that are not eligible."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from qkv import Int8KVCache, KVCache, kernels
from qkv.cache.buffer import AppendBuffer, append_in_place
from qkv.integrations.transformers.cache import AppendLayer, Int8Layer

needs_kernel = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().append is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)


def tokens(batch: int, heads: int, count: int, width: int, dtype: torch.dtype, *, inside: bool) -> Tensor:
    """Random tokens, within larger memory: heads inside of tokens, as from layers, or outside."""
    shape = (batch, count, heads, width + 3) if inside else (batch, heads, count, width + 3)
    x = torch.randn(shape).to(dtype)[..., 1 : width + 1]
    return x.transpose(1, 2) if inside else x


def buffer_of(x: Tensor, capacity: int) -> AppendBuffer:
    """A buffer of the tokens ``x (B, heads, L, ...)``, with 77 in its spare slots."""
    buffer = AppendBuffer()
    buffer.extend(x, capacity)
    assert buffer.memory is not None
    buffer.memory[:, :, x.shape[2] :] = 77
    return buffer


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_native_appends_write_new_tokens_and_nothing_else(dtype: torch.dtype, inside: bool, count: int) -> None:
    """Keys and values of different widths, for a batch of 2 with 3 heads."""
    cached = [tokens(2, 3, 4, width, dtype, inside=inside) for width in (8, 5)]
    new = [tokens(2, 3, count, width, dtype, inside=inside) for width in (8, 5)]
    parts = [buffer_of(x, 9) for x in cached]
    grown = append_in_place(parts, new[0], new[1])
    assert grown is not None
    for part, before, added, shown in zip(parts, cached, new, grown, strict=True):
        assert torch.equal(shown, torch.cat([before, added], dim=2))
        assert part.is_current_view(shown) and part.tensor is shown and part.length == 4 + count
        assert part.memory is not None and part.memory[:, :, 4 + count :].eq(77).all()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("new_cache", [KVCache, Int8KVCache])
def test_native_appends_give_the_bits_of_torch(
    dtype: torch.dtype, inside: bool, new_cache: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients tokens are concatenated; without, torch does nothing once memory is allocated."""
    torch.manual_seed(0)
    pieces = [[tokens(2, 3, count, width, dtype, inside=inside) for width in (64, 40)] for count in (5, 1, 2, 1)]
    general, native = new_cache(), new_cache()
    general.append(*pieces[0])
    with torch.no_grad():
        native.append(*pieces[0])
    for piece in pieces[1:]:
        expected = general.append(*piece)
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(AppendBuffer, "_slots_for", None)
            found = native.append(*piece)
        assert found.offset == expected.offset and native.length == general.length
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@needs_kernel
@pytest.mark.parametrize("layer_of", [AppendLayer, Int8Layer])
@torch.no_grad()
def test_transformers_layers_append_natively(layer_of: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step allocates no memory and makes no view of the slots to write to."""
    layer, reference = layer_of(), DynamicLayer()
    pieces = [[tokens(2, 3, count, 8, torch.float32, inside=True) for _ in range(2)] for count in (5, 1, 1)]
    layer.update(*pieces[0])
    monkeypatch.setattr(AppendBuffer, "_slots_for", None)
    for piece in pieces[1:]:
        found = layer.update(*piece)
    for piece in pieces:
        expected = reference.update(*piece)
    for x, y in zip(found, expected, strict=True):
        step = y.abs().amax(dim=-1, keepdim=True) / 127 if layer_of is Int8Layer else torch.zeros(())
        assert ((x + 0.0 - y).abs() <= 0.5001 * step).all()


class _Recorder(TorchDispatchMode):
    """A dispatch mode that does nothing."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


K, V = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 5)
NOT_IN_PLACE = {
    "one text for both": (K[:1], V[:1]),
    "keys of one text": (K[:1], V),
    "values of one head": (K, V[:, :1]),
    "another dtype": (K.bfloat16(), V.bfloat16()),
    "values of another dtype": (K, V.half()),
    "integers": (K.to(torch.int8), V.to(torch.int8)),
    "narrower keys": (K[..., :7], V),
    "wider values": (K, torch.randn(2, 3, 1, 6)),
    "three dimensions": (K[0], V[0]),
    "more than the capacity": (K.expand(2, 3, 6, 8), V.expand(2, 3, 6, 5)),
    "lengths that differ": (K.expand(2, 3, 2, 8), V),
    "none": (K[:, :, :0], V[:, :, :0]),
    "columns apart": (torch.randn(2, 3, 1, 16)[..., ::2], V),
    "a subclass": (K.as_subclass(_Subclass), V),
    "no numbers": (K.to("meta"), V),
}


@needs_kernel
@pytest.mark.parametrize(
    "name, scaled",
    [(name, scaled) for name in NOT_IN_PLACE for scaled in (False, True) if not scaled or "dtype" not in name],
)
@torch.no_grad()
def test_native_appends_refuse_tensors_that_do_not_fit(name: str, scaled: bool) -> None:
    """Nothing is written then, neither keys nor values. Tokens to be rounded may have any floating dtype."""
    dtype = torch.int8 if scaled else torch.float32
    parts = [buffer_of(torch.ones(2, 3, 4, width, dtype=dtype), 9) for width in (8, 5)]
    parts += [buffer_of(torch.ones(2, 3, 4), 9) for _ in range(2)] if scaled else []
    assert append_in_place(parts, *NOT_IN_PLACE[name]) is None
    for part in parts:
        assert part.length == 4 and part.memory is not None
        assert part.memory[:, :, :4].eq(1).all() and part.memory[:, :, 4:].eq(77).all()


@needs_kernel
def test_native_appends_do_not_bypass_tracers_transforms_and_autograd() -> None:
    """Tracers, transforms and autograd see the operators."""
    with torch.no_grad():
        parts = [buffer_of(torch.ones(2, 3, 4, width), 9) for width in (8, 5)]
    assert append_in_place(parts, K, V) is None  # gradients are on: torch counts what is written
    with torch.no_grad():
        with _Recorder():
            assert append_in_place(parts, K, V) is None
        assert torch.vmap(lambda x: x + (append_in_place(parts, K, V) is None))(torch.zeros(2)).eq(1).all()
        with torch.autograd.forward_ad.dual_level():
            assert append_in_place(parts, K, V) is None
        parts = [buffer_of(torch.ones(2, 3, length, width), 9) for length, width in ((4, 8), (3, 5))]
        assert append_in_place(parts, K, V) is None  # keys and values would go to different places
        assert [part.length for part in parts] == [4, 3]


@needs_kernel
@torch.no_grad()
def test_native_appends_do_not_write_to_slots_of_earlier_views() -> None:
    parts = [buffer_of(torch.ones(2, 3, 4, width), 9) for width in (8, 5)]
    for part in parts:
        part.crop(3)
    assert append_in_place(parts, K, V) is None
    for part, new in zip(parts, (K, V), strict=True):
        part.extend(new, 9)  # by torch, which counts the version
    assert append_in_place(parts, K, V) is not None


@needs_kernel
@torch.no_grad()
def test_a_native_append_that_is_interrupted_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after keys have grown, before values."""
    cache = KVCache()
    cache.append(K, V)
    grow = AppendBuffer.grow

    def grow_once(self: AppendBuffer, count: int) -> Tensor:
        monkeypatch.setattr(AppendBuffer, "grow", stop)
        return grow(self, count)

    def stop(self: AppendBuffer, count: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(AppendBuffer, "grow", grow_once)
    with pytest.raises(KeyboardInterrupt):
        cache.append(K, V)
    monkeypatch.undo()
    assert cache.length == 1
    found = cache.append(K, V)
    assert found.offset == 1 and torch.equal(found.k, torch.cat([K, K], dim=2))
    assert torch.equal(found.v, torch.cat([V, V], dim=2))


@torch.no_grad()
def test_memory_of_the_caller_is_not_written_to_after_a_crop() -> None:
    given = torch.arange(12.0).view(1, 1, 4, 3)
    before, buffer = given.clone(), AppendBuffer()
    buffer.adopt(given)
    buffer.crop(1)
    tokens = buffer.extend(torch.zeros(1, 1, 2, 3), 8)
    assert torch.equal(given, before) and torch.equal(tokens[:, :, :1], before[:, :, :1])
