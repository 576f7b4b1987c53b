"""`measure`: times qkv and its peers on one case, interleaved; `Measurement` has the rates and ratios."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import qkv
from harness.case import DTYPES, Case
from harness.limits import Limits
from harness.peers import PEERS, Peer
from qkv.bench.attention_call import PreparedCall, qkv_call
from qkv.bench.timing import Spread, interleaved

OURS = "qkv"
ROUNDS = 9
REST_SECONDS = 0.05
"""Without a pause, spinning threads of onnxruntime double the time of the next library."""
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""Relative error (norm) up to which peers count as computing the same; doubled for gradients."""


@dataclass(frozen=True)
class Measurement:
    """The times of one case in one dtype."""

    case: Case
    dtype: str
    backend: str | None
    """The backend that ``auto`` chose."""
    times: dict[str, Spread]
    """By library."""
    skipped: dict[str, str]
    """Reasons for peers that were not measured."""

    def as_json(self) -> dict[str, Any]:
        """The fields for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Measurement":
        """The inverse of `as_json`."""
        return Measurement(**fields | {"case": Case(**fields["case"])})

    def rate(self, name: str) -> float:
        """GB/s of keys and values for decoding, otherwise GF/s over visible scores."""
        amount = self.case.kv_bytes(DTYPES[self.dtype]) if self.case.is_decoding else self.case.operations()
        return amount / self.times[name]["median_us"] / 1e3

    def limit(self, bounds: Limits) -> float | None:
        """The machine's limit for `rate`; that of fp32 for fp16; None where not measured."""
        if self.case.is_decoding:
            return bounds["read_gb_per_s"]
        return (bounds["bf16_gflops"] if self.dtype == "bf16" else None) or bounds["fp32_gflops"]

    def share(self, bounds: Limits) -> float | None:
        """The rate of qkv as a fraction of the limit."""
        limit = self.limit(bounds)
        return None if limit is None else self.rate(OURS) / limit

    def ratio(self, name: str) -> float | None:
        """A peer's time over that of qkv; None where it is skipped."""
        if name not in self.times:
            return None
        return self.times[name]["median_us"] / self.times[OURS]["median_us"]


def measure(case: Case, dtype: str, peers: Sequence[Peer] = PEERS, rounds: int = ROUNDS) -> Measurement:
    """Times qkv and the peers that support the case."""
    q, k, v = case.inputs(DTYPES[dtype])
    mask = case.as_mask()
    candidates = {OURS: qkv_call(q, k, v, mask, case.offset)}
    expected = candidates[OURS]()
    skipped: dict[str, str] = {}
    for peer in peers:
        reason = peer.why_not(case, DTYPES[dtype])
        if reason is None:
            try:
                call = peer.prepare(case, DTYPES[dtype], q, k, v)
                reason = _difference(call, expected, TOLERANCE[dtype] * (2 if case.backward else 1))
                candidates[peer.NAME] = call
            except Exception as error:  # A failing peer is recorded and does not end the run.
                reason = f"fails with {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if reason is not None:
            candidates.pop(peer.NAME, None)
            skipped[peer.NAME] = reason
    backend = qkv.explain(q, k, v, mask=mask, offset=case.offset).chosen
    return Measurement(case, dtype, backend, interleaved(candidates, rounds=rounds, rest_seconds=REST_SECONDS), skipped)


def _difference(call: PreparedCall, expected: tuple[Tensor, ...], tolerance: float) -> str | None:
    """The reason if a peer's result differs by more than ``tolerance``, or None."""
    errors = [
        float(torch.linalg.vector_norm(got.float() - want.float()) / torch.linalg.vector_norm(want.float()))
        for got, want in zip(call(), expected, strict=True)
    ]
    if max(errors) <= tolerance:
        return None
    return f"gives another result: relative error {max(errors):.1%}"
