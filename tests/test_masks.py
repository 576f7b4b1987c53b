"""`Mask`: the algebra of masks, against the rule evaluated for each pair."""

import copy
import html
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from oracle import Rule
from torch import Tensor

from qkv import Mask, masks
from qkv.masks import FIELDS

LQ, LK = 7, 11
KEEP = torch.arange(7) < torch.tensor([[5], [7]])

bounds = st.none() | st.integers(0, 12)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Mask, Rule]:
    """A mask without tensors, and its rule."""
    kind = draw(st.sampled_from(["band", "dilated", "prefix", "after", "before"]))
    left, right, sinks = draw(bounds), draw(bounds), draw(st.integers(0, 4))
    if kind == "band":
        mask, rule = Mask.band(left, right, sinks), Rule(left=left, right=right, sink_tokens=sinks)
    elif kind == "dilated":
        step = draw(st.integers(2, 4))
        mask = Mask.band(left, right, sinks, step)
        rule = Rule(left=left, right=right, sink_tokens=sinks, step=step)
    elif kind == "prefix":
        length = draw(st.integers(0, 12))
        mask, rule = Mask.prefix(length) & Mask.band(left, None), Rule(left=left, right=0, prefix=[length, length])
    else:
        bound = draw(st.integers(0, 12))
        mask, rule = ~Mask.band(None, bound), Rule(left=-bound - 1)
        if kind == "before":
            mask, rule = ~Mask.band(bound, None), Rule(right=-bound - 1)
    if not mask.sink_tokens and draw(st.booleans()):
        size, start = draw(st.integers(1, 6)), draw(st.integers(-5, 5))
        mask, rule.chunk_ends = mask & Mask.chunked(size, start), list(range(start - 60, 60, size))
    return mask, rule


@st.composite
def rules(draw: st.DrawFn) -> tuple[Mask, Rule]:
    mask, rule = draw(windows())
    if rule.right is None and draw(st.booleans()):
        rule.right, rule.prefix = 0, [draw(st.integers(0, 12)) for _ in range(2)]
        mask = mask & Mask.prefix(torch.tensor(rule.prefix))
    if draw(st.booleans()):
        rule.is_global = torch.tensor([[draw(st.integers(0, 3)) == 0 for _ in range(LK)] for _ in range(2)])
        mask = mask | Mask.global_tokens(rule.is_global)
    if draw(st.booleans()):
        rule.keep = torch.tensor([[draw(st.booleans()) for _ in range(LK)] for _ in range(2)])
        mask = mask & Mask.padding(rule.keep)
    if draw(st.booleans()):
        rule.documents = torch.tensor([[draw(st.integers(0, 2)) for _ in range(LK)] for _ in range(2)])
        mask = Mask.documents(rule.documents) & mask
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


@pytest.mark.parametrize("left", [None, 0, 1, 4])
@pytest.mark.parametrize("right", [None, 0, 2])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_bands_at_every_offset_are_the_rule_and_within_their_range(
    left: int | None, right: int | None, sinks: int
) -> None:
    mask, rule = Mask.band(left, right, sinks), Rule(left=left, right=right, sink_tokens=sinks)
    for offset in range(LK - 1):
        assert_rule(mask, rule, offset)


@pytest.mark.parametrize("left", [None, 0, 3])
@pytest.mark.parametrize("length", [0, 1, 4, LK])
def test_prefixes_at_every_offset_are_the_rule_and_within_their_range(left: int | None, length: int) -> None:
    mask = Mask.prefix(length) & Mask.band(left, None)
    for offset in range(LK - 1):
        assert_rule(mask, Rule(left=left, right=0, prefix=[length]), offset)


def assert_rule(mask: Mask, rule: Rule, offset: int) -> None:
    """Of two queries at an offset: a mask shows what a rule does, and no key outside of its range."""
    want = torch.stack([rule.sees(0, 0, i, LK, offset) for i in range(2)])
    assert torch.equal(mask.visible(2, LK, offset)[0, 0], want)
    start, stop = mask.key_range(2, LK, offset)
    assert not want[:, :start].any() and not want[:, stop:].any()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(rules(), rules(), st.integers(0, LK - LQ))
