"""`sentences`: what the review says, what was measured of it, and whether that shows it, by fixed rules."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from qkv.models.kv_cache_size import readable_bytes

EXACT = 1e-12
"""The largest error in fp64 of numbers that must be equal, all of about 1."""
CLOSE = 1e-5
"""In fp32."""
LINEAR = 1.2
"""The largest power of the length with which cost may grow and count as linear; the square is 2."""
STEADY = 1.5
"""How many times as large the largest gradient may be as the smallest, over all widths, and count as kept."""


class Sentence(NamedTuple):
    """A sentence of the review, and what became of it."""

    mechanism: str
    says: str
    measured: str
    holds: bool


def sentences(results: dict[str, Any]) -> list[Sentence]:
    """All of them, in the order of the mechanisms."""
    parts = (_scaled_dot_product, _multi_head, _cross, _causal, _sliding_window, _multi_query, _grouped_query)
    return [sentence for part in parts for sentence in part(results)]


def _scaled_dot_product(results: dict[str, Any]) -> list[Sentence]:
    name, r = "scaled dot-product", results["scaled dot-product"]
    narrow, wide = r["saturation"][0], r["saturation"][-1]
    scaled, unscaled = ([row[f"{kind}_gradient"] for row in r["saturation"]] for kind in ("scaled", "unscaled"))
    step = r["one_step"]
    return [
        Sentence(
            name,
            "The weights of a query are not negative and sum to 1.",
            f"sums are off by {r['sum_error']:.0e} at most, the smallest weight is {r['smallest_weight']:.0e}, in fp32",
            r["sum_error"] < CLOSE and r["smallest_weight"] >= 0,
        ),
        Sentence(
            name,
            "The output is the weighted sum of the values, whose width may differ from that of keys.",
            f"keys of {r['key_width']}, values of {r['value_width']}; off by {r['sum_of_values_error']:.0e}, in fp32",
            r["sum_of_values_error"] < CLOSE and r["value_width"] != r["key_width"],
        ),
        Sentence(
            name,
            "Dividing by the root of d_k keeps the softmax from saturating, and its gradients from vanishing.",
            f"from d_k = {narrow['width']} to {wide['width']:,}, the gradient at the scores goes from {scaled[0]:.3f} "
            f"to {scaled[-1]:.3f} with the scale, and from {unscaled[0]:.3f} to {unscaled[-1]:.3f} without, where the "
            f"largest weight becomes {wide['unscaled_largest']:.2f}",
            max(scaled) <= STEADY * min(scaled) and unscaled[-1] < unscaled[0] / 2,
        ),
        Sentence(
            name,
            "Any position reaches any other in one step.",
            f"{step['pairs']:,} of {step['length'] ** 2:,} pairs of positions have a gradient through one layer",
            step["pairs"] == step["length"] ** 2,
        ),
    ]


def _multi_head(results: dict[str, Any]) -> list[Sentence]:
    name, r = "multi-head", results["multi-head"]
    both = max(r["from_torch_error"], r["to_torch_error"])
    return [
        Sentence(
            name,
            "Heads attend in parallel with projections of their own; their outputs are joined and projected once more.",
            f"{r['heads']} heads computed one by one, off by {r['one_by_one_error']:.0e}, in fp64",
            r["one_by_one_error"] < EXACT,
        ),
        Sentence(
            name,
            "It is the multi-head layer of frameworks.",
            f"torch's layer with the same weights, in both directions: off by {both:.0e}, in fp64",
            both < EXACT,
        ),
    ]


def _cross(results: dict[str, Any]) -> list[Sentence]:
    name, r = "cross", results["cross"]
    return [
        Sentence(
            name,
            "Queries come from one sequence, keys and values from another, of another length.",
            f"{r['queries']} queries of width {r['width']} on {r['keys']} keys of width {r['context_width']}",
            r["queries"] != r["keys"],
        ),
        Sentence(
            name,
            "Each output is a weighted sum of the second sequence's values.",
            f"off by {r['sum_of_values_error']:.0e}, weights sum to 1 up to {r['sum_error']:.0e}, in fp64",
            r["sum_of_values_error"] < EXACT and r["sum_error"] < EXACT,
        ),
        Sentence(
            name,
            "The encoder's output is projected once, and reused at every step of the decoder.",
            f"projections in {r['steps']} steps: {r['projections']}; off by {r['steps_error']:.0e} from one call",
            r["projections"] == 1 and r["steps"] > 1 and r["steps_error"] < EXACT,
        ),
    ]


def _causal(results: dict[str, Any]) -> list[Sentence]:
    name, r = "causal", results["causal"]
    worst = max(r["chunk_errors"].values())
    return [
        Sentence(
            name,
            "No position attends to later ones.",
            f"of {r['later_pairs']:,} gradients by a later input, {r['later_gradients']} are not exactly 0; of "
            f"{r['earlier_pairs']:,} others, {r['earlier_gradients']:,}",
            r["later_gradients"] == 0 and r["earlier_gradients"] == r["earlier_pairs"],
        ),
        Sentence(
            name,
            "Tokens are generated one by one over cached keys and values, with the outputs of the full pass.",
            f"{', '.join(r['chunk_errors'])}: off by {worst:.0e} at most, of outputs up to {r['largest']:.2f}, in fp32",
            worst < CLOSE * r["largest"],
        ),
    ]


def _sliding_window(results: dict[str, Any]) -> list[Sentence]:
    name, r, s = "sliding-window", results["sliding-window"], results["settings"]
    sides, behind, window = r["visible"]["both sides"], r["visible"]["causal"], s["window"]
    cost, cache = r["cost"], r["cache"]
    powers = {
        f"{kind} {passes}": power(cost["lengths"], [each["median_us"] for each in cost["time_us"][f"{kind} {passes}"]])
        for kind in ("window", "causal")
        for passes in ("forward", "both")
    }
    memory = cost["peak_bytes"]["window"]
    known = all(each is not None for each in memory)
    growth = power(cost["lengths"], memory) if known else math.nan
    expected = [each["expected"] for each in r["reach"].values()]
    found = [each["gradients"] for each in r["reach"].values()]
    outside = sum(sum(each["bits_outside"]) for each in r["reach"].values())
    last = {kind: each["gradients"][-1] for kind, each in r["reach"].items()}
    return [
        Sentence(
            name,
            "A token sees half a window on each side (Longformer), or the window that ends with it (Mistral).",
            f"w = {window}: {max(sides)} before and {-min(sides)} after its own; or {max(behind)} before and "
            f"{-min(behind)} after",
            (max(sides), -min(sides)) == (window // 2, window // 2) and (max(behind), min(behind)) == (window - 1, 0),
        ),
        Sentence(
            name,
            "Time is linear in the length.",
            f"from {cost['lengths'][0]:,} to {cost['lengths'][-1]:,} tokens, w = {s['long_window']}, it grows as the "
            f"length to the power of {powers['window forward']:.2f} forward and {powers['window both']:.2f} with "
            f"backward; {powers['causal forward']:.2f} and {powers['causal both']:.2f} without a window",
            max(powers["window forward"], powers["window both"]) <= LINEAR < powers["causal both"],
        ),
        Sentence(
            name,
            "Memory is linear in the length.",
            f"the peak of forward and backward grows with a power of {growth:.2f}, from {readable_bytes(memory[0])} to "
            f"{readable_bytes(memory[-1])}"
            if known
            else "cannot be measured on this system",
            known and growth <= LINEAR,
        ),
        Sentence(
            name,
            "Stacked layers see further: l layers see l windows.",
            f"{s['depth']} layers of w = {window}: gradients reach {last['causal']} tokens, 1 + l (w - 1), or "
            f"{last['both sides']} with windows on both sides, 1 + l w; beyond these, {outside} hidden states change",
            found == expected and outside == 0,
        ),
        Sentence(
            name,
            "A cache of a window stops growing.",
            f"w = {s['cache_window']:,}: {readable_bytes(cache['window'][1])} after {cache['tokens'][1]:,} tokens and "
            f"{readable_bytes(cache['window'][-1])} after {cache['tokens'][-1]:,}, where all keys take "
            f"{readable_bytes(cache['all'][-1])}",
            cache["window"][1] == cache["window"][-1] < cache["all"][-1],
        ),
    ]


def _multi_query(results: dict[str, Any]) -> list[Sentence]:
    name, r, s = "multi-query", results["multi-query"], results["settings"]
    sizes, heads = r["cache_bytes"], s["decode_heads"]
    most, one = sizes[str(heads)], sizes["1"]
    faster = {
        library: times[str(heads)]["median_us"] / times["1"]["median_us"] for library, times in r["step_us"].items()
    }
    return [
        Sentence(
            name,
            "All heads share one head of keys and values, so that the cache is smaller by the number of heads.",
            f"{heads} heads: {readable_bytes(most)} to {readable_bytes(one)}, {most / one:g} times",
            most == heads * one,
        ),
        Sentence(
            name,
            "Decoding is faster, since it reads fewer bytes.",
            f"a step over {s['decode_keys']:,} keys is {faster['qkv']:.1f} times as fast with one KV head as with "
            f"{heads} (on torch's attention, {faster['torch']:.1f} times)",
            faster["qkv"] >= heads / 2,
        ),
    ]


def _grouped_query(results: dict[str, Any]) -> list[Sentence]:
    name, r, shared = "grouped-query", results["grouped-query"], results["multi-query"]
    counts = [str(n) for n in results["settings"]["decode_kv_heads"]]
    sizes = [shared["cache_bytes"][n] for n in counts]
    times = [shared["step_us"]["qkv"][n]["median_us"] for n in counts]
    ends = r["equal_bits"]
    return [
        Sentence(
            name,
            "With as many groups as heads it is multi-head attention, with one it is multi-query attention.",
            "; ".join(f"{end}: {'the same bits' if same else 'other bits'}" for end, same in ends.items()),
            all(ends.values()),
        ),
        Sentence(
            name,
            "Between these, it is between them in bytes and in time.",
            "KV heads: " + ", ".join(f"{n} {time / 1e3:.2f} ms" for n, time in zip(counts, times, strict=True)),
            all(size * int(counts[0]) == sizes[0] * int(n) for n, size in zip(counts, sizes, strict=True))
            and all(after <= 1.05 * before for before, after in pairwise(times)),
        ),
        Sentence(
            name,
            "A multi-head checkpoint becomes one by the mean of the keys and values of each group.",
            f"projections of `convert_layer` are off from these means by {r['pooling_error']:.0e}, in fp32; what it "
            "costs, and training wins back, is in [grouped_query](../grouped_query/README.md)",
            r["pooling_error"] < CLOSE,
        ),
    ]


def power(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The power of the length with which a cost grows: the slope of the best line through their logarithms."""
    xs, ys = ([math.log(number) for number in numbers] for numbers in (lengths, costs))
    middle, height = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / sum((x - middle) ** 2 for x in xs)
