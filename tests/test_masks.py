"""`Mask`: the algebra of masks, against the rule evaluated for each pair."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Rule

from qkv import Mask

LQ, LK = 7, 11

bounds = st.none() | st.integers(0, 12)


@st.composite
def rules(draw: st.DrawFn) -> tuple[Mask, Rule]:
    left, right, sinks = draw(bounds), draw(bounds), draw(st.integers(0, 4))
    mask, rule = Mask.band(left, right, sinks), Rule(left=left, right=right, sink_tokens=sinks)
    if draw(st.booleans()):
        rule.keep = [[draw(st.booleans()) for _ in range(LK)] for _ in range(2)]
        mask = mask & Mask.padding(torch.tensor(rule.keep))
    if draw(st.booleans()):
        rule.documents = [[draw(st.integers(0, 2)) for _ in range(LK)] for _ in range(2)]
        mask = Mask.documents(torch.tensor(rule.documents)) & mask
    if draw(st.booleans()):
        rule.allow = torch.rand(2, 3, LQ, LK, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.5
        mask = mask & Mask.dense(rule.allow)
    return mask, rule


def written(rule: Rule, offset: int) -> torch.Tensor:
    rows = [rule.sees(b, h, i, LK, offset) for b in range(2) for h in range(3) for i in range(LQ)]
    return torch.stack(rows).view(2, 3, LQ, LK)


@settings(max_examples=60, deadline=None)
@given(rules(), st.integers(0, LK - LQ))
def test_visible_is_the_rule(stated: tuple[Mask, Rule], offset: int) -> None:
    mask, rule = stated
    assert torch.equal(mask.visible(LQ, LK, offset).expand(2, 3, LQ, LK), written(rule, offset))


@settings(max_examples=60, deadline=None)
@given(rules(), rules(), st.integers(0, LK - LQ))
def test_and_is_the_intersection_of_what_is_visible(
    first: tuple[Mask, Rule], second: tuple[Mask, Rule], offset: int
) -> None:
    (a, _), (b, _) = first, second
    if a.left is not None and b.left is not None and a.left != b.left:
        narrow, wide = (a, b) if a.left < b.left else (b, a)
        assume(narrow.sink_tokens <= wide.sink_tokens)
    both = a & b
    want = first[0].visible(LQ, LK, offset) & second[0].visible(LQ, LK, offset)
    assert torch.equal(*torch.broadcast_tensors(both.visible(LQ, LK, offset), want))


@settings(max_examples=60, deadline=None)
@given(rules(), st.integers(0, LK - LQ))
def test_simplifying_and_trimming_change_no_visible_pair(stated: tuple[Mask, Rule], offset: int) -> None:
    mask, _ = stated
    want = mask.visible(LQ, LK, offset).expand(2, 3, LQ, LK)
    assert torch.equal(mask.simplified(LQ, LK, offset).visible(LQ, LK, offset).expand_as(want), want)
    start, stop = mask.key_range(LQ, LK, offset)
    assert not want[..., :start].any() and not want[..., stop:].any()
    trimmed = mask.select_keys(start, stop).visible(LQ, stop - start, offset - start)
    assert torch.equal(trimmed.expand(2, 3, LQ, stop - start), want[..., start:stop])


def test_shorthands_equal_bands_and_print_as_bands() -> None:
    assert Mask.causal() == Mask.band(None, 0)
    assert Mask.causal(window=4) == Mask.band(3, 0)
    assert Mask.sliding(window=4) == Mask.band(2, 2)
    assert repr(Mask.full()) == "Mask.full()"
    assert repr(Mask.causal(4, sink_tokens=2)) == "Mask.band(left=3, right=0, sink_tokens=2)"
    for mask in (Mask.full(), Mask.causal(), Mask.causal(4, sink_tokens=2)):
        assert eval(repr(mask)) == mask
    both = Mask.causal() & Mask.padding(torch.ones(2, 7, dtype=torch.bool)) & Mask.padding(torch.tensor([3, 4]))
    assert repr(both) == ("Mask.band(left=None, right=0) & Mask.padding(<bool (2, 7)>) & Mask.padding(<int64 (2,)>)")


def test_masks_compare_and_hash_by_bounds_and_by_tensor_identity() -> None:
    keep = torch.ones(2, 7, dtype=torch.bool)
    assert Mask.padding(keep) == Mask.padding(keep)
    assert Mask.padding(keep) != Mask.padding(keep.clone())
    assert len({Mask.causal(), Mask.causal(), Mask.causal(3), Mask.padding(keep), Mask.padding(keep)}) == 3
    assert Mask.causal() != "causal"


def test_masks_survive_copies_and_pickles() -> None:
    mask = Mask.causal(4, sink_tokens=2) & Mask.padding(torch.tensor([3, 4]))
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert repr(again) == repr(mask)
        assert torch.equal(again.visible(7, 7), mask.visible(7, 7))
    assert mask.to("meta").lengths.device.type == "meta"


def test_masks_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Mask.causal().left = 3  # type: ignore[misc]


def test_documents_of_two_masks_intersect() -> None:
    a, b = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[5, 5, 6, 6, 6]])
    both = Mask.documents(a) & Mask.documents(b)
    want = (a[0][:, None] == a[0]) & (b[0][:, None] == b[0])
    assert torch.equal(both.visible(5, 5)[0, 0], want)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mask.causal(window=0), ValueError, r"Mask.causal: window must be at least 1 .*got 0"),
        (lambda: Mask.causal(window=2.0), TypeError, r"window must be an int .*got 2.0"),
        (lambda: Mask.causal(window=True), TypeError, r"window must be an int .*got True"),
        (lambda: Mask.sliding(window=7), ValueError, r"must be even.*got 7\. Use 8, or .*Mask.causal\(window=7\)"),
        (lambda: Mask.sliding(window=0), ValueError, r"Mask.sliding: window must be at least 1 .*got 0"),
        (lambda: Mask.band(-1, 0), ValueError, r"Mask.band: left must be at least 0 .*got -1"),
        (lambda: Mask.band(0, -2), ValueError, r"Mask.band: right must be at least 0 .*got -2"),
        (lambda: Mask.band(3, 0, -5), ValueError, r"sink_tokens must be at least 0 .*got -5"),
        (lambda: Mask.padding(torch.ones(2, 3)), ValueError, r"boolean \(B, Lk\).*torch.float32 of shape \(2, 3\)"),
        (lambda: Mask.padding(torch.ones(2, 3, dtype=torch.int64)), ValueError, r"got torch.int64 of shape \(2, 3\)"),
        (lambda: Mask.documents(torch.ones(3)), ValueError, r"integers of shape \(B, L\); got torch.float32"),
        (lambda: Mask.dense(torch.ones(3, 3)), ValueError, r"got torch.float32 of shape \(3, 3\).*bias="),
        (lambda: Mask.dense(torch.ones(3, dtype=torch.bool)), ValueError, r"got torch.bool of shape \(3,\)"),
        (lambda: bool(Mask.causal()), TypeError, r"Mask.band\(left=None, right=0\) has no truth value.*`&`"),
        (lambda: Mask.causal() and Mask.sliding(2), TypeError, r"combine masks with `&`, not with `and`"),
        (
            lambda: Mask.causal(3, sink_tokens=4) & Mask.causal(6, sink_tokens=1),
            ValueError,
            r"narrower window has 4 sink tokens, the wider one 1",
        ),
    ],
)
def test_invalid_masks_raise_with_the_reason(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_integers_of_numpy_are_ints() -> None:
    mask = Mask.band(np.int64(3), np.int32(1), np.int64(2))
    assert mask == Mask.band(3, 1, 2)
    assert {type(bound) for bound in (mask.left, mask.right, mask.sink_tokens)} == {int}