def test_and_is_the_intersection_of_what_is_visible(
    first: tuple[Mask, Rule], second: tuple[Mask, Rule], offset: int
) -> None:
    (a, _), (b, _) = first, second
    want = a.visible(LQ, LK, offset) & b.visible(LQ, LK, offset)
    assert torch.equal(shown(lambda: a & b, offset), want.expand(2, 3, LQ, LK))


def shown(make: Callable[[], Mask], offset: int) -> Tensor:
    """What a combination shows; draws are rejected if it is not a mask."""
    try:
        mask = make()
    except ValueError:
        reject()
    return mask.visible(LQ, LK, offset).expand(2, 3, LQ, LK)


@st.composite
def related(draw: st.DrawFn) -> tuple[Mask, Mask, Mask]:
    """Masks of parts of which some are the same."""
    keep = torch.rand(2, LK, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) < 0.6
    is_global = torch.rand(2, LK, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) < 0.2
    parts = [
        *(Mask.full(), ~Mask.full(), Mask.causal(), ~Mask.causal(), Mask.band(3, None), ~Mask.band(2, None)),
        *(Mask.causal(3), Mask.sliding(4), Mask.causal(2, dilation=2), Mask.causal(3, sink_tokens=1)),
        *(Mask.chunked(2), Mask.chunked(4), Mask.prefix(3), Mask.prefix(torch.tensor([4, 2]))),
        *(Mask.padding(keep), ~Mask.padding(keep), Mask.padding(torch.tensor([9, 5])), Mask.global_tokens(is_global)),
        Mask.sliding(2) | Mask.global_tokens(is_global),
        Mask.documents(torch.arange(LK)[None] // 3),
        Mask.dense(keep[:, None, None]),
    ]
    one, two, three = (draw(st.sampled_from(parts)) for _ in range(3))
    return one, two, three


LAWS: dict[str, tuple[Callable[[Mask, Mask, Mask], Mask], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "and": (lambda a, b, c: a & b, lambda a, b, c: a & b),
    "or": (lambda a, b, c: a | b, lambda a, b, c: a | b),
    "not": (lambda a, b, c: ~a, lambda a, b, c: ~a),
    "double negation": (lambda a, b, c: ~~a, lambda a, b, c: a),
    "De Morgan": (lambda a, b, c: ~(a & b), lambda a, b, c: ~a | ~b),
    "De Morgan, parts inverted": (lambda a, b, c: ~a | ~b, lambda a, b, c: ~(a & b)),
    "De Morgan of a union": (lambda a, b, c: ~(a | b), lambda a, b, c: ~a & ~b),
    "De Morgan of a union, parts inverted": (lambda a, b, c: ~a & ~b, lambda a, b, c: ~(a | b)),
    "absorption by or": (lambda a, b, c: a | (a & b), lambda a, b, c: a),
    "absorption by and": (lambda a, b, c: a & (a | b), lambda a, b, c: a),
    "distributivity": (lambda a, b, c: a & (b | c), lambda a, b, c: (a & b) | (a & c)),
    "distributivity, multiplied out": (lambda a, b, c: (a & b) | (a & c), lambda a, b, c: a & (b | c)),
    "distributivity of or": (lambda a, b, c: a | (b & c), lambda a, b, c: (a | b) & (a | c)),
    "distributivity of or, multiplied out": (lambda a, b, c: (a | b) & (a | c), lambda a, b, c: a | (b & c)),
    "associativity": (lambda a, b, c: (a & b) & c, lambda a, b, c: a & (b & c)),
    "associativity of or": (lambda a, b, c: (a | b) | c, lambda a, b, c: a | (b | c)),
    "excluded middle": (lambda a, b, c: a | ~a, lambda a, b, c: a | ~a),
    "contradiction": (lambda a, b, c: a & ~a, lambda a, b, c: a & ~a),
}


@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(related(), st.integers(0, LK - LQ))
def test_laws_of_boolean_algebra_hold_where_the_result_is_a_mask(
    law: str, masks: tuple[Mask, Mask, Mask], offset: int
) -> None:
    of_masks, of_pairs = LAWS[law]
    want = of_pairs(*(mask.visible(LQ, LK, offset).expand(2, 3, LQ, LK) for mask in masks))
    assert torch.equal(shown(lambda: of_masks(*masks), offset), want)


@settings(max_examples=60, deadline=None)
@given(windows(), windows(), st.integers(-9, LK))
def test_masks_without_tensors_print_as_python_for_themselves(
    first: tuple[Mask, Rule], second: tuple[Mask, Rule], offset: int
) -> None:
    for make in (lambda: first[0], lambda: first[0] & second[0], lambda: first[0] | second[0]):
        seen = shown(make, offset)
        again = eval(repr(make()))
        assert again == make() and hash(again) == hash(make()) and repr(again) == repr(make())
        assert torch.equal(again.visible(LQ, LK, offset).expand_as(seen), seen)


BEFORE = Mask.causal(7) & ~Mask.band(2, None)
"""the keys 6 to 3 positions before the query"""

COMBINED: list[tuple[Callable[[], Mask], str]] = [
    (lambda: Mask.causal(3) | Mask.sliding(4), "Mask.sliding(window=4)"),
    (lambda: Mask.causal(3) | Mask.band(1, 2), "Mask.sliding(window=4)"),
    (lambda: Mask.causal() | ~Mask.causal(), "Mask.full()"),
    (lambda: BEFORE | Mask.sliding(4), "Mask.band(left=6, right=2)"),
    (lambda: Mask.causal() & ~Mask.causal(), "~Mask.full()"),
    (lambda: ~~Mask.causal(), "Mask.causal()"),
    (lambda: ~Mask.causal() & Mask.band(5, 3), "Mask.band(left=None, right=3) & ~Mask.causal()"),
    (lambda: Mask.causal(3, sink_tokens=4) | Mask.causal(6), "Mask.causal(window=6, sink_tokens=4)"),
    (lambda: Mask.causal(4, dilation=2) & Mask.causal(9, dilation=3), "Mask.causal(window=2, dilation=6)"),
    (lambda: Mask.causal(4, dilation=2) | Mask.causal(7), "Mask.causal(window=7)"),
    (
        lambda: Mask.band(5, 1, dilation=2),
        "Mask.causal(window=3, dilation=2)",
    ),
    (lambda: Mask.sliding(4, dilation=3), "Mask.sliding(window=4, dilation=3)"),
    (lambda: Mask.causal() & Mask.chunked(8) & Mask.chunked(4), "Mask.causal() & Mask.chunked(4)"),
    (lambda: Mask.chunked(4, start=9) | Mask.chunked(8, start=5), "Mask.chunked(8, start=5)"),
    (lambda: Mask.prefix(3) & Mask.causal(), "Mask.causal()"),
    (lambda: Mask.prefix(3) | Mask.prefix(5), "Mask.prefix(5)"),
    (lambda: Mask.prefix(3) & Mask.band(4, None), "Mask.prefix(3) & Mask.band(left=4, right=None)"),
    (lambda: Mask.prefix(3) & Mask.prefix(torch.tensor([2, 5])), "Mask.prefix(<int64 (2,)>)"),
    (lambda: ~Mask.padding(KEEP), "Mask.padding(<bool (2, 7)>)"),
    (
        lambda: Mask.padding(KEEP) & Mask.causal() | Mask.padding(KEEP) & Mask.sliding(2),
        "Mask.band(left=None, right=1) & Mask.padding(<bool (2, 7)>)",
    ),
    (lambda: Mask.padding(KEEP) | ~Mask.padding(KEEP), "Mask.padding(<bool (2, 7)>)"),
    (lambda: Mask.full() | Mask.global_tokens(KEEP), "Mask.full()"),
    (
        lambda: Mask.causal() & Mask.chunked(4) | Mask.global_tokens(KEEP),
        "Mask.causal() & Mask.chunked(4) | Mask.global_tokens(<bool (2, 7)>)",
    ),
    (
        lambda: (Mask.sliding(4) | Mask.global_tokens(KEEP)) & Mask.padding(KEEP),
        "(Mask.sliding(window=4) | Mask.global_tokens(<bool (2, 7)>)) & Mask.padding(<bool (2, 7)>)",
    ),
    (
        lambda: Mask.global_tokens(KEEP) & Mask.padding(KEEP),
        "Mask.global_tokens(<bool (2, 7)>) & Mask.padding(<bool (2, 7)>)",
    ),
    (
        lambda: Mask.causal() & Mask.padding(KEEP) & Mask.padding(torch.tensor([3, 4])),
        "Mask.causal() & Mask.padding(<bool (2, 7)>) & Mask.padding(<int64 (2,)>)",
    ),
]


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


def test_keys_of_a_prefix_are_kept_though_no_query_reaches_them_otherwise() -> None:
    assert Mask.prefix(6).key_range(2, 9, 0) == (0, 6)
    assert (Mask.prefix(6) & Mask.chunked(3)).key_range(2, 9, 0) == (0, 3)


@pytest.mark.parametrize(("make", "text"), COMBINED, ids=[text for _, text in COMBINED])
def test_masks_print_as_what_builds_them(make: Callable[[], Mask], text: str) -> None:
    assert repr(make()) == text


def test_shorthands_equal_bands() -> None:
    assert Mask.causal() == Mask.band(None, 0)
    assert Mask.causal(window=4) == Mask.band(3, 0)
    assert Mask.sliding(window=4) == Mask.band(2, 2)
    assert Mask.causal(window=4, dilation=3) == Mask.band(9, 0, dilation=3) == Mask.band(11, 2, dilation=3)


def test_integers_of_an_attention_mask_are_padding() -> None:
    keep = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for mask in (Mask.padding(keep), Mask.padding(keep.to(torch.uint8))):
        assert torch.equal(mask.keep, keep.bool())
        mask.keep.zero_()
    assert keep.sum() == 4
    assert torch.equal(Mask.global_tokens(keep).is_global, keep.bool())
    assert Mask.padding(keep.to("meta")).keep.dtype == torch.bool  # numbers that cannot be read are not checked


def test_every_field_is_part_of_identity_copies_and_selections() -> None:
    flags = torch.rand(2, 9) < 0.5
    mask = (
        Mask.prefix(torch.tensor([3, 4])) & Mask.chunked(5, 2) & Mask.band(6, None, dilation=2)
    ) | Mask.global_tokens(flags)
    mask = (
        mask
        & Mask.padding(flags)
        & Mask.padding(torch.tensor([8, 9]))
        & Mask.documents(flags.int())
        & Mask.dense(flags[:, None, None])
    )
    other = Mask.causal(3, sink_tokens=2)
    both = [*zip(FIELDS, mask.values(), strict=True), *zip(FIELDS, other.values(), strict=True), ("prefix_tokens", 2)]
    used = {name for name, value in both if value is not getattr(Mask.full(), name)}
    assert used == set(FIELDS)
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert repr(again) == repr(mask)
        assert torch.equal(again.visible(9, 9), mask.visible(9, 9))
    assert all(tensor.device.type == "meta" for _, tensor in mask.to("meta").tensors())
    assert Mask(*mask.values()) == mask and len(set(map(repr, (mask, other)))) == 2
    assert len({Mask.chunked(4), Mask.chunked(4, 1), Mask.prefix(1), Mask.prefix(2), Mask.causal(dilation=2)}) == 5


@settings(max_examples=60, deadline=None)
@given(rules(), st.integers(0, 3), st.integers(0, 4))
def test_selected_keys_are_seen_as_before(stated: tuple[Mask, Rule], sinks: int, start: int) -> None:
    """Those behind sinks. Sinks themselves move closer to the queries."""
    mask, offset = stated[0], LK - LQ
    if mask.sink_tokens > sinks or start < sinks:
        reject()
    want = mask.visible(LQ, LK, offset).expand(2, 3, LQ, LK)[..., start:]
    selected = mask.select_keys(start, LK, sinks).visible(LQ, sinks + LK - start, offset - start + sinks)
    assert torch.equal(selected.expand(2, 3, LQ, -1)[..., sinks:], want)


def test_drawings_are_what_is_visible() -> None:
    assert Mask.causal(window=2).draw(3) == "#..\n##.\n.##"
    assert Mask.causal().draw(2, 4, offset=2) == "###.\n####"
    assert Mask.full().draw(1, 4) == "####"
    assert Mask.global_tokens(torch.tensor([[True, False, False]])).draw(3) == "###\n#..\n#.."
    assert Mask.padding(torch.tensor([1, 2])).draw(1, 2) == "row 0:\n#.\nrow 1:\n##"
    allow = torch.tensor([[[True, False]], [[False, True]]])
    assert Mask.dense(allow).draw(1, 2) == "head 0:\n#.\nhead 1:\n.#"
    both = Mask.dense(allow) & Mask.padding(torch.tensor([[True, True], [True, False]]))
    assert both.draw(1, 2) == "row 0, head 0:\n#.\nrow 0, head 1:\n.#\nrow 1, head 0:\n#.\nrow 1, head 1:\n.."


@pytest.mark.parametrize(("lq", "lk"), [(72, 72), (73, 73), (145, 300), (1, 1000)])
def test_large_drawings_are_cells_of_at_most_80_columns(lq: int, lk: int) -> None:
    mask = Mask.sliding(20)
    head, *lines = mask.draw(lq, lk, offset=0).split("\n")
    size = -(-max(lq, lk) // 72)
    if size == 1:
        lines = [head, *lines]
    else:
        assert head == f"each character is {size} x {size} pairs, + where some are visible"
    assert max(map(len, lines)) <= 72 and len(lines) == -(-lq // size)
    pairs = mask.visible(lq, lk)[0, 0]
    for i, line in enumerate(lines):
        for j, character in enumerate(line):
            cell = pairs[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert character == ("#" if cell.all() else "+" if cell.any() else ".")


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
        (
            lambda: Mask.padding(torch.tensor([[1, 2, 0]])),
            ValueError,
            r"Mask.padding: keep must be boolean, or integers 0 and 1; got integers from 0 to 2\. For documents .*ids",
        ),
        (lambda: Mask.padding(torch.ones(2, 3, 4, dtype=torch.int64)), ValueError, r"got torch.int64 of .*\(2, 3, 4\)"),
        (lambda: Mask.causal(2, dilation=0), ValueError, r"Mask.causal: dilation must be at least 1; got 0"),
        (lambda: Mask.sliding(2, dilation=1.5), TypeError, r"Mask.sliding: dilation must be an int; got 1.5"),
        (lambda: Mask.band(2, 0, dilation=-1), ValueError, r"Mask.band: dilation must be at least 1; got -1"),
        (lambda: Mask.chunked(0), ValueError, r"Mask.chunked: size must be at least 1 \(it is a number of .*got 0"),
        (lambda: Mask.chunked(4, start=None), TypeError, r"Mask.chunked: start must be an int; got None"),
        (lambda: Mask.prefix(-1), ValueError, r"Mask.prefix: lengths must be at least 0, or a tensor \(B,\); got -1"),
        (lambda: Mask.prefix(2.0), TypeError, r"Mask.prefix: lengths must be an int, or a tensor \(B,\); got 2.0"),
        (
            lambda: Mask.prefix(torch.ones(2)),
            ValueError,
            r"integers of shape \(B,\).*got torch.float32 of shape \(2,\)",
        ),
        (lambda: Mask.global_tokens([True]), TypeError, r"Mask.global_tokens: is_global must be a tensor; got list"),
        (lambda: Mask.global_tokens(torch.ones(3)), ValueError, r"boolean \(B, L\).*got torch.float32 of shape \(3,\)"),
        (lambda: Mask.global_tokens(torch.tensor([[3]])), ValueError, r"is_global must be .*got integers from 3 to 3"),
        (lambda: Mask.causal() | 3, TypeError, r"Mask.causal\(\) \| int: both must be a qkv.Mask"),
        (lambda: Mask.causal(2) | Mask.causal(3, dilation=2), ValueError, r"not a mask of these kinds"),
        (lambda: BEFORE | Mask.sliding(2), ValueError, r"not a mask of these kinds"),  # a gap of one key
        (lambda: Mask.sliding(2) | BEFORE, ValueError, r"not a mask of these kinds"),
        (
            lambda: Mask.sliding(2) | Mask.padding(KEEP),
            ValueError,
            r"Mask.sliding\(window=2\) \| Mask.padding\(<bool \(2, 7\)>\): their union is not a mask of these kinds\. "
            r"Combine dense masks: Mask.dense\(a.visible\(lq, lk\) \| b.visible\(lq, lk\)\)",
        ),
        (
            lambda: ~Mask.causal(3),
            ValueError,
            r"~\(Mask.causal\(window=3\)\): what it hides is not a mask .*Mask.dense\(~mask.visible\(lq, lk\)\)",
        ),
        (lambda: ~Mask.documents(torch.ones(1, 3, dtype=torch.int64)), ValueError, r"what it hides is not a mask"),
        (lambda: ~Mask.padding(torch.tensor([3])), ValueError, r"what it hides is not a mask"),
        (
            lambda: Mask.global_tokens(KEEP).gather_keys(torch.zeros(2, 3, dtype=torch.long), 7, (0, 7)),
            ValueError,
            r"Mask.global_tokens\(.*\) with rows of different lengths: padding has no keys, .* Pass rows of one length",
        ),
        (
            lambda: (Mask.sliding(2) | Mask.global_tokens(KEEP)) & Mask.causal(),
            ValueError,
            r"global tokens see all keys, .*\(a & b\) \| Mask.global_tokens\(...\), or dense masks",
        ),
        (
            lambda: Mask.chunked(4) & Mask.chunked(6),
            ValueError,
            r"Mask.chunked\(4\) & Mask.chunked\(6\): the larger chunks do not end .*Mask.documents\(positions // 4\)",
        ),
        (
            lambda: Mask.causal(4, sink_tokens=1) & Mask.chunked(8),
            ValueError,
            r"chunks hide sink tokens from later chunks.*Mask.documents\(positions // 8\)",
        ),
        (lambda: Mask.prefix(3) & Mask.sliding(4), ValueError, r"a prefix of which only keys up to the query \+ 2 are"),
        (lambda: Mask.causal().draw(0), ValueError, r"Mask.draw: lq must be at least 1; got 0"),
        (
            lambda: Mask.causal().draw(2, 3),
            ValueError,
            r"so 2 queries with 3 keys need an offset; got None\. offset=1 al",
        ),
        (lambda: Mask.padding(KEEP).draw(8), ValueError, r"Mask.draw: mask's padding keep must fit \(2, 8\)"),
        (lambda: Mask.documents(torch.ones(3)), ValueError, r"integers of shape \(B, L\); got torch.float32"),
        (lambda: Mask.dense(torch.ones(3, 3)), ValueError, r"got torch.float32 of shape \(3, 3\).*bias="),
        (lambda: Mask.dense(torch.ones(3, dtype=torch.bool)), ValueError, r"got torch.bool of shape \(3,\)"),
        (lambda: bool(Mask.causal()), TypeError, r"Mask.causal\(\) has no truth value.*`&` and `\|`"),
        (lambda: Mask.causal() and Mask.sliding(2), TypeError, r"combine masks with `&` and `\|`, not with `and`"),
        (
            lambda: Mask.causal(3, sink_tokens=4) & Mask.causal(6, sink_tokens=1),
            ValueError,
            r"window with 1 sink tokens is not within the one with 4; .*not a band\. Give both the same sink_tokens",
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


def pictures(text: str) -> list[tuple[tuple[int, int], dict[str, Tensor]]]:
    """The size of each picture of a mask, and the cells that it fills, by opacity."""
    found = []
    for wide, high, parts in re.findall(r'<svg [^>]*viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', text):
        filled = {"1": torch.zeros(int(high), int(wide)), "0.5": torch.zeros(int(high), int(wide))}
        for opacity, path in re.findall(r'<path fill="#0072b2" fill-opacity="([\d.]+)" d="(.*?)"/>', parts):
            for left, row, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
                assert width == back
                filled[opacity][int(row), int(left) : int(left) + int(width)] += 1
        found.append(((int(high), int(wide)), filled))
    return found


@pytest.mark.parametrize(
    ("mask", "lq", "lk"),
    [
        (Mask.causal(), 16, 16),
        (Mask.full(), 16, 16),
        (Mask.causal(window=31, sink_tokens=2), 45, 45),
        (Mask.padding((torch.arange(23) > 4)[None]), 23, 23),
        (Mask.causal() & Mask.documents(torch.tensor([[0, 0, 1, 1, 1, 2]])), 6, 6),
        (Mask.padding(torch.tensor([40])), 60, 60),
        (Mask.dense(torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5), 5, 7),
    ],
    ids=str,
)
def test_a_notebook_shows_what_a_mask_shows(mask: Mask, lq: int, lk: int) -> None:
    seen = mask.visible(lq, lk).flatten(0, 1)
    found = pictures(mask._repr_html_())
    assert [size for size, _ in found] == [(lq, lk)] * len(seen)
    for (_, filled), one in zip(found, seen, strict=True):
        assert torch.equal(filled["1"], one.float()) and not filled["0.5"].any()
    assert f"{lq} queries (down) and {lk} keys (across), those visible in blue<" in mask._repr_html_()


def test_a_notebook_shows_long_masks_in_cells() -> None:
    mask = Mask.causal(window=200)
    text = mask._repr_html_()
    assert "298 queries" in text and "a cell is 5 by 5 pairs, pale where some are visible" in text
    (((high, wide), filled),) = pictures(text)
    seen = torch.nn.functional.pad(mask.visible(298, 298)[0, 0].float(), (0, 2, 0, 2), value=torch.nan)
    cells = seen.unflatten(1, (-1, 5)).unflatten(0, (-1, 5)).movedim(1, 2).flatten(2)
    share = cells.nanmean(2)
    assert (high, wide) == (60, 60)
    assert torch.equal(filled["1"] == 1, share == 1) and torch.equal(filled["0.5"] == 1, (share > 0) & (share < 1))
    assert "8,192 queries" in Mask.causal(window=10**6)._repr_html_()


def test_a_notebook_shows_the_first_heads_and_escapes_what_stands_in_a_title() -> None:
    found = Mask.dense(torch.ones(2, 5, 3, 3, dtype=torch.bool))._repr_html_()
    assert len(pictures(found)) == 4 and "; 6 more of the batch and of heads<" in found
    text = masks.html_of(Mask.causal(), '<b>&"</b>')
    assert text.startswith("<figure><pre>&lt;b&gt;&amp;&quot;&lt;/b&gt;</pre>") and "<b>" not in text
    assert "script" not in text and "http" not in text


@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal() & Mask.dense(torch.ones(1, 1, 2, 7, dtype=torch.bool)),  # of an offset that is not known
        Mask.dense(torch.ones(1, 1, 5, 5, dtype=torch.bool, device="meta")),
        Mask.dense(torch.ones(1, 1, 0, 5, dtype=torch.bool)),
    ],
    ids=str,
)
def test_a_mask_that_cannot_be_pictured_is_written(mask: Mask) -> None:
    assert mask._repr_html_() == f"<pre>{html.escape(repr(mask))}</pre>"
