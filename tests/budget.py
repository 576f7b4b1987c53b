"""How much error is allowed: derived from what torch makes in the same dtype, never chosen."""

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, want: Tensor, peer: Tensor, what: str, allowance: float = 0.0) -> None:
    """``got`` is at most twice as far from the fp64 ``want`` as ``peer`` is, up to one rounding of the result.

    The rounding counts since a peer can be right by luck, and no result can be nearer than its own dtype allows.
    ``allowance`` is an error derived in another way, where the peer measures it badly.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel() == 0:
        return
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite]), f"{what}: differs where the oracle is not finite"
    want = want.masked_fill(~finite, 0)
    error = (got.double().masked_fill(~finite, 0) - want).abs().max().item()
    peer_error = (peer.double().masked_fill(~finite, 0) - want).abs().max().item()
    rounding = torch.finfo(got.dtype).eps * want.abs().max().item() + allowance
    assert error <= 2 * peer_error + rounding, (
        f"{what}: error {error:.3g} exceeds 2 x {peer_error:.3g} of torch + {rounding:.3g} of rounding"
    )
