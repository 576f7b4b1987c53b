"""Layers with caches whose rows differ in length: each row is the same text alone."""

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import Mask

E, LENGTHS = 32, (5, 2, 8, 0)
X = torch.randn(4, 24, E, generator=torch.Generator().manual_seed(0))
CACHES: dict[str, tuple[Mask, Callable[[], Any]]] = {
    "kv": (Mask.causal(), qkv.KVCache),
    "capacity": (Mask.causal(), lambda: qkv.KVCache(capacity=16)),
    "int8": (Mask.causal(), qkv.Int8KVCache),
    "paged": (Mask.causal(), lambda: qkv.PagedKVCache(page_size=3)),
    "paged, int8": (Mask.causal(), lambda: qkv.PagedKVCache(page_size=3, dtype="int8")),
    "window": (Mask.causal(4), lambda: qkv.SlidingKVCache(4)),
    "sinks": (Mask.causal(3, sink_tokens=2), lambda: qkv.SlidingKVCache(3, 2)),
    "sinks, int8": (Mask.causal(3, sink_tokens=2), lambda: qkv.SlidingKVCache(3, 2, dtype="int8")),
    "window, all keys": (Mask.causal(4), qkv.KVCache),
}
each_cache = pytest.mark.parametrize(("mask", "make"), CACHES.values(), ids=CACHES)


