"""`Attention`: one layer for every mechanism of the family."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import ParamSpec, Self

from qkv import functional
from qkv.arguments import require_count, require_finite, require_flag, require_positive, require_probability
from qkv.cache import Cache, CrossKVCache, Int8Keys, Keys, Owner
from qkv.layers import torch_mha
from qkv.layers.arguments import (
    require_backend,
    require_like_weights,
    require_mask,
    require_rotary,
    vector,
    wrong_input,
)
from qkv.layers.jagged import Sequences, nested_like, require_jagged, sequences_of
from qkv.layers.projection import project
from qkv.layers.rotary import RotaryEmbedding
from qkv.masks import FULL, Mask
from qkv.scores import ScoreOptions

_Arguments = ParamSpec("_Arguments")


class HeadNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the dtype of its input: autocast lowers queries and keys, not gains."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Inputs(NamedTuple):
    """What a layer hands to `qkv.attention`."""

    q: Tensor
    keys: Keys | Int8Keys
    mask: Mask


def _whole_or_not(call: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """A call that fails, for a mask that does not fit or an interrupt, leaves no tokens in its cache unanswered."""

    @functools.wraps(call)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        cache = kwargs.get("cache")
        if not isinstance(cache, Cache):
            return call(*args, **kwargs)
        mark = cache.mark()
        try:
            return call(*args, **kwargs)
        except BaseException:
            cache.restore(mark)
            raise

    return guarded


class Attention(nn.Module):
    """Attention with learned projections: ``out_proj(concat_h softmax(scale * q_h @ k_g.mT) @ v_g)``.

    Three independent choices make it any mechanism of the family: where keys and values come from (``context_dim``,
    ``cache``), which keys a query may see (``mask``), how many key/value heads there are (``num_kv_heads``). The named
    layers narrow the constructor and share every line of the forward pass, and their state dicts are the same.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, a divisor of num_heads; num_heads (multi-head) if None.
        head_dim: width of a query and a key, ``embed_dim / num_heads`` if None.
        value_dim: width of a value, head_dim if None.
        context_dim: width of the second sequence that keys and values come from; self-attention if None.
        mask: which keys a query may see.
        rotary: rotates queries and keys by their position. Self-attention only.
        qk_norm: normalises each query and key to unit root mean square, with learned gains ``q_norm`` and ``k_norm``.
        bias: whether q_proj, k_proj and v_proj have one.
        out_bias: whether out_proj has one; as ``bias`` if None.
        scale: factor of the scores, ``1 / sqrt(head_dim)`` if None.
        softcap: as in `qkv.attention`.
        sink_logits: whether each head learns a sink logit, at first 0.
        alibi: ``(num_heads,)`` slopes, as in `qkv.attention`: numbers, which stay as they are given.
        dropout: of the weights, while training.
        backend: as in `qkv.attention`.
        device, dtype: of the parameters.

    Parameters are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, each a ``nn.Linear``; then ``q_norm``,
    ``k_norm`` and ``sink_logits`` where asked for. Weights start as Xavier-uniform, biases as 0.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for sizes that do not fit together, and numbers that mean nothing.

    Example:
        >>> import torch, qkv
        >>> layer = qkv.Attention(64, 8, num_kv_heads=2, mask=qkv.Mask.causal(), rotary=qkv.RotaryEmbedding(8))
        >>> cache = qkv.KVCache()
        >>> prompt = layer(torch.randn(1, 5, 64), cache=cache)
        >>> step = layer(torch.randn(1, 1, 64), cache=cache)
        >>> step.shape, cache.length
        (torch.Size([1, 1, 64]), 6)

    Source: Vaswani et al. 2017, section 3.2.2; Shazeer 2019; Ainslie et al. 2023. `from_torch` and `to_torch` convert
    from and to ``nn.MultiheadAttention``, which returns a tuple, takes masks with True for *ignore*, and has
    the sequence first unless told otherwise.
    """

    sink_logits: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        mask: Mask = FULL,
        rotary: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        out_bias: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: bool = False,
        alibi: Tensor | Sequence[float] | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_count(caller, "embed_dim", embed_dim)
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            require_count(caller, name, count, least=0)
        for name, width in (("head_dim", head_dim), ("value_dim", value_dim), ("context_dim", context_dim)):
            if width is not None:
                require_count(caller, name, width)
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{caller}: num_heads must be a multiple of num_kv_heads, both at least 1; "
                f"got num_heads={num_heads} and num_kv_heads={num_kv_heads}."
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"{caller}: embed_dim must be a multiple of num_heads unless head_dim is given; "
                    f"got embed_dim={embed_dim} and num_heads={num_heads}."
                )
            head_dim = embed_dim // num_heads
        require_mask(caller, mask)
        out_bias = bias if out_bias is None else out_bias
        for name, flag in (("qk_norm", qk_norm), ("bias", bias), ("out_bias", out_bias), ("sink_logits", sink_logits)):
            require_flag(caller, name, flag)
        if rotary is not None:
            require_rotary(caller, rotary, head_dim)
            if context_dim is not None:
                raise ValueError(f"{caller}: rotary has no meaning between two sequences; give rotary or context_dim.")
        if scale is not None:
            require_finite(caller, "scale", scale, otherwise=", or None for 1 / sqrt(head_dim)")
        if softcap is not None:
            require_positive(caller, "softcap", softcap, otherwise=" or None")
        require_probability(caller, "dropout", dropout)
        require_backend(caller, backend)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.context_dim = context_dim
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.dropout = dropout
        self.backend = backend
        self._owner = Owner(f"{caller}({embed_dim}, num_heads={num_heads})")

        source_dim = embed_dim if context_dim is None else context_dim

        def linear(rows: int, columns: int, bias: bool) -> nn.Linear:
            return nn.Linear(rows, columns, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(source_dim, num_kv_heads * head_dim, bias)
        self.v_proj = linear(source_dim, num_kv_heads * self.value_dim, bias)
        self.out_proj = linear(num_heads * self.value_dim, embed_dim, out_bias)
        self.rotary = rotary
        self.q_norm = HeadNorm(head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = HeadNorm(head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        # What is absent is a plain attribute: looking up a registered None costs a microsecond at each call.
        self.sink_logits = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if sink_logits else None
        self.alibi = alibi
        self.reset_parameters()

    @property
    def alibi(self) -> Tensor | None:
        """``(num_heads,)`` slopes, on the CPU; None where there are none."""
        return None if self._slopes is None else self._slopes.on(torch.device("cpu")).clone()

    @alibi.setter
    def alibi(self, slopes: Tensor | Sequence[float] | None) -> None:
        what = "one a query head"
        self._slopes = None if slopes is None else vector(type(self).__name__, "alibi", slopes, self.num_heads, what)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as when the layer was built; after ``to_empty``, they hold nothing before."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    @_whole_or_not
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Attends from every token of x.

        Args:
            x: ``(B, Lq, embed_dim)``.
            context: ``(B, Lk, context_dim)``, for a layer with a context_dim; not needed once ``cache`` holds it.
            mask: further restricts the mask of the layer; tensors in it count all keys so far.
            cache: keys and values of earlier calls of this layer, to which this call adds its own. A call that fails
                adds nothing.

        Returns:
            ``(B, Lq, embed_dim)``.

        Raises:
            ValueError: for inputs of other widths, dtypes and devices, a missing or unexpected context, and whatever
                `qkv.attention` and the cache raise.
            TypeError: for inputs that are no tensors, and a mask or a cache of the wrong kind.
        """
        if _is_nested(x) or _is_nested(context):
            return self._forward_jagged(x, context, mask, cache)
        q, keys, mask = self._inputs(x, context, mask, cache)
        return self._joined(self._attend(q, keys.k, keys.v, mask=mask, **keys.options()))

    @_whole_or_not
    def attention_weights(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The weights ``(B, num_heads, Lq, Lk)`` with which `forward` would sum the values. Arguments as there."""
        if _is_nested(x) or _is_nested(context):
            raise ValueError(
                f"{type(self).__name__}: attention_weights takes no nested tensors; call it for each sequence, "
                "as (1, L, E), or on a padded batch with mask=Mask.padding(lengths)."
            )
        q, keys, mask = self._inputs(x, context, mask, cache)
        return functional.attention_weights(q, keys.k, mask=mask, **self._scores(q), **keys.options())

    def _forward_jagged(self, x: Tensor, context: Tensor | None, mask: Mask | None, cache: Cache | None) -> Tensor:
        """`forward` over sequences of different lengths, each for itself: padding is not projected."""
        caller = type(self).__name__
        mask = self.mask if mask is None else self.mask & require_mask(caller, mask)
        if cache is not None or mask.has_tensors:
            given = "a cache" if cache is not None else repr(mask)
            raise ValueError(
                f"{caller}: with nested tensors, masks are bands as Mask.causal() and there is no cache; got {given}. "
                "Call it for each sequence, or on x.to_padded_tensor(0.0) with mask=Mask.padding(lengths)."
            )
        require_jagged(caller, "x", x, self.embed_dim)
        mine = theirs = sequences_of(x)
        if self.context_dim is None:
            self._refuse_context(context)
        else:
            theirs = self._sequences_of_context(mine, context, mask)
        try:
            q = self._heads(project(self.q_proj, mine.values), self.head_dim, self.q_norm)
            k, v = self._keys(theirs.values)
        except RuntimeError as error:
            self._explain(error, x, context)
            raise
        if self.rotary is not None:
            q, k = self.rotary(q, mine.offset), self.rotary(k, mine.offset)
        if theirs is mine and not mask.sink_tokens:
            out = self._attend(q, k, v, mask=mask & mine.own, offset=0)
        else:  # the first keys of each sequence are sinks, not the first of all
            padded = mine.pad(q), theirs.pad(k), theirs.pad(v)
            out = mine.pack(self._attend(*padded, mask=mask & Mask.padding(theirs.lengths), offset=0))
        return nested_like(x, self._joined(out))

    def _sequences_of_context(self, mine: Sequences, context: Tensor | None, mask: Mask) -> Sequences:
        caller = type(self).__name__
        require_jagged(caller, "context", context, self.context_dim)
        if mask.is_positional or self._slopes is not None:
            raise ValueError(
                f"{caller}: {repr(mask) if mask.is_positional else 'alibi'} depends on where queries stand among the "
                "keys of a context, which nested tensors do not say. Call qkv.attention for each sequence, with "
                "offset=."
            )
        assert context is not None
        theirs = sequences_of(context)
        if len(theirs.lengths) != len(mine.lengths):
            raise ValueError(
                f"{caller}: context must have a sequence for each of the {len(mine.lengths)} of x; "
                f"got {len(theirs.lengths)}."
            )
        return theirs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        return functional.attention(q, k, v, backend=self.backend, **self._scores(q), **where)

    def _scores(self, q: Tensor) -> ScoreOptions:
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "alibi": None if self._slopes is None else self._slopes.on(q.device),
            "sink_logits": self.sink_logits,
            "dropout": self.dropout if self.training else 0.0,
        }

    def _joined(self, out: Tensor) -> Tensor:
        """What all heads found, (B, H, L, value_dim), as (B, L, embed_dim)."""
        return project(self.out_proj, out.transpose(1, 2).flatten(2))

    def _inputs(self, x: Tensor, context: Tensor | None, mask: Mask | None, cache: Cache | None) -> _Inputs:
        caller = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise wrong_input(caller, "x", x, f"(B, L, {self.embed_dim})")
        mask = self.mask if mask is None else self.mask & require_mask(caller, mask)
        try:
            q = self._heads(project(self.q_proj, x), self.head_dim, self.q_norm)
            if self.context_dim is None:
                return self._self_inputs(x, q, context, mask, cache)
            return self._cross_inputs(x, q, context, mask, cache)
        except RuntimeError as error:
            self._explain(error, x, context)
            raise

    def _explain(self, error: RuntimeError, x: Tensor, context: Tensor | None) -> None:
        """Raises what says more than torch's error, where inputs are unlike the weights. Asking first has a price."""
        caller = type(self).__name__
        require_like_weights(caller, "x", x, self.q_proj, error)
        if context is not None:
            require_like_weights(caller, "context", context, self.k_proj, error)

    def _self_inputs(self, x: Tensor, q: Tensor, context: Tensor | None, mask: Mask, cache: Cache | None) -> _Inputs:
        caller = type(self).__name__
        self._refuse_context(context)
        if cache is None:
            k, v = self._keys(x)
            if self.rotary is not None:
                q, k = self.rotary(q), self.rotary(k)
            return _Inputs(q, Keys(k, v, 0), mask)
        if not isinstance(cache, Cache) or isinstance(cache, CrossKVCache):
            raise TypeError(
                f"{caller}: cache must be a KVCache or SlidingKVCache in self-attention; got a {type(cache).__name__}."
            )
        cache.admit(self._owner, mask)
        k, v = self._keys(x)
        if self.rotary is not None:
            position = cache.length
            q, k = self.rotary(q, position), self.rotary(k, position)
        keys = cache.append(k, v)
        return _Inputs(q, keys, cache.restrict(mask))

    def _refuse_context(self, context: Tensor | None) -> None:
        if context is not None:
            got = type(context).__name__
            if isinstance(context, Tensor):
                got = "a nested tensor" if context.is_nested else f"one of shape {tuple(context.shape)}"
            raise ValueError(
                f"{type(self).__name__}: it attends to its own input and takes no context; got {got}. "
                "Build it with context_dim=, or use CrossAttention. A mask is given by name, mask=."
            )

    def _cross_inputs(self, x: Tensor, q: Tensor, context: Tensor | None, mask: Mask, cache: Cache | None) -> _Inputs:
        caller = type(self).__name__
        if cache is not None and not isinstance(cache, CrossKVCache):
            raise TypeError(f"{caller}: cache must be a CrossKVCache in cross-attention; got {type(cache).__name__}.")
        held = 0 if cache is None else cache.length
        if context is None:
            if cache is None or not held:
                raise ValueError(
                    f"{caller}: context must be given, (B, Lk, {self.context_dim}), or a CrossKVCache that holds one."
                )
            cache.admit(self._owner, mask)
            return _Inputs(q, cache.keys(), mask)
        sizes = (context.shape[0], context.shape[2]) if isinstance(context, Tensor) and context.dim() == 3 else ()
        if sizes != (x.shape[0], self.context_dim):
            raise wrong_input(caller, "context", context, f"({x.shape[0]}, Lk, {self.context_dim})")
        if cache is None:
            k, v = self._keys(context)
            return _Inputs(q, Keys(k, v, None), mask)
        cache.admit(self._owner, mask)
        if held:
            cache.require(context)
            return _Inputs(q, cache.keys(), mask)
        keys = cache.append(*self._keys(context))
        cache.remember(context)
        return _Inputs(q, keys, mask)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        k = self._heads(project(self.k_proj, source), self.head_dim, self.k_norm)
        return k, self._heads(project(self.v_proj, source), self.value_dim, None)

    @staticmethod
    def _heads(x: Tensor, width: int, norm: HeadNorm | None) -> Tensor:
        """(B, L, heads * width) to (B, heads, L, width), as a view. In tensor parallelism, heads are a rank's own."""
        x = x.view(*x.shape[:2], x.shape[2] // width, width).transpose(1, 2)
        return x if norm is None else norm(x)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> Self:
        """The layer that computes what ``module`` does, given batch-first inputs, with its weights copied.

        Args:
            module: one with equal kdim and vdim. Where these differ from its embed_dim, the layer is
                cross-attention; otherwise call it on a ``CrossAttention`` for that.
            **options: of the layer, beyond those that the module has: ``mask``, ``window``, ...

        Raises:
            ValueError: for unequal kdim and vdim, add_bias_kv, add_zero_attn, and a layer with fewer KV heads.

        Example:
            >>> import torch, qkv
            >>> theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            >>> ours, x = qkv.MultiHeadAttention.from_torch(theirs), torch.randn(1, 5, 16)
            >>> torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)
            True
        """
        layer = cls(**{**torch_mha.options(module), **options})
        if layer.num_kv_heads != layer.num_heads:
            raise ValueError(
                f"from_torch: the module has keys and values for each of its {layer.num_heads} heads, "
                f"{cls.__name__} for {layer.num_kv_heads}; pooling them changes what is computed."
            )
        layer.load_state_dict(torch_mha.state(module))
        return layer.train(module.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """The batch-first ``nn.MultiheadAttention`` that computes what this layer does, with its weights copied.

        Keys and values are repeated for each query head of a group, since the module has no groups.

        Raises:
            ValueError: for a layer with anything that the module cannot express, listing all of it.

        Example:
            >>> import torch, qkv
            >>> ours, x = qkv.GroupedQueryAttention(16, 4, 2), torch.randn(1, 5, 16)
            >>> torch.allclose(ours.to_torch()(x, x, x)[0], ours(x), atol=1e-6)
            True
        """
        return torch_mha.build(self)

    def options(self) -> dict[str, Any]:
        """The arguments with which `Attention` builds a layer like this one, parameters apart."""
        weight = self.q_proj.weight
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "context_dim": self.context_dim,
            "mask": self.mask,
            "rotary": self.rotary,
            "qk_norm": self.q_norm is not None,
            "bias": self.q_proj.bias is not None,
            "out_bias": self.out_proj.bias is not None,
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_logits": self.sink_logits is not None,
            "alibi": self.alibi,
            "dropout": self.dropout,
            "backend": self.backend,
            "device": weight.device,
            "dtype": weight.dtype,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, context_dim={self.context_dim}, mask={self.mask!r}"
        )


def _is_nested(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_nested
