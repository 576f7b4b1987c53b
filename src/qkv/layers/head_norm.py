"""`HeadNorm`: the norm of queries and keys."""

import torch.nn.functional as F
from torch import Tensor, nn


class HeadNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the dtype of its input, also under autocast, which does not cast gains."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
