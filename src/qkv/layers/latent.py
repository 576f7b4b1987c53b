"""`LatentAttention`: keys and values of all heads from one latent for each token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from qkv import functional
from qkv.arguments import require_count, require_finite, require_flag, require_positive, require_probability
from qkv.cache import Caches, Keys, LatentKVCache, Owner
from qkv.cache.int8 import Dtype, format_of
from qkv.layer_record import LayerRecord, record_call
from qkv.layers import deepseek
from qkv.layers.arguments import input_error, require_backend, require_like_weights, require_mask, require_rotary
from qkv.layers.cached_call import (
    CallOptions,
    Inputs,
    cached_inputs,
    call_options,
    new_tokens,
    restore_cache_on_error,
)
from qkv.layers.cached_operator import OperatorLayer
from qkv.layers.head_norm import HeadNorm
from qkv.layers.latent_heads import LatentHeads, split_heads
from qkv.layers.over_ranks import attend_latents_over_ranks, layout_for, mask_over_ranks, options_over_ranks
from qkv.layers.projection import project
from qkv.layers.rotary import RotaryEmbedding, rotate_both
from qkv.masks import FULL, Mask
from qkv.parallel.context import Over
from qkv.parallel.tokens import Tokens
from qkv.scores import ScoreOptions


class LatentAttention(OperatorLayer):
    """Multi-head latent attention: keys and values of all heads are linear in one small latent of each token.

    A token x has the latent ``c = norm(W_c @ x)`` of ``kv_rank`` numbers and the rotary key ``r = rotate(W_r @ x)`` of
    ``rope_dim``, which all heads share. Head h has the key ``[K_h @ c, r]`` and the value ``V_h @ c``, so a cache
    stores c and r alone: ``kv_rank + rope_dim`` numbers for each token, whatever the number of heads. Queries have
    ``nope_dim`` channels without a position and ``rope_dim`` rotated ones.

    The layer computes whichever of two forms takes fewer multiplications: *expanded*, multi-head attention over
    ``[K_h @ c, r]`` and ``V_h @ c``, for a text as a whole; *absorbed*, with ``K_h.mT`` applied to queries and ``V_h``
    to outputs, for a few queries of a long text: multi-query attention over c and r as they are stored. They round
    differently.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        kv_rank: width of a latent.
        nope_dim: width of the part of a key that comes from the latent; 0 if all of it is rotary.
        rope_dim: width of the rotary key; 0 for none.
        value_dim: width of a value, nope_dim if None.
        q_rank: width of a latent for queries; if None, they are projected directly from the input.
        mask: which keys a query may see.
        rotary: rotates the last ``rope_dim`` channels of queries, and rotary keys, by their position; without it, these
            have no position either.
        norm_eps: of the norms of both latents, ``q_a_norm`` and ``kv_a_norm``; None for no norms.
        bias: whether the projections of the input have a bias.
        out_bias: whether out_proj has a bias; as ``bias`` if None.
        scale: factor of the scores, ``1 / sqrt(nope_dim + rope_dim)`` if None. YaRN multiplies that by ``mscale ** 2``.
        softcap: as in `qkv.attention`.
        dropout: probability of dropping a weight, in training.
        backend: as in `qkv.attention`.
        device, dtype: of the parameters.

    Parameters are ``q_proj`` (with a q_rank, ``q_a_proj``, ``q_a_norm`` and ``q_b_proj``), ``kv_a_proj`` (latents, then
    rotary keys), ``kv_a_norm``, ``kv_b_proj`` (of each head, keys, then values) and ``out_proj``. Weights are
    initialised Xavier-uniform, biases to 0.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for sizes that do not fit together, and numbers out of range.

    Example:
        >>> import torch, qkv
        >>> rotary = qkv.RotaryEmbedding(4, interleaved=True)
        >>> layer = qkv.LatentAttention(
        ...     64, 8, kv_rank=16, nope_dim=8, rope_dim=4, mask=qkv.Mask.causal(), rotary=rotary
        ... )
        >>> cache = qkv.LatentKVCache()
        >>> prompt = layer(torch.randn(1, 5, 64), cache=cache)
        >>> step = layer(torch.randn(1, 1, 64), cache=cache)
        >>> step.shape, cache.length
        (torch.Size([1, 1, 64]), 6)

    Source: DeepSeek-V2, section 2.1 and appendix C; DeepSeek-V3, section 2.1.1. `from_transformers` converts
    transformers' modules, which always expand. Their rotary channels are interleaved, which is an option here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int = 0,
        value_dim: int | None = None,
        q_rank: int | None = None,
        mask: Mask = FULL,
        rotary: RotaryEmbedding | None = None,
        norm_eps: float | None = 1e-6,
        bias: bool = False,
        out_bias: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        value_dim = nope_dim if value_dim is None else value_dim
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kv_rank", kv_rank)):
            require_count(caller, name, count)
        for name, width in (("nope_dim", nope_dim), ("rope_dim", rope_dim)):
            require_count(caller, name, width, least=0)
        require_count(caller, "value_dim", value_dim)
        if nope_dim + rope_dim < 1:
            raise ValueError(f"{caller}: a key must have channels, of nope_dim or of rope_dim; got 0 and 0.")
        if q_rank is not None:
            require_count(caller, "q_rank", q_rank, suffix=", or None for a projection at once")
        require_mask(caller, mask)
        if rotary is not None:
            require_rotary(caller, rotary, rope_dim, None)
        out_bias = bias if out_bias is None else out_bias
        for name, flag in (("bias", bias), ("out_bias", out_bias)):
            require_flag(caller, name, flag)
        if norm_eps is not None:
            require_positive(caller, "norm_eps", norm_eps, suffix=", or None for no norms")
        if scale is not None:
            require_finite(caller, "scale", scale, suffix=", or None for 1 / sqrt(nope_dim + rope_dim)")
        if softcap is not None:
            require_positive(caller, "softcap", softcap, suffix=" or None")
        require_probability(caller, "dropout", dropout)
        require_backend(caller, backend)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kv_rank = kv_rank
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        self.value_dim = value_dim
        self.q_rank = q_rank
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.dropout = dropout
        self.backend = backend
        self._owner = Owner(f"{caller}({embed_dim}, num_heads={num_heads})")

        def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        def norm(width: int) -> HeadNorm | None:
            return None if norm_eps is None else HeadNorm(width, eps=norm_eps, device=device, dtype=dtype)

        q_width = num_heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q_proj = linear(embed_dim, q_width, bias)
        else:
            self.q_a_proj = linear(embed_dim, q_rank, bias)
            self.q_a_norm = norm(q_rank)
            self.q_b_proj = linear(q_rank, q_width)
        self.kv_a_proj = linear(embed_dim, kv_rank + rope_dim, bias)
        self.kv_a_norm = norm(kv_rank)
        self.kv_b_proj = linear(kv_rank, num_heads * (nope_dim + value_dim))
        self.out_proj = linear(num_heads * value_dim, embed_dim, out_bias)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, HeadNorm):
                module.reset_parameters()

    @restore_cache_on_error
    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LatentKVCache | Caches | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """Attention with the tokens of x as queries.

        Args:
            x: ``(B, L, embed_dim)``.
            mask, bias, positions: as in `Attention.forward`.
            cache: latents of earlier calls of this layer, to which this call appends its own, apart from padding. A
                call that fails appends nothing.
            tokens: as in `Attention.forward`; ranks send each other latents. There is no cache then.

        Returns:
            ``(B, L, embed_dim)``.

        Raises:
            ValueError: for inputs of another width, dtype or device, positions without rotary, and as `qkv.attention`
                and the cache.
            TypeError: for an input that is not a tensor, and a mask or a cache of the wrong kind.
        """
        layout = layout_for(self, tokens)
        if layout is not None:
            return self._forward_over_ranks(x, layout, mask, bias, positions, cache)
        q, keys, mask, bias, _ = self._inputs(x, call_options(self, mask, bias, positions, cache))
        options = {**self._scores(bias), **keys.options()}
        out = self._heads.attend(q, keys.k, mask=mask, backend=self.backend, **options)
        return project(self.out_proj, out.transpose(1, 2).flatten(2))

    if TYPE_CHECKING:  # that of `nn.Module` takes any arguments
        __call__ = forward

    @restore_cache_on_error
    def attention_weights(
        self,
        x: Tensor,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LatentKVCache | Caches | None = None,
    ) -> Tensor:
        """The softmax weights ``(B, num_heads, Lq, Lk)`` of `forward`, which takes the same arguments."""
        q, keys, mask, bias, _ = self._inputs(x, call_options(self, mask, bias, positions, cache))
        k, _ = self._heads.expand(keys.k)
        return functional.attention_weights(q, k, mask=mask, **self._scores(bias), **keys.options())

    @torch.no_grad()
    def record(
        self,
        x: Tensor,
        *,
        windows: Sequence[int] = (),
        sink_tokens: int = 0,
        blocks: int = 64,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> LayerRecord:
        """What `forward` attends to, as `Attention.record`: each head has keys of its own, made of the latents."""
        q, keys, mask, bias, _ = self._inputs(x, call_options(self, mask, bias, positions, None))
        k, v = self._heads.expand(keys.k)
        options = {"mask": mask, **self._scores(bias), **keys.options()}
        return record_call(type(self).__name__, False, (q, k, v, options), windows, sink_tokens, blocks)

    def make_cache(self, capacity: int | None = None, dtype: Dtype = None) -> LatentKVCache:
        """The cache that the layer needs to decode, as `Caches.for_model` makes it, in the dtype of the latents.

        Args:
            capacity: as in `LatentKVCache`.
            dtype: as in `Attention.make_cache`; without effect, since latents have no int8.

        Raises:
            ValueError: for another dtype.
        """
        format_of(type(self).__name__, dtype)
        return LatentKVCache(capacity)

    def _forward_over_ranks(
        self,
        x: Tensor,
        layout: Over,
        mask: Mask | None,
        bias: Tensor | None,
        positions: Tensor | None,
        cache: LatentKVCache | Caches | None,
    ) -> Tensor:
        """`forward` of the tokens of one rank."""
        if cache is not None:
            raise TypeError(
                f"{type(self).__name__}: cache must be None in a call over ranks; got {type(cache).__name__}."
            )
        inputs = self._inputs(x, options_over_ranks(self, x, layout, positions, None))
        mask = mask_over_ranks(self, mask, layout)
        out = attend_latents_over_ranks(self, inputs.q, inputs.keys.k, mask, bias, layout)
        return project(self.out_proj, out.transpose(1, 2).flatten(2))

    @property
    def _heads(self) -> LatentHeads:
        return LatentHeads(self.kv_b_proj, self.kv_rank, self.nope_dim, self.value_dim)

    def _scores(self, bias: Tensor | None) -> ScoreOptions:
        """The score options of the layer, as keywords of `qkv.attention`."""
        dropout = self.dropout if self.training else 0.0
        return {"scale": self.scale, "softcap": self.softcap, "bias": bias, "dropout": dropout}

    def _inputs(self, x: Tensor, options: CallOptions) -> Inputs:
        """Projects x, and appends to the cache."""
        caller = type(self).__name__
        if isinstance(x, Tensor) and x.is_nested:
            raise ValueError(
                f"{caller}: x must be a tensor (B, L, {self.embed_dim}); got a nested tensor. Call it for each "
                "sequence, or on x.to_padded_tensor(0.0) with mask=Mask.padding(lengths)."
            )
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise input_error(caller, "x", x, f"(B, L, {self.embed_dim})")
        bias, cache = options.bias, options.cache
        if cache is not None and not isinstance(cache, LatentKVCache):
            raise TypeError(f"{caller}: cache must be a LatentKVCache; got {type(cache).__name__}.")
        mask, is_token, where = new_tokens(options, self._owner, x, self.rotary)
        try:
            q, latents, rotary_keys = self._queries(x), *self._latents(x)
            if self.rotary is not None:
                rotated, rotary_keys = rotate_both(self.rotary, q[..., self.nope_dim :], rotary_keys, where)
                q = torch.cat([q[..., : self.nope_dim], rotated], dim=3)
        except RuntimeError as error:
            require_like_weights(caller, "x", x, self.kv_a_proj, error)
            raise
        if cache is None:
            return Inputs(q, Keys(torch.cat([latents, rotary_keys], dim=3), latents, 0), mask, bias)
        keys = cache.append(latents, rotary_keys, is_token)
        return cached_inputs(q, keys, mask, bias, cache)

    def _queries(self, x: Tensor) -> Tensor:
        """Queries ``(B, H, L, nope_dim + rope_dim)``, not rotated."""
        if self.q_rank is None:
            q = project(self.q_proj, x)
        else:
            q = project(self.q_b_proj, _normed(self.q_a_norm, project(self.q_a_proj, x)))
        return split_heads(q, self.nope_dim + self.rope_dim)

    def _latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``(B, 1, L, kv_rank)`` and rotary keys ``(B, 1, L, rope_dim)``, not rotated."""
        latents, rotary_keys = project(self.kv_a_proj, x)[:, None].split([self.kv_rank, self.rope_dim], dim=3)
        return _normed(self.kv_a_norm, latents), rotary_keys

    @classmethod
    def from_transformers(cls, module: nn.Module, **options: Any) -> Self:
        """The layer with the function of an attention module of transformers, and a copy of its weights.

        Args:
            module: ``DeepseekV2Attention``, ``DeepseekV3Attention``, or one with the same configuration and parameters.
            **options: other options of the layer; ``mask`` is causal if not given, as in the models.

        Raises:
            TypeError: for other modules, and projections other than plain ``nn.Linear``.
            ValueError: as `RotaryEmbedding.from_config`.

        Example:
            >>> import torch, qkv
            >>> from transformers import DeepseekV3Config
            >>> from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
            >>> layer = qkv.LatentAttention.from_transformers(DeepseekV3Attention(DeepseekV3Config(hidden_size=64), 0))
            >>> layer.kv_rank, layer.nope_dim, layer.rope_dim, layer.value_dim
            (512, 128, 64, 128)
        """
        layer = cls(**{**deepseek.options(module), **options})
        layer.load_state_dict(deepseek.state(module, layer))
        return layer.train(module.training)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, kv_rank={self.kv_rank}, nope_dim={self.nope_dim}, "
            f"rope_dim={self.rope_dim}, value_dim={self.value_dim}, q_rank={self.q_rank}, mask={self.mask!r}"
        )


def _normed(norm: HeadNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.forward(x)
