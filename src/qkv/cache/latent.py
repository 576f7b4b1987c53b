"""`LatentKVCache`: the latents of multi-head latent attention."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.cache.base import Keys
from qkv.cache.format import Format
from qkv.cache.kv import FullCache


class Latents(Format):
    """Rows of a latent and a rotary key."""

    __slots__ = ()

    parts = ("latents",)

    def encode(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """New tokens, as each part stores them."""
        return (torch.cat([k, v], dim=3),)


LATENTS = Latents()


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

    _format = LATENTS
    STATE = ("rank",)

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._rank = 0

    def append(self, latents: Tensor, rotary_keys: Tensor, is_token: Tensor | None = None) -> Keys:
        """Appends latents ``(B, 1, L, rank)`` and rotary keys ``(B, 1, L, rope_dim)``; returns all so far.

        Args:
            latents, rotary_keys: of the new tokens.
            is_token: as in `Cache.append`.

        Returns:
            Keys and values of a single head: ``(B, 1, Lk, rank + rope_dim)``, latents first, and the latents alone, a
            view of the keys.

        Raises:
            ValueError: for a batch, width, dtype or device other than before, more than one head, and beyond capacity.
        """
        if latents.dim() == 4 and latents.shape[1] != 1:
            raise ValueError(
                f"LatentKVCache: latents must be (B, 1, L, rank), shared by all heads; got {tuple(latents.shape)}."
            )
        (keys,), offset = self._extend(latents, rotary_keys, is_token)
        self._rank = latents.shape[3]
        return self._keys(keys, offset)

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns."""
        keys = self._parts[0].tensor
        assert keys is not None
        return self._keys(keys, self.offset_of_latest(count))

    def _keys(self, keys: Tensor, offset: int | Tensor) -> Keys:
        """Rows as keys, and their latents as values."""
        return Keys(keys, keys[..., : self._rank], offset, self._returned)

    def _memory(self) -> tuple[Tensor | None, Tensor | None]:
        memory = self._parts[0].memory
        return (None, None) if memory is None else (memory[..., : self._rank], memory[..., self._rank :])

    def _more_state(self) -> dict[str, Tensor]:
        return {"rank": torch.tensor(self._rank)}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        super()._load_more(state)
        self._rank = int(state["rank"])

    def _require_like(self, other: Self) -> None:
        super()._require_like(other)
        if self._batch and other._batch and self._rank != other._rank:
            raise ValueError(f"LatentKVCache: both caches must have latents of {self._rank}; got {other._rank}.")

    def _combine(self, other: Self, index: Tensor | None) -> None:
        super()._combine(other, index)
        self._rank = other._rank
