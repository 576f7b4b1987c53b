"""`explain` of a call over ranks: what each scheme would send and compute."""

from typing import NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from qkv.parallel.calls import CallOptions, chosen_of, validated
from qkv.parallel.compiling import between_graphs
from qkv.parallel.schemes import SCHEMES, bytes_sent, scores_computed
from qkv.parallel.tokens import Tokens


class Explanation(NamedTuple):
    """What a call over ranks would send and compute, by scheme."""

    chosen: str
    sent: dict[str, tuple[int, ...]]
    """bytes that each rank sends to others in the forward pass, apart from 16 that each message begins with on a CPU;
    a scheme that cannot solve the call is missing"""
    scores: dict[str, tuple[int, ...]]
    """scores that each rank computes, those that positions show"""
    reasons: dict[str, str]
    """against each other scheme"""

    def __str__(self) -> str:
        lines = []
        for name in SCHEMES:
            if name not in self.sent:
                lines.append(f"{name:<6}  {self.reasons[name]}")
                continue
            verdict = "chosen" if name == self.chosen else self.reasons[name]
            sent, scores = self.sent[name], self.scores[name]
            lines.append(
                f"{name:<6}  {verdict}: sends {sum(sent):,} bytes, {max(sent):,} of them by one rank; "
                f"computes {sum(scores):,} scores, {max(scores):,} of them on one rank"
            )
        return "\n".join(lines)


@between_graphs
def explain(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, **options: Unpack[CallOptions]) -> Explanation:
    """The scheme that `attention` would take for this call, what each would cost, and the reasons against the others.

    Nothing is sent. A backward pass of ``gather`` and ``heads`` sends as much as the forward pass.

    Args:
        q, k, v, tokens, **options: as in `attention`.

    Raises:
        As `attention`.

    Example:
        >>> print(parallel.explain(q, k, v, tokens, mask=Mask.causal(window=512)))  # doctest: +SKIP
    """
    call, scheme = validated("parallel.explain", (q, k, v), tokens, options), options.get("scheme", "auto")
    sent, scores = bytes_sent(call), scores_computed(call)
    chosen = chosen_of(sent) if scheme == "auto" else scheme
    reasons = {}
    for name in SCHEMES:
        if name not in sent:
            reasons[name] = "not for keys that each rank has whole"
        elif name != chosen:
            sends_more = sum(sent[name]) > sum(sent[chosen])
            reasons[name] = "sends more" if sends_more else "comes later in the order"
            if scheme != "auto":
                reasons[name] = "not asked for"
    return Explanation(chosen, sent, scores, reasons)
