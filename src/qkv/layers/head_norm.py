"""`HeadNorm`: the norm of queries and keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from qkv import kernels
from qkv.kernels import Gain

_RMS_NORM = F.rms_norm


def is_rms_norm_torchs() -> bool:
    """Whether ``F.rms_norm`` is as on import. What somebody has put in its place since is called."""
    return F.rms_norm is _RMS_NORM


class HeadNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the dtype of its input, also under autocast, which does not cast gains.

    By the kernel where it can be, as in a layer's step.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with other gains."""
        gains = weight.to(x.dtype)
        if self.eps is not None and is_rms_norm_torchs() and kernels.can_bypass_functions(x, gains):
            out = kernels.fast_rms_norm(x, gains, self.eps, Gain.WIDENED)
            if out is not None:
                return out
        return F.rms_norm(x, self.normalized_shape, gains, self.eps)
