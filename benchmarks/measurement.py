"""`measure`: qkv and its peers on one case, in turns; and what a `Measurement` says about them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from case import DTYPES, Case
from limits import Limits
from peers import PEERS, Peer
from torch import Tensor

import qkv
from qkv.bench.attention_call import PreparedCall, qkv_call
from qkv.bench.timing import Spread, interleaved

OURS = "qkv"
ROUNDS = 9
REST_SECONDS = 0.05
"""Without it, the threads of onnxruntime spin into the turn of the next library, and double its time."""
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""Of the norm of the difference: what tells another computation from another rounding. Gradients are given twice it."""


@dataclass(frozen=True)
class Measurement:
    """One case in one dtype."""

    case: Case
    dtype: str
    backend: str | None
    """What ``auto`` has chosen."""
    times: dict[str, Spread]
    """By the name of the library."""
    skipped: dict[str, str]
    """Why a peer is not among them."""

    def as_json(self) -> dict[str, Any]:
        """The fields, in what `json.dumps` takes."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Measurement":
        """What `as_json` has written."""
        return Measurement(**fields | {"case": Case(**fields["case"])})

    def rate(self, name: str) -> float:
        """GB/s of keys and values for decoding, and otherwise GF/s of what the mask shows."""
        amount = self.case.kv_bytes(DTYPES[self.dtype]) if self.case.is_decoding else self.case.operations()
        return amount / self.times[name]["median_us"] / 1e3

    def limit(self, bounds: Limits) -> float | None:
        """What the machine can do at most of this, where it is known; of fp32 arithmetic for fp16."""
        if self.case.is_decoding:
            return bounds["read_gb_per_s"]
        return (bounds["bf16_gflops"] if self.dtype == "bf16" else None) or bounds["fp32_gflops"]

    def share(self, bounds: Limits) -> float | None:
        """The rate of qkv as a part of the limit."""
        limit = self.limit(bounds)
        return None if limit is None else self.rate(OURS) / limit

    def ratio(self, name: str) -> float | None:
        """How many times as long as qkv a peer takes; None where it is skipped."""
        if name not in self.times:
            return None
        return self.times[name]["median_us"] / self.times[OURS]["median_us"]


def measure(case: Case, dtype: str, peers: Sequence[Peer] = PEERS, rounds: int = ROUNDS) -> Measurement:
    """Times qkv and those of the peers that compute the case."""
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
            except Exception as error:  # A peer that fails is a finding, and not the end of the run.
                reason = f"fails with {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if reason is not None:
            candidates.pop(peer.NAME, None)
            skipped[peer.NAME] = reason
    backend = qkv.explain(q, k, v, mask=mask, offset=case.offset).chosen
    return Measurement(case, dtype, backend, interleaved(candidates, rounds=rounds, rest_seconds=REST_SECONDS), skipped)


def _difference(call: PreparedCall, expected: tuple[Tensor, ...], tolerance: float) -> str | None:
    """What tells that a peer computes something else, or None."""
    errors = [
        float(torch.linalg.vector_norm(got.float() - want.float()) / torch.linalg.vector_norm(want.float()))
        for got, want in zip(call(), expected, strict=True)
    ]
    if max(errors) <= tolerance:
        return None
    return f"computes something else: off by {max(errors):.1%}"
