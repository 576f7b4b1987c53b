"""Picture 5: bytes of keys and values over the number of tokens."""

from qkv.analysis.labels import numbers_of
from qkv.analysis.page.charts import Chart, legend, logarithmic
from qkv.analysis.page.markup import Markup, figure, joined, table
from qkv.analysis.pricing import Price
from qkv.analysis.seen import Seen
from qkv.analysis.words import counted
from qkv.byte_sizes import readable_bytes, written_round

LONGEST = 1 << 17
"""Tokens at the right edge of the picture, and more for longer texts."""


def cache(seen: Seen, most: float) -> Markup:
    """A line a change, in all its layers."""
    length, proposal = len(seen.tokens), seen.proposal(most)
    kinds: list[tuple[str, dict[str, Price]]] = [("as it is", {})]
    for price in seen.prices:
        where = "all layers" if price.unmeasured is None else counted(len(price.layers), "layer")
        kinds.append((f"{price.change} in {where}", dict.fromkeys(price.layers, price)))
    if proposal is not None:
        names = zip(numbers_of(proposal.price.layers), proposal.price.layers, strict=True)
        kinds.append(("the proposal", {name: proposal.price for number, name in names if number in proposal.layers}))
    most_tokens = max(LONGEST, 1 << (length - 1).bit_length())
    counts = [1 << n for n in range(6, most_tokens.bit_length())]
    lines = [[(float(count), float(seen.cache_bytes(changed, count))) for count in counts] for _, changed in kinds]
    least, largest = (end(y for line in lines for _, y in line) for end in (min, max))
    powers = [n for n in range(10, 50, 5) if least <= 2**n <= largest]
    thousands = [(float(count), f"{count >> 10}k") for count in counts if count >= 1024 and count.bit_length() % 2]
    chart = Chart(
        logarithmic("tokens", [(64.0, "64"), (256.0, "256"), *thousands], 64, most_tokens),
        logarithmic(
            "keys and values",
            [(2.0**n, written_round(2.0**n)) for n in powers],
            least * 0.8,
            largest * 1.25,
        ),
    )
    if length >= 64:
        chart.line([(length, least * 0.8), (length, largest * 1.25)], "limit")
    for n, line in enumerate(lines):
        chart.line(line, f"line s{n % 4} d{n % 5}")
        chart.mark(*line[-1], n, f"{kinds[n][0]}, {counts[-1]:,} tokens: {readable_bytes(int(line[-1][1]))}")
    says = f"At {counts[-1]:,} tokens the model as it is keeps {readable_bytes(int(lines[0][-1][1]))}."
    rows = [[f"{count:,}", *(f"{line[at][1]:,.0f}" for line in lines)] for at, count in enumerate(counts)]
    return figure(
        joined(chart.drawn(f"Bytes of keys and values over tokens. {says}"), legend([name for name, _ in kinds])),
        f"Shows bytes of keys and values of one text, {counted(seen.bytes_per_number, 'byte')} a number, as its length "
        f"grows. {says} The dashed line is at this text's {counted(length, 'token')}.",
        "Does not show time, nor memory of weights.",
        table("Bytes of keys and values", ["tokens", *(name for name, _ in kinds)], rows),
    )