class ExactLinear(nn.Linear):
    """Products of a row whose bits do not depend on the other rows, as torch's do."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.double()[..., None, :] * self.weight.double()).sum(-1).to(x.dtype)


CAUSAL = Mask.causal()


def layer(mask: Mask = CAUSAL, **options: Any) -> qkv.Attention:
    torch.manual_seed(1)
    options = {"rotary": qkv.RotaryEmbedding(8), "bias": False, **options}
    made = qkv.Attention(E, 4, num_kv_heads=2, mask=mask, **options).eval()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        old = getattr(made, name)
        new = ExactLinear(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        setattr(made, name, new)
    return made


def padded(side: str, lengths: tuple[int, ...] = LENGTHS, columns: int = 9) -> tuple[Tensor, Tensor]:
    """The first tokens of each row of X, with padding, and which columns are tokens."""
    x, keep = torch.full((len(lengths), columns, E), float("nan")), torch.zeros(len(lengths), columns, dtype=torch.bool)
    for b, length in enumerate(lengths):
        first = {"left": columns - length, "right": 0, "both": (columns - length) // 2}[side]
        x[b, first : first + length], keep[b, first : first + length] = X[b, :length], True
    return x, keep


class Alone:
    """Each row of a batch by itself, with a cache of its own."""

    def __init__(self, layer: qkv.Attention, make: Callable[[], Any], rows: int = len(LENGTHS)) -> None:
        self.layer, self.caches = layer, [make() for _ in range(rows)]

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return self.layer(x[None], cache=self.caches[row])[0] if len(x) else x

    def step(self, x: Tensor) -> Tensor:
        return torch.stack([self(row, one) for row, one in enumerate(x)])

    def next(self, count: int) -> Tensor:
        """The next tokens of each row of X."""
        return torch.stack([X[row, cache.length : cache.length + count] for row, cache in enumerate(self.caches)])


def assert_same(found: Tensor, want: Tensor) -> None:
    assert torch.equal(found, want), f"they differ by {(found - want).abs().max()}"


@each_cache
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_a_padded_prompt_and_steps_that_know_nothing_of_it(mask: Mask, make: Callable[[], Any], side: str) -> None:
    ours, cache = layer(mask), make()
    alone, (x, keep) = Alone(ours, make), padded(side)
    out = ours(x, mask=Mask.padding(keep), cache=cache)
    for b, length in enumerate(LENGTHS):
        assert_same(out[b][keep[b]], alone(b, X[b, :length]))
    assert cache.lengths.tolist() == list(LENGTHS)
    for count in (1, 2, 1, 3):
        assert_same(ours(alone.next(count), cache=cache), alone.step(alone.next(count)))
    assert cache.lengths.tolist() == [length + 7 for length in LENGTHS]


@each_cache
@torch.no_grad()
def test_nested_tensors_are_rows_of_their_own(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    alone = Alone(ours, make, 3)
    for lengths in ((5, 2, 4), (1, 3, 2)):
        new = [
            X[row, one.length : one.length + n] for row, (one, n) in enumerate(zip(alone.caches, lengths, strict=True))
        ]
        out = ours(torch.nested.nested_tensor(new, layout=torch.jagged), cache=cache)
        for row, found in enumerate(out.unbind()):
            torch.testing.assert_close(found, alone(row, new[row]), rtol=1e-5, atol=1e-6)
    assert_same(ours(alone.next(2), cache=cache), alone.step(alone.next(2)))


@each_cache
@torch.no_grad()
def test_every_way_to_give_padding_at_a_step(mask: Mask, make: Callable[[], Any]) -> None:
    ours, (x, keep) = layer(mask), padded("left")
    shown = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    all_columns = torch.cat([keep, shown], dim=1)
    ways = [all_columns, shown]
    if make().capacity:
        ways.append(torch.cat([all_columns, torch.ones(4, 5, dtype=torch.bool)], dim=1))
    for way in ways:
        alone, cache = Alone(ours, make), make()
        ours(x, mask=Mask.padding(keep), cache=cache)
        for b, length in enumerate(LENGTHS):
            alone(b, X[b, :length])
        new = alone.next(2)
        out = ours(new, mask=Mask.padding(way), cache=cache)
        for b in range(4):
            # One query alone sums in another order than two.
            torch.testing.assert_close(out[b][shown[b]], alone(b, new[b][shown[b]]), rtol=1e-5, atol=1e-6)
        assert cache.lengths.tolist() == [7, 3, 9, 0]
        assert_same(ours(alone.next(2), cache=cache), alone.step(alone.next(2)))


@each_cache
@torch.no_grad()
def test_drafts_refused_row_by_row(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    alone = Alone(ours, make)
    for count, refused in ((3, (0, 1, 2, 0)), (2, (1, 0, 0, 2)), (3, (2, 0, 1, 1)), (1, (0, 0, 0, 0))):
        new = alone.next(count)
        assert_same(ours(new, cache=cache), alone.step(new))
        kept = cache.lengths - torch.tensor(refused)
        cache.crop(kept)
        for one, length in zip(alone.caches, kept.tolist(), strict=True):
            one.crop(length)
    assert cache.lengths.tolist() == [6, 8, 6, 6]


@each_cache
@torch.no_grad()
def test_rows_join_leave_and_are_replaced(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    alone = Alone(ours, make)
    for b, length in enumerate((6, 3, 1, 4)):
        one = make()
        ours(X[b : b + 1, :length], cache=one)
        alone(b, X[b, :length])
        cache.join(one)
    assert_same(ours(alone.next(2), cache=cache), alone.step(alone.next(2)))
    alone.caches[1] = make()
    fresh = make()
    ours(X[1:2, :5], cache=fresh)
    alone(1, X[1, :5])
    cache.replace(torch.tensor([1]), fresh)
    assert_same(ours(alone.next(2), cache=cache), alone.step(alone.next(2)))
    stay = torch.tensor([3, 0])
    cache.select(stay)
    new = alone.next(1)[stay]
    assert_same(ours(new, cache=cache), torch.stack([alone(3, new[0]), alone(0, new[1])]))
    cache.repeat(2)
    beams = X[:4, :2]
    want = [ours(beams[i : i + 1], cache=select(cache, i)) for i in range(4)]
    assert_same(ours(beams, cache=cache), torch.cat(want))


def select(cache: Any, row: int) -> Any:
    one = copy(cache)
    one.select(torch.tensor([row]))
    return one


@each_cache
@torch.no_grad()
def test_tensors_of_a_mask_and_biases_count_columns(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    alone, (x, keep) = Alone(ours, make), padded("left", (5, 2, 8, 3))
    generator = torch.Generator().manual_seed(3)
    documents = torch.randint(2, (4, 11), generator=generator)
    allow = torch.rand(4, 4, 2, 11, generator=generator) > 0.3
    bias = torch.randn(1, 4, 2, 11, generator=generator)
    ours(x, mask=Mask.padding(keep) & Mask.documents(documents[:, :9]), cache=cache)
    for b, length in enumerate((5, 2, 8, 3)):
        ours(X[b : b + 1, :length], mask=Mask.documents(documents[b : b + 1, :9][:, keep[b]]), cache=alone.caches[b])
    new, every = alone.next(2), torch.cat([keep, torch.ones(4, 2, dtype=torch.bool)], dim=1)
    out = ours(new, mask=Mask.documents(documents) & Mask.dense(allow), bias=bias, cache=cache)
    for b in range(4):
        of_row = Mask.documents(documents[b : b + 1, every[b]]) & Mask.dense(allow[b : b + 1, ..., every[b]])
        want = ours(new[b : b + 1], mask=of_row, bias=bias[..., every[b]], cache=alone.caches[b])
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make for mask, make in CACHES.values() if mask.left is None])
@pytest.mark.parametrize("crop", [False, True])
@torch.no_grad()
def test_a_dense_mask_shows_no_slot_after_a_row(make: Callable[[], Any], crop: bool) -> None:
    """Nothing else hides them in a layer that is not causal: tokens of longer rows, and those that were cropped."""
    ours, cache, lengths = layer(Mask.full()), make(), (5, 2, 8, 3)
    x, keep = padded("right", lengths)
    ours(x, mask=Mask.padding(keep) & CAUSAL, cache=cache)
    kept = (4, 2, 5, 1) if crop else lengths
    cache.crop(torch.tensor(kept))
    new = torch.stack([X[b, length : length + 2] for b, length in enumerate(kept)])
    out = ours(new, mask=Mask.dense(torch.ones(1, 1, 2, cache.columns + 2).bool()), cache=cache)
    for b, (first, length) in enumerate(zip(lengths, kept, strict=True)):
        alone = make()
        ours(X[b : b + 1, :first], mask=CAUSAL, cache=alone)
        alone.crop(length)
        want = ours(new[b : b + 1], mask=Mask.dense(torch.ones(1, 1, 2, length + 2).bool()), cache=alone)
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-5, atol=1e-6)


def test_gradients_through_a_cache_of_unequal_rows() -> None:
    ours, cache = layer(), qkv.KVCache()
    x, keep = padded("left")
    x = x.nan_to_num().requires_grad_()
    later = X[:, 10:12].clone().requires_grad_()
    out = ours(x, mask=Mask.padding(keep), cache=cache)
    step = ours(later, cache=cache)
    (out[keep].square().sum() + step.square().sum()).backward()
    assert x.grad is not None
    assert later.grad is not None
    assert (x.grad[~keep] == 0).all()
    for b, length in enumerate(LENGTHS):
        rows = X[b : b + 1, :length].clone().requires_grad_()
        last = X[b : b + 1, 10:12].clone().requires_grad_()
        one = ours(torch.cat([rows, last], dim=1))
        one.square().sum().backward()
        torch.testing.assert_close(x.grad[b][keep[b]], rows.grad[0], rtol=1e-4, atol=1e-5)  # type: ignore[index]
        torch.testing.assert_close(later.grad[b], last.grad[0], rtol=1e-4, atol=1e-5)  # type: ignore[index]


@torch.no_grad()
def test_padding_of_a_context_is_remembered() -> None:
    torch.manual_seed(0)
    ours, cache = qkv.CrossAttention(E, 4), qkv.CrossKVCache()
    keep = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    context = torch.where(keep[..., None], X[:, :4], float("nan"))
    want = ours(X[:, 4:6], X[:, :4], mask=Mask.padding(keep))
    torch.testing.assert_close(ours(X[:, 4:6], context, mask=Mask.padding(keep), cache=cache), want)
    for mask in (None, Mask.padding(keep)):
        torch.testing.assert_close(ours(X[:, 4:6], cache=cache, mask=mask), want)
        torch.testing.assert_close(ours(X[:, 4:6], context, cache=cache, mask=mask), want)
    fewer = Mask.padding(torch.tensor([4, 1, 4, 2]))
    want = ours(X[:, 4:6], X[:, :4], mask=Mask.padding(keep) & fewer)
    torch.testing.assert_close(ours(X[:, 4:6], cache=cache, mask=fewer), want)
    assert cache.lengths.tolist() == [3, 2, 1, 4]
    cache.select(torch.tensor([2, 0]))
    torch.testing.assert_close(
        ours(X[[2, 0], 4:6], cache=cache), ours(X[[2, 0], 4:6], X[[2, 0], :4], mask=Mask.padding(keep[[2, 0]]))
    )


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_scaling_by_length_counts_no_padding(side: str) -> None:
    scaling = qkv.RotaryScaling.dynamic(2.0, max_position_embeddings=6)
    ours, cache = layer(rotary=qkv.RotaryEmbedding(8, scaling=scaling)), qkv.KVCache()
    alone, (x, keep) = Alone(ours, qkv.KVCache), padded(side)
    out = ours(x, mask=Mask.padding(keep), cache=cache)
    for b, length in enumerate(LENGTHS):
        assert_same(out[b][keep[b]], alone(b, X[b, :length]))


@torch.no_grad()
def test_positions_rotate_and_masks_count() -> None:
    ours = layer()
    twice = torch.arange(6) * 2
    rotary = qkv.RotaryEmbedding(8, position_scale=2.0)
    torch.testing.assert_close(ours(X[:, :6], positions=twice), layer(rotary=rotary)(X[:, :6]))
    cache = qkv.KVCache()
    ours(X[:, :4], positions=twice[:4], cache=cache)
    last = ours(X[:, 4:6], positions=twice[4:].expand(4, 2), cache=cache)
    torch.testing.assert_close(last, layer(rotary=rotary)(X[:, :6])[:, 4:])
    with pytest.raises(ValueError, match="positions rotate queries and keys, so the layer needs a rotary; got None"):
        layer(rotary=None)(X, positions=torch.arange(24))


@each_cache
@torch.no_grad()
def test_a_position_bias_by_row(mask: Mask, make: Callable[[], Any]) -> None:
    if mask.sink_tokens:
        return  # the distances of sinks change, as they do for ALiBi
    torch.manual_seed(2)
    ours, cache = layer(mask, rotary=None, position_bias=qkv.RelativePositionBias(4, bidirectional=False)), make()
    for weight in ours.position_bias.parameters():  # type: ignore[union-attr]
        nn.init.normal_(weight)
    alone, (x, keep) = Alone(ours, make), padded("left")
    out = ours(x, mask=Mask.padding(keep), cache=cache)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(out[b][keep[b]], alone(b, X[b, :length]), rtol=1e-5, atol=1e-6)
    for count in (1, 2, 5):
        found, want = ours(alone.next(count), cache=cache), alone.step(alone.next(count))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@each_cache
@torch.no_grad()
def test_padding_that_does_not_fit_is_refused_and_changes_nothing(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    x, keep = padded("left")
    ours(x, mask=Mask.padding(keep), cache=cache)
    holes = torch.tensor([[True, False, True]]).expand(4, -1)
    with pytest.raises(ValueError, match="the new tokens of a row must follow each other"):
        ours(X[:, :3], mask=Mask.padding(holes), cache=cache)
    for count in (1, 11, 13):
        with pytest.raises(
            ValueError, match=rf"cover all 12 columns, 9 of earlier calls and 3 new ones.*; got {count}"
        ):
            ours(X[:, :3], mask=Mask.padding(torch.ones(4, count, dtype=torch.bool)), cache=cache)
    with pytest.raises(
        ValueError, match=r"lengths must count all columns, 9 of earlier calls included; got \[1, 3, 2, 3\]"
    ):
        ours(X[:, :3], mask=Mask.padding(torch.tensor([1, 3, 2, 3])), cache=cache)
    assert cache.lengths.tolist() == list(LENGTHS)


@each_cache
@torch.no_grad()
def test_masks_and_biases_that_do_not_cover_all_columns_are_refused(mask: Mask, make: Callable[[], Any]) -> None:
    for is_padded in (True, False):
        ours, cache = layer(mask), make()
        _, keep = padded("right")
        ours(X[:, :9], mask=Mask.padding(keep) if is_padded else None, cache=cache)
        cache.crop(cache.lengths)  # removes nothing, so columns are as before
        for count in (9, 11, 12):
            ids, allow = torch.zeros(4, count, dtype=torch.int64), torch.ones(4, 1, 1, count, dtype=torch.bool)
            for wrong in (
                {"mask": Mask.documents(ids)},
                {"mask": Mask.dense(allow)},
                {"bias": torch.zeros(1, 1, 1, count)},
            ):
                with pytest.raises(ValueError, match=rf"got shape .*{count}"):
                    ours(X[:, 9:10], cache=cache, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"got shape \(3, 1, 1, 10\)"):
            ours(X[:, 9:10], cache=cache, bias=torch.zeros(3, 1, 1, 10))
        right = {"mask": Mask.documents(torch.zeros(4, 10, dtype=torch.int64)), "bias": torch.zeros(10)}
        ours(X[:, 9:10], cache=cache, **right)  # type: ignore[arg-type]


@torch.no_grad()
def test_padding_of_a_context_has_all_columns() -> None:
    ours, cache = qkv.CrossAttention(E, 4), qkv.CrossKVCache()
    ours(X[:, :1], X[:, :5], mask=Mask.padding(torch.tensor([5, 2, 3, 4])), cache=cache)
    for wrong in ({"bias": torch.zeros(1, 1, 1, 9)}, {"mask": Mask.dense(torch.ones(1, 9, dtype=torch.bool))}):
        with pytest.raises(ValueError, match="9"):
            ours(X[:, :1], cache=cache, **wrong)  # type: ignore[arg-type]


@each_cache
def test_the_gradient_mode_may_change_between_calls(mask: Mask, make: Callable[[], Any]) -> None:
    ours, cache = layer(mask), make()
    alone, (x, keep) = Alone(ours, make), padded("left")
    with torch.inference_mode():
        ours(x, mask=Mask.padding(keep), cache=cache)
        for b, length in enumerate(LENGTHS):
            alone(b, X[b, :length])
        ours(alone.next(1), cache=cache)
        alone.step(alone.next(1))
    new = alone.next(2)
    if cache.keys().k_scale is not None:  # int8, which has no gradients
        with torch.no_grad():
            assert_same(ours(new, cache=cache), alone.step(new))
        return
    out = ours(new.requires_grad_(), cache=cache)
    out.sum().backward()
    assert_same(out.detach(), alone.step(new).detach())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_cache_filled_by_compiled_code_goes_on_without() -> None:
    torch.compiler.reset()
    for ours, make in ((layer(), lambda: qkv.KVCache(8)), (layer(Mask.causal(4)), lambda: qkv.SlidingKVCache(4))):
        cache, twin = make(), make()
        keep = torch.tensor([[False, False, True, True]] * 4)
        compiled = torch.compile(ours, backend="aot_eager")
        compiled(X[:, :4], mask=Mask.padding(keep), cache=cache)
        ours(X[:, :4], mask=Mask.padding(keep), cache=twin)
        assert cache.length == twin.length == 2
        again = make()
        again.load_state_dict(cache.state_dict())
        for one in (cache, again):
            torch.testing.assert_close(ours(X[:, 4:10], cache=one), ours(X[:, 4:10], cache=copy(twin)))
            assert one.length == 8


@torch.no_grad()
def test_a_layer_reads_the_keys_of_a_padded_chunk_over_a_full_window() -> None:
    first, cache = layer(Mask.causal(4)), qkv.SlidingKVCache(4)
    second = qkv.CrossLayerAttention(E, 4, num_kv_heads=2, mask=Mask.causal(4)).eval()
    for part in X[:, :8].split(4, dim=1):
        second(first(part, cache=cache), cache=cache)
    x = X[:, 8:11]
    mask = Mask.padding(torch.tensor([[False, False, True]] * 4))
    found = second(first(x, mask=mask, cache=cache), mask=mask, cache=cache)
    plain = qkv.KVCache()
    whole = torch.cat([X[:, :8], X[:, 10:11]], dim=1)
    want = second(first(whole, cache=plain), cache=plain)
    torch.testing.assert_close(found[:, 2], want[:, -1], rtol=1e-4, atol=1e-5)


def test_a_layer_on_meta_with_a_cache() -> None:
    ours, cache = qkv.CausalAttention(E, 4, device="meta"), qkv.KVCache()
    assert ours(X.to("meta"), cache=cache).is_meta
    assert cache.length == 24


@torch.no_grad()
def test_a_compiled_layer_with_unequal_rows() -> None:
    torch.compiler.reset()
    ours, cache = layer(), qkv.KVCache()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    alone, (x, keep) = Alone(ours, qkv.KVCache), padded("left")
    out = compiled(x, mask=Mask.padding(keep), cache=cache)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(out[b][keep[b]], alone(b, X[b, :length]), rtol=1e-5, atol=1e-6)
    for _ in range(2):  # the second without compiling again
        found, want = compiled(alone.next(1), cache=cache), alone.step(alone.next(1))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
