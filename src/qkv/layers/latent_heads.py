"""`LatentHeads`: attention of many heads over latents, in expanded or absorbed form."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv import functional
from qkv.layers.projection import plain_weight, project


class LatentHeads(NamedTuple):
    """How heads read latents: head h has the key ``[K_h @ latent, rotary key]`` and the value ``V_h @ latent``.

    *Expanded*, keys and values of all heads are computed, and attention is multi-head. *Absorbed*, the query
    ``[K_h.mT @ q_nope, q_rope]`` reads latents and rotary keys as they are, and ``V_h`` is applied to the sum of
    latents: multi-query attention whose values are the first columns of its keys. Both are the same function up to
    rounding.
    """

    up: nn.Module
    """the linear map from a latent to ``[K_h @ latent, V_h @ latent]`` of all heads, ``kv_b_proj`` of DeepSeek"""
    rank: int
    nope_dim: int
    """width of a key without the rotary key"""
    value_dim: int

    @property
    def num_heads(self) -> int:
        """The number of heads, if ``up`` is an ``nn.Linear``."""
        out_features: int = self.up.out_features  # type: ignore[assignment]
        return out_features // (self.nope_dim + self.value_dim)

    def attend(self, q: Tensor, latents: Tensor, *, scale: float | None, **options: Any) -> Tensor:
        """`qkv.attention` over latents.

        Args:
            q: ``(B, H, Lq, nope_dim + rope_dim)``.
            latents: ``(B, 1, Lk, rank + rope_dim)``, with the rotary key of each token.
            scale: ``1 / sqrt(nope_dim + rope_dim)`` if None.
            **options: as in `qkv.attention`.

        Returns:
            ``(B, H, Lq, value_dim)``.
        """
        scale = q.shape[3] ** -0.5 if scale is None else scale
        weight = plain_weight(self.up)
        if weight is None or not self.is_cheaper_absorbed(q.shape[2], latents.shape[2]):
            return functional.attention(q, *self.expand(latents), scale=scale, **options)
        k_up, v_up = weight.unflatten(0, (-1, self.nope_dim + self.value_dim)).split(
            [self.nope_dim, self.value_dim], dim=1
        )
        absorbed = torch.cat([_by_head(q[..., : self.nope_dim], k_up), q[..., self.nope_dim :]], dim=3)
        out = functional.attention(absorbed, latents, latents[..., : self.rank], scale=scale, **options)
        return _by_head(out, v_up.mT)

    def is_cheaper_absorbed(self, lq: int, lk: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for ``lq`` queries and ``lk`` keys.

        Expanding costs ``rank * (nope_dim + value_dim)`` for each key and head; absorbing costs that for each query,
        and wider scores and values for each pair.
        """
        widths = self.nope_dim + self.value_dim
        return (lq - lk) * self.rank * widths + lq * lk * (2 * self.rank - widths) < 0

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(B, H, Lk, nope_dim + rope_dim)`` and values ``(B, H, Lk, value_dim)`` of all heads."""
        rows, rotary_key = latents[:, 0, :, : self.rank], latents[..., self.rank :]
        heads = split_heads(project(self.up, rows), self.nope_dim + self.value_dim)
        k, v = heads.split([self.nope_dim, self.value_dim], dim=3)
        return torch.cat([k, rotary_key.expand(-1, k.shape[1], -1, -1)], dim=3), v


def split_heads(x: Tensor, width: int) -> Tensor:
    """(B, L, heads * width) to (B, heads, L, width), a view."""
    return x.view(*x.shape[:2], x.shape[2] // width, width).transpose(1, 2)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """``x @ weights``, for x ``(B, H, L, n)`` and a matrix for each head, ``(H, n, m)``."""
    batch, _, length, _ = x.shape
    rows = x.transpose(0, 1).flatten(1, 2)
    if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16):
        # torch's products of few rows in 16 bits take 3 to 40 times as long as in fp32, casts included.
        product = torch.bmm(rows.float(), weights.float()).to(x.dtype)
    else:
        product = torch.bmm(rows, weights)
    return product.view(rows.shape[0], batch, length, weights.shape[2]).transpose(0, 1)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """``torch.cat([left, right], dim=3)`` of tensors ``(B, heads, L, width)``; a view if they are one in memory."""
    width = left.shape[3] + right.shape[3]
    if (
        type(left) is type(right) is Tensor
        and not (left.requires_grad or right.requires_grad)
        and left.dtype is right.dtype
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and right.storage_offset() == left.storage_offset() + left.shape[3]
        and left.shape[:3] == right.shape[:3]
        and left.stride() == right.stride()
        and left.stride(3) == 1
        and left.stride(2) >= width
    ):
        return left.as_strided((*left.shape[:3], width), left.stride(), left.storage_offset())
    return torch.cat([left, right], dim=3)
