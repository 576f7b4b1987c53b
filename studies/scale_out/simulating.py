"""`simulated`: what a layer of attention costs over many ranks, from measured numbers and the formulas."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from calls import SCHEMES, Call, calls, held, received, scores, sent
from settings import Settings

HEADS, KV_HEADS, WIDTH, SIZE = 32, 8, 128, 2
"""of the model: grouped queries, numbers in 16 bits"""


class Machine(NamedTuple):
    """What a rank is."""

    name: str
    operations: float
    """floating-point operations a second"""
    bandwidth: float
    """bytes a second, each way"""
    message: float
    """seconds to begin a message to one other rank"""
    memory: float
    """bytes"""


class Cost(NamedTuple):
    """Of a forward pass of one layer, on the busiest rank."""

    scheme: str
    sending: float
    """seconds"""
    computing: float
    """seconds"""
    held: float
    """bytes of what arrives"""
    fits: bool

    @property
    def seconds(self) -> float:
        return self.sending + self.computing


def machines(results: dict[str, Any]) -> list[Machine]:
    """A measured core behind each measured link, and a card, of which nothing is measured."""
    found = []
    for rate in results["measured"]["links"]:
        start, bandwidth = line(results, rate)
        message = max(start, 0.0) / (results["settings"]["ranks"] - 1)
        found.append(Machine(f"a core, {rate} Gbit/s", results["operations"], bandwidth, message, 64e9))
    return [*found, Machine("a card (assumed)", 4e14, 5e10, 5e-6, 80e9)]


def cost(call: Call, machine: Machine) -> Cost:
    """One scheme: what the busiest rank sends or receives, then what the busiest rank computes; nothing overlaps."""
    exchanges = 1 if call.scheme == "gather" else 2
    moved = max(*sent(call), *received(call))
    sending = moved / machine.bandwidth + exchanges * (call.ranks - 1) * machine.message
    computing = 4 * call.width * max(scores(call)) / machine.operations
    return Cost(call.scheme, sending, computing, held(call), held(call) < machine.memory)


def costs(mask: str, tokens: int, ranks: int, machine: Machine, settings: Settings) -> list[Cost]:
    """All schemes, under a causal mask or a window."""
    layout = "zigzag" if mask == "causal" else "even"
    window = settings.simulated_window
    return [
        cost(Call(scheme, mask, layout, tokens, ranks, HEADS, KV_HEADS, WIDTH, window, SIZE), machine)
        for scheme in SCHEMES
    ]


def simulated(results: dict[str, Any], settings: Settings) -> Iterator[tuple[Machine, str, int, int, list[Cost]]]:
    """All machines, masks, lengths and numbers of ranks."""
    for machine in machines(results):
        for mask in ("causal", "window"):
            for tokens in settings.simulated_tokens:
                for ranks in settings.simulated_ranks:
                    yield machine, mask, tokens, ranks, costs(mask, tokens, ranks, machine, settings)


def line(results: dict[str, Any], rate: str) -> tuple[float, float]:
    """Seconds at no bytes and bytes a second: least squares of relative errors over all calls at a rate."""
    moved, seconds = points(results, rate)
    weights = [1 / s**2 for s in seconds]
    total = sum(weights)
    x, y = (sum(w * one for w, one in zip(weights, ones, strict=True)) / total for ones in (moved, seconds))
    above = sum(w * (m - x) * (s - y) for w, m, s in zip(weights, moved, seconds, strict=True))
    slope = above / sum(w * (m - x) ** 2 for w, m in zip(weights, moved, strict=True))
    return y - slope * x, 1 / slope


def points(results: dict[str, Any], rate: str) -> tuple[list[float], list[float]]:
    """For each call, the bytes that the busiest rank sends or receives, and seconds."""
    made = calls_of(results)
    moved = [max(*sent(call), *received(call)) for call in made]
    return moved, results["measured"]["links"][rate]


def calls_of(results: dict[str, Any]) -> list[Call]:
    """The calls that were measured."""
    return list(calls(settings_of(results)))


def settings_of(results: dict[str, Any]) -> Settings:
    """The settings of the results."""
    return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in results["settings"].items()})
