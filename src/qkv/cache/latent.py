"""`LatentKVCache`: the latents of multi-head latent attention."""

import torch
from torch import Tensor

from qkv.cache.base import Keys
from qkv.cache.kv import FullCache


class LatentKVCache(FullCache):
    """The latents and rotary keys of all tokens so far, for `LatentAttention`: one row of both for each token.

    Keys and values of all heads are computed from latents of ``rank`` numbers and a rotary key of ``rope_dim`` that
    heads share. So a token takes ``rank + rope_dim`` numbers, instead of ``num_heads * (key width + value width)``.

    Args:
        capacity: as in `KVCache`.

    Example:
        >>> import torch, qkv
        >>> cache = qkv.LatentKVCache()
        >>> keys = cache.append(torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 4))
        >>> keys.k.shape, keys.v.shape, keys.v.data_ptr() == keys.k.data_ptr()
        (torch.Size([1, 1, 5, 20]), torch.Size([1, 1, 5, 16]), True)

    Source: DeepSeek-V2, section 2.1.2.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity, parts=1)
        self._rank = 0

    def append(self, latents: Tensor, rotary_keys: Tensor) -> Keys:
        """Appends latents ``(B, 1, L, rank)`` and rotary keys ``(B, 1, L, rope_dim)``; returns all so far.

        Returns:
            Keys and values of a single head: ``(B, 1, Lk, rank + rope_dim)``, latents first, and the latents alone, a
            view of the keys.

        Raises:
            ValueError: for a batch, width, dtype or device other than before, more than one head, and beyond capacity.
        """
        (rows,), start = self._parts, self.length
        if latents.dim() == 4 and latents.shape[1] != 1:
            raise ValueError(
                f"LatentKVCache: latents must be (B, 1, L, rank), shared by all heads; got {tuple(latents.shape)}."
            )
        try:
            capacity = self._check_tokens(latents, rotary_keys)
            keys = rows.extend(torch.cat([latents, rotary_keys], dim=3), capacity)
        except BaseException:  # as in KVCache.append
            self.restore(start)
            raise
        self._rank = latents.shape[3]
        return Keys(keys, keys[..., : self._rank], start)

    def _memory(self) -> tuple[Tensor | None, Tensor | None]:
        """As in `FullCache`, of latents and of rotary keys."""
        memory = self._parts[0].memory
        return (None, None) if memory is None else (memory[..., : self._rank], memory[..., self._rank :])
