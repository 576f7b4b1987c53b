"""`Attention`: one layer for all mechanisms."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Never, Self, Unpack

from qkv import functional
from qkv.arguments import require_count, require_finite, require_flag, require_positive, require_probability
from qkv.cache import (
    Cache,
    Caches,
    CrossKVCache,
    Int8KVCache,
    Keys,
    KVCache,
    LatentKVCache,
    Owner,
    SlidingKVCache,
)
from qkv.cache.int8 import Dtype, format_of
from qkv.layer_record import LayerRecord, record_call
from qkv.layers import torch_mha, transformers_modules
from qkv.layers.arguments import (
    input_error,
    require_backend,
    require_dtype,
    require_like_weights,
    require_mask,
    require_position_bias,
    require_rotary,
    require_vector,
)
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
from qkv.layers.head_share import HeadShare, share_heads
from qkv.layers.jagged import PackedTokens, nested_like, pack_jagged, require_jagged
from qkv.layers.options import Arguments, ConversionOptions
from qkv.layers.over_ranks import attend_over_ranks, layout_for, mask_over_ranks, options_over_ranks
from qkv.layers.packed import unpack_state
from qkv.layers.projection import PROJECTIONS, project
from qkv.layers.rotary import RotaryEmbedding, rotate_both
from qkv.layers.step import Way, layer_step, weights_of
from qkv.layers.torch_arguments import answer_calls_of_torch, refuse_unknown_options
from qkv.layers.transformers_modules import Converted
from qkv.masks import Mask
from qkv.parallel.context import Mark, Over
from qkv.parallel.sharded_cache import ShardedKVCache
from qkv.parallel.tokens import Tokens, Whole
from qkv.scores import ScoreOptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Attention(OperatorLayer):
    """Attention with learned projections: ``out_proj(concat_h softmax(scale * q_h @ k_g.mT) @ v_g)``.

    Three independent choices make it any of the mechanisms: where keys and values come from (``context_dim``,
    ``cache``), which keys a query may see (``mask``), how many key/value heads there are (``num_kv_heads``). The named
    layers fix some of the arguments; forward pass and state dict are the same.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, a divisor of num_heads; num_heads (multi-head) if None.
        head_dim: width of a query and a key, ``embed_dim / num_heads`` if None.
        value_dim: width of a value, head_dim if None.
        context_dim: width of the second sequence that keys and values come from; self-attention if None.
        mask: which keys a query may see; all if None.
        rotary: rotates queries and keys by their position. Self-attention only.
        position_bias: module that adds a learned bias to the scores by relative position. Called as
            ``position_bias(lq, lk, offset)``, it returns ``(B or 1, num_heads, lq, lk)``; layers may share one.
        qk_norm: normalises each query and key to unit root mean square, with learned gains ``q_norm`` and ``k_norm``.
        qk_norm_eps: added to the mean square there.
        gate: multiplies each channel of the heads' outputs by ``sigmoid(gate_proj(x))``, before out_proj (Qwen3-Next).
        bias: whether q_proj, k_proj, v_proj and gate_proj have a bias.
        out_bias: whether out_proj has a bias; as ``bias`` if None.
        scale: factor of the scores, ``1 / sqrt(head_dim)`` if None.
        softcap: as in `qkv.attention`.
        sink_logits: whether each head has a learned sink logit, initialised to 0.
        alibi: ``(num_heads,)`` slopes, as in `qkv.attention`; constants, not learned.
        dropout: probability of dropping a weight, in training.
        backend: as in `qkv.attention`.
        device, dtype: of the parameters.

    Parameters are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, each a ``nn.Linear``; then ``gate_proj``,
    ``q_norm``, ``k_norm`` and ``sink_logits`` if enabled. Weights are initialised Xavier-uniform, biases to 0.
    ``load_state_dict`` also takes ``in_proj_weight``, ``Wqkv`` and, with an ``o_proj``, ``qkv_proj``: the rows of
    queries, then keys, then values.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for sizes that do not fit together, and numbers out of range.

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
    the sequence first unless ``batch_first=True``.
    """

    _fixed: ClassVar[tuple[str, ...]] = ()
    """Arguments that the constructor of a named layer does not take."""

    sink_logits: Tensor | None

    _share: HeadShare | None = None
    """the rank's heads, where `qkv.parallel.Heads` has given them out"""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        mask: Mask | None = None,
        rotary: RotaryEmbedding | None = None,
        position_bias: nn.Module | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        gate: bool = False,
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
        **unknown: Never,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        refuse_unknown_options(caller, unknown, Arguments.__annotations__)
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
        mask = require_mask(caller, mask)
        out_bias = bias if out_bias is None else out_bias
        flags = {"qk_norm": qk_norm, "gate": gate, "bias": bias, "out_bias": out_bias, "sink_logits": sink_logits}
        for name, flag in flags.items():
            require_flag(caller, name, flag)
        require_positive(caller, "qk_norm_eps", qk_norm_eps)
        if rotary is not None:
            require_rotary(caller, rotary, head_dim, context_dim)
        if position_bias is not None:
            require_position_bias(caller, position_bias)
        if scale is not None:
            require_finite(caller, "scale", scale, suffix=", or None for 1 / sqrt(head_dim)")
        if softcap is not None:
            require_positive(caller, "softcap", softcap, suffix=" or None")
        require_probability(caller, "dropout", dropout)
        require_backend(caller, backend)
        require_dtype(caller, dtype)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.context_dim = context_dim
        self.mask = mask
        self.qk_norm_eps = qk_norm_eps
        self.scale = scale
        self.softcap = softcap
        self.dropout = dropout
        self.backend = backend
        self._owner = Owner(f"{caller}({embed_dim}, num_heads={num_heads})")

        source_dim = embed_dim if context_dim is None else context_dim

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(source_dim, num_kv_heads * head_dim, bias)
        self.v_proj = linear(source_dim, num_kv_heads * self.value_dim, bias)
        self.out_proj = linear(num_heads * self.value_dim, embed_dim, out_bias)
        self.gate_proj = linear(embed_dim, num_heads * self.value_dim, bias) if gate else None
        self.rotary = rotary
        self.position_bias = position_bias
        self.q_norm = HeadNorm(head_dim, eps=qk_norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = HeadNorm(head_dim, eps=qk_norm_eps, device=device, dtype=dtype) if qk_norm else None
        # None is a plain attribute: looking up a registered parameter costs a microsecond per call.
        self.sink_logits = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if sink_logits else None
        self.alibi = alibi
        self.reset_parameters()

    @property
    def alibi(self) -> Tensor | None:
        """``(num_heads,)`` slopes, on the CPU; None without ALiBi."""
        return None if self._slopes is None else self._slopes.on(torch.device("cpu")).clone()

    @alibi.setter
    def alibi(self, slopes: Tensor | Sequence[float] | None) -> None:
        what = "one per query head"
        self._slopes = (
            None if slopes is None else require_vector(type(self).__name__, "alibi", slopes, self.num_heads, what)
        )

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        with self._whole_parameters():
            for projection in filter(None, (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.gate_proj)):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            for norm in (self.q_norm, self.k_norm):
                if norm is not None:
                    norm.reset_parameters()
            if self.sink_logits is not None:
                nn.init.zeros_(self.sink_logits)

    def _whole_parameters(self) -> AbstractContextManager[None]:
        """A context in which parameters are those of all ranks, to be written."""
        return nullcontext() if self._share is None else self._share.whole(self)

    def _share_heads(self, mesh: "DeviceMesh", source: int | None) -> None:
        """Leaves a rank its part of the heads: see `qkv.parallel.Heads`, which calls it."""
        self._share = share_heads(self, mesh, source)

    @answer_calls_of_torch
    @restore_cache_on_error
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | Caches | None = None,
        tokens: Tokens | None = None,
        context_tokens: Tokens | Whole | None = None,
    ) -> Tensor:
        """Attention with the tokens of x as queries.

        Args:
            x: ``(B, Lq, embed_dim)``.
            context: ``(B, Lk, context_dim)``, for a layer with a context_dim; optional if ``cache`` contains it.
            mask: combined with the mask of the layer by ``&``; its tensors cover all keys, cached ones included.
            bias: added to the scores, broadcastable to ``(B, num_heads, Lq, Lk)``, cached keys included.
            positions: integers ``(Lq,)`` or ``(B, Lq)`` by which rotary rotates, or more dimensions if it takes them.
                By default tokens are counted, cached ones included. Masks and biases count in any case.
            cache: keys and values of earlier calls of this layer, to which this call appends its own, apart from
                padding; or the `Caches` of a model, of which the layer finds its own. A call that fails appends
                nothing.
            tokens: which tokens x has, in a call over ranks: see `qkv.parallel.attention`. Masks, biases and padding
                are of all tokens then, positions of those of x; a cache is a new KVCache, for `CrossLayerAttention`.
            context_tokens: which tokens ``context`` has; ``parallel.WHOLE`` if all.

        Returns:
            ``(B, Lq, embed_dim)``.

        Raises:
            ValueError: for inputs of another width, dtype or device, a missing or unexpected context, positions
                without rotary, and as `qkv.attention` and the cache.
            TypeError: for inputs that are not tensors, and a mask or a cache of the wrong kind.
        """
        if self._share is not None:
            x, context, bias = self._share.enter(x, context, bias)
        if _is_nested(x) or _is_nested(context):
            self._refuse_with_nested(bias=bias, positions=positions)
            return self._forward_jagged(x, context, mask, cache)
        layout = layout_for(self, tokens, context_tokens)
        if layout is not None:
            return self._forward_over_ranks(x, context, layout, mask, bias, positions, cache)
        options = call_options(self, mask, bias, positions, cache)
        out = layer_step(self, x, context, options)
        return self._project_out(self._attend(self._inputs(x, context, options)), x) if out is None else out

    if TYPE_CHECKING:  # that of `nn.Module` takes any arguments
        __call__ = forward

    @answer_calls_of_torch
    @restore_cache_on_error
    def attention_weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | Caches | None = None,
    ) -> Tensor:
        """The softmax weights ``(B, num_heads, Lq, Lk)`` of `forward`, which takes the same arguments.

        With a cache whose rows differ in length, key j of a row is its j-th token, padding not counted.
        """
        if _is_nested(x) or _is_nested(context):
            raise ValueError(
                f"{type(self).__name__}: attention_weights takes no nested tensors; call it for each sequence, "
                "(1, L, E), or on a padded batch with mask=Mask.padding(lengths)."
            )
        if self._share is not None:
            x, context, bias = self._share.enter(x, context, bias)
        weights = self._weights(self._inputs(x, context, call_options(self, mask, bias, positions, cache)))
        return weights if self._share is None else self._share.join(weights)

    @torch.no_grad()
    def record(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        windows: Sequence[int] = (),
        sink_tokens: int = 0,
        blocks: int = 64,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> LayerRecord:
        """What `forward` attends to, in the numbers of `qkv.look`, in memory linear in the length.

        Args:
            x, context, mask, bias, positions: as in `forward`.
            windows: numbers of keys that queries would see at most, their own and those before, as in
                `look.window_cut`; as many to each side where queries see later keys. Without effect with a context.
            sink_tokens: number of first keys that these windows show too; also those that are counted as sinks, of
                which there is one at least.
            blocks: of `look.block_map`.

        Raises:
            TypeError, ValueError: as `forward`, and for windows that are not counts, or hide nothing.

        Example:
            >>> import torch, qkv
            >>> found = qkv.CausalAttention(16, 2).record(torch.randn(1, 40, 16), windows=[8])
            >>> found.cut.mass.shape, found.window
            (torch.Size([1, 1, 2, 40]), None)
        """
        if _is_nested(x) or _is_nested(context):
            raise ValueError(f"{type(self).__name__}: record takes no nested tensors; call it for each sequence.")
        if self._share is not None:
            raise ValueError(
                f"{type(self).__name__}: record is of layers that have all of their heads; got one whose heads are "
                "over ranks by parallel.Heads. Call it on the whole layer, before."
            )
        given = self._inputs(x, context, call_options(self, mask, bias, positions, None))
        q, keys, mask, bias, _ = given if self.position_bias is None else self._add_position_bias(given)
        options = {"mask": mask, **self._scores(q, bias), **keys.options()}
        is_cross = context is not None
        return record_call(type(self).__name__, is_cross, (q, keys.k, keys.v, options), windows, sink_tokens, blocks)

    def explain(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | Caches | None = None,
    ) -> Way:
        """How `forward`, which takes the same arguments, would compute a call, and why. Nothing is computed or changed.

        Few tokens without gradients take one call of the kernel; others call the projections, rotary, cache and
        `qkv.attention` one after the other, and `qkv.explain` tells which backend that takes.

        Raises:
            TypeError, ValueError: for an x of another type or shape, and a mask or cache of the wrong kind.

        Example:
            >>> import torch, qkv
            >>> layer, x = qkv.CausalAttention(16, 2).requires_grad_(False), torch.randn(1, 20, 16)
            >>> print(layer.explain(x[:, :3]))
            one call of the kernel
            >>> print(layer.explain(x))
            composed: x has not 1 to 16 tokens
        """
        if not isinstance(x, Tensor) or (not x.is_nested and (x.dim() != 3 or x.shape[2] != self.embed_dim)):
            raise input_error(type(self).__name__, "x", x, f"(B, L, {self.embed_dim})")
        if cache is not None and not isinstance(cache, (Cache, Caches)):
            raise TypeError(f"{type(self).__name__}: cache must be a cache of qkv or None; got {type(cache).__name__}.")
        given = cache.of(self._owner) if isinstance(cache, Caches) else cache
        found = weights_of(self, x, context, call_options(self, mask, bias, positions, given))
        return Way(False, found) if isinstance(found, str) else Way(True, "")

    def make_cache(self, capacity: int | None = None, dtype: Dtype = None) -> Cache:
        """The cache that the layer needs to decode, as `Caches.for_model` makes it.

        A `CrossKVCache` for a layer with a context, a `SlidingKVCache` for one whose mask has a window shorter than
        ``capacity``, and otherwise a `KVCache`, or an `Int8KVCache`. All keys are kept as well where a sliding cache
        would change what is counted: by chunks and prefixes, and by ALiBi or a position bias with sink tokens.

        Args:
            capacity: as in `KVCache`.
            dtype: ``torch.int8`` or ``"int8"`` for keys in int8, those of a context apart; None for their own dtype.

        Raises:
            ValueError: for another dtype.
        """
        kept = format_of(type(self).__name__, dtype).dtype
        if self.context_dim is not None:
            return CrossKVCache()
        mask, lookback = self.mask, self.mask.lookback
        has_distances = self._slopes is not None or self.position_bias is not None
        counts_keys = mask.counts_from_first_key or (mask.sink_tokens and has_distances)
        if lookback is not None and not counts_keys and (capacity is None or capacity > lookback + 1):
            return SlidingKVCache(lookback + 1, mask.sink_tokens, dtype=kept)
        return KVCache(capacity) if kept is None else Int8KVCache(capacity)

    def _forward_over_ranks(
        self,
        x: Tensor,
        context: Tensor | None,
        layout: Over,
        mask: Mask | None,
        bias: Tensor | None,
        positions: Tensor | None,
        cache: Cache | Caches | None,
    ) -> Tensor:
        """`forward` of the tokens of one rank."""
        caller = type(self).__name__
        if self.context_dim is not None and layout.context_tokens is None:
            raise ValueError(
                f"{caller}: context_tokens must say which tokens of the context this rank has; got None. Use "
                "Tokens.even(length, mesh), or parallel.WHOLE if each rank has all of it."
            )
        if self.context_dim is None and layout.context_tokens is not None and vars(self).get(Mark.NAME) is None:
            raise ValueError(f"{caller}: context_tokens must be None in self-attention; got {layout.context_tokens}.")
        options = options_over_ranks(self, x, layout, positions, cache)
        mask = mask_over_ranks(self, mask, layout)
        shards = cache if isinstance(cache, ShardedKVCache) else None
        if shards is not None:
            shards.admit(self._owner, mask)
        elif isinstance(cache, Cache):
            count = x.shape[1] if self.k_proj is None else 0  # with the keys of another layer, or none yet
            if cache.columns != count:
                raise ValueError(
                    f"{caller}: cache must have {count} tokens before this call over ranks: be new, or have the keys "
                    f"of x from the layer that is read; got one of {cache.columns}."
                )
        inputs = self._inputs(x, context, options)
        if shards is not None:
            shards.fill(inputs.keys.k, inputs.keys.v, layout.tokens)
        elif isinstance(cache, Cache):
            cache.is_of_one_rank = True
        out = self._attend(Inputs(inputs.q, inputs.keys, mask, bias, layout))
        return self._project_out(out, x)

    def _refuse_with_nested(self, **options: Tensor | None) -> None:
        """Raises ValueError for options that nested tensors do not have."""
        for name, value in options.items():
            if value is not None:
                raise ValueError(
                    f"{type(self).__name__}: with nested tensors, {name} must be None. Call it for each sequence, or "
                    "on x.to_padded_tensor(0.0) with mask=Mask.padding(lengths)."
                )

    def _forward_jagged(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, cache: Cache | Caches | None
    ) -> Tensor:
        """`forward` of each sequence of a nested tensor, without projecting padding."""
        caller = type(self).__name__
        mask = self.mask if mask is None else self.mask & require_mask(caller, mask)
        if mask.has_tensors or (cache is not None and self.context_dim is not None):
            given = repr(mask) if mask.has_tensors else "a cache of a context"
            raise ValueError(
                f"{caller}: with nested tensors, the mask must be a band, such as Mask.causal(), and cross-attention "
                f"takes no cache; got {given}. Call it for each sequence, or on x.to_padded_tensor(0.0) with "
                "mask=Mask.padding(lengths)."
            )
        require_jagged(caller, "x", x, self.embed_dim)
        queries = keys = pack_jagged(x)
        if self.context_dim is None:
            self._refuse_context(context)
            if cache is not None:
                return nested_like(x, self._forward_packed(queries, mask, cache))
        else:
            keys = self._pack_context(queries, context, mask)
        try:
            q = self._split_heads(project(self.q_proj, queries.values), self.head_dim, self.q_norm)
            k, v = self._keys(keys.values)
        except RuntimeError as error:
            self._raise_input_error(error, x, context)
            raise
        if self.rotary is not None:
            where = {"positions": queries.positions, "length": queries.lengths[queries.rows]}
            q, k = rotate_both(self.rotary, q, k, where)
        if keys is queries and mask.is_relative and self.position_bias is None:
            out = self._attend(Inputs(q, Keys(k, v, 0), mask & queries.document_mask, None))
        else:  # sinks, chunks and relative positions count in each sequence
            padded = Inputs(queries.pad(q), Keys(keys.pad(k), keys.pad(v), 0), mask & Mask.padding(keys.lengths), None)
            out = queries.pack(self._attend(padded))
        return nested_like(x, self._project_out(out, queries.values))

    def _forward_packed(self, tokens: PackedTokens, mask: Mask, cache: Cache | Caches) -> Tensor:
        """`forward` of sequences as rows of a padded batch, whose padding the cache drops: ``(1, T, embed_dim)``."""
        padded = tokens.pad(tokens.values[:, None]).squeeze(1)
        keep = torch.arange(tokens.longest, device=padded.device) < tokens.lengths[:, None]
        out = self.forward(padded, mask=mask & Mask.padding(keep), cache=cache)
        return tokens.pack(out[:, None]).squeeze(1)

    def _pack_context(self, queries: PackedTokens, context: Tensor | None, mask: Mask) -> PackedTokens:
        """The packed context of a nested tensor of queries. Raises for masks that depend on positions."""
        caller = type(self).__name__
        require_jagged(caller, "context", context, self.context_dim)
        if mask.is_positional or self._slopes is not None:
            raise ValueError(
                f"{caller}: {repr(mask) if mask.is_positional else 'alibi'} depends on the positions of queries among "
                "the keys of a context, which nested tensors do not have. Call qkv.attention for each sequence, with "
                "offset=."
            )
        assert context is not None
        keys = pack_jagged(context)
        if len(keys.lengths) != len(queries.lengths):
            raise ValueError(
                f"{caller}: context must have a sequence for each of the {len(queries.lengths)} of x; "
                f"got {len(keys.lengths)}."
            )
        return keys

    def _attend(self, inputs: Inputs) -> Tensor:
        """`qkv.attention` with the options of the layer."""
        self._require_heads(inputs.q, inputs.keys.k)
        if inputs.layout is not None:
            return attend_over_ranks(self, inputs)
        q, keys, mask, bias, _ = inputs if self.position_bias is None else self._add_position_bias(inputs)
        scores = self._scores(q, bias)
        if keys.shards is not None:
            return keys.shards.attend(q, keys, mask, scores, self.backend)
        return functional.attention(q, keys.k, keys.v, mask=mask, backend=self.backend, **scores, **keys.options())

    def _weights(self, inputs: Inputs) -> Tensor:
        """`qkv.attention_weights` with the options of the layer."""
        self._require_heads(inputs.q, inputs.keys.k)
        if inputs.keys.shards is not None:
            raise ValueError(
                f"{type(self).__name__}: attention_weights is of caches that have all keys; got one with those of a "
                "rank. Call it with another cache."
            )
        q, keys, mask, bias, _ = inputs if self.position_bias is None else self._add_position_bias(inputs)
        return functional.attention_weights(q, keys.k, mask=mask, **self._scores(q, bias), **keys.options())

    def _scores(self, q: Tensor, bias: Tensor | None) -> ScoreOptions:
        """The score options of the layer, as keywords of `qkv.attention`."""
        scores: ScoreOptions = {
            "scale": self.scale,
            "softcap": self.softcap,
            "bias": bias,
            "alibi": None if self._slopes is None else self._slopes.on(q.device),
            "sink_logits": self.sink_logits,
            "dropout": self.dropout if self.training else 0.0,
        }
        return scores if self._share is None else self._share.of_rank(scores)

    def _require_heads(self, q: Tensor, k: Tensor) -> None:
        """Raises ValueError for some of the layer's heads, as of projections that were cut, if all must be there."""
        heads = q.shape[1], k.shape[1]
        if self._share is None and heads[0] != self.num_heads:
            reason = self._why_all_heads(*heads)
            if reason:
                raise ValueError(
                    f"{type(self).__name__}: projections must return all heads, {self.num_heads} on "
                    f"{self.num_kv_heads} KV heads, since {reason}; got {heads[0]} on {heads[1]}. Over ranks, cut the "
                    "layer by qkv.parallel.Heads(), and not its projections."
                )

    def _why_all_heads(self, heads: int, kv_heads: int) -> str:
        """Why a call must not have this part of the heads; empty if it may."""
        if heads * self.num_kv_heads != kv_heads * self.num_heads:
            return "a part has as many of each"
        if self.sink_logits is not None or self._slopes is not None or self.position_bias is not None:
            return "sink_logits, alibi and position_bias are of all of them"
        if torch.is_grad_enabled():
            known = (*PROJECTIONS, "sink_logits")
            learned = [name for name, one in self.named_parameters() if one.requires_grad]
            shared = [name for name in learned if name.partition(".")[0] not in known]
            if shared:
                return f"{', '.join(shared)} learn from all of them"
        return ""

    def _project_out(self, out: Tensor, x: Tensor) -> Tensor:
        """The output projection of all heads, gated by the tokens x: (B, H, L, value_dim) to (B, L, embed_dim)."""
        out = out.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            out = out * project(self.gate_proj, x).sigmoid()
        return project(self.out_proj, out)

    def _inputs(self, x: Tensor, context: Tensor | None, options: CallOptions) -> Inputs:
        """Projects x and context, and appends to the cache."""
        caller = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise input_error(caller, "x", x, f"(B, L, {self.embed_dim})")
        try:
            q = self._split_heads(project(self.q_proj, x), self.head_dim, self.q_norm)
            if self.context_dim is None:
                self._refuse_context(context)
                return self._self_inputs(x, q, options)
            return self._cross_inputs(x, q, context, options)
        except RuntimeError as error:
            self._raise_input_error(error, x, context)
            raise

    def _add_position_bias(self, inputs: Inputs) -> Inputs:
        """The inputs with the bias of `position_bias`."""
        q, keys, _, bias, _ = inputs
        of_positions = self._bias_of_positions(q.shape[2], keys.lk, 0 if keys.offset is None else keys.offset, q)
        return inputs._replace(bias=of_positions if bias is None else bias + of_positions)

    def _bias_of_positions(self, lq: int, lk: int, offset: int | Tensor, q: Tensor) -> Tensor:
        """What `position_bias` gives for these positions, of all heads, in the dtype of q."""
        assert self.position_bias is not None
        share, module = self._share, self.position_bias
        bias: Tensor = module(lq, lk, offset) if share is None else share.call(module, lq, lk, offset)
        return bias.to(q.dtype)

    def _raise_input_error(self, error: RuntimeError, x: Tensor, context: Tensor | None) -> None:
        """Raises ValueError from ``error`` if inputs and weights differ in dtype or device."""
        caller = type(self).__name__
        require_like_weights(caller, "x", x, self.q_proj, error)
        if context is not None:
            require_like_weights(caller, "context", context, self.k_proj, error)

    def _self_inputs(self, x: Tensor, q: Tensor, options: CallOptions) -> Inputs:
        """`_inputs` of self-attention, from projected queries."""
        cache = options.cache
        if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, (CrossKVCache, LatentKVCache))):
            raise TypeError(
                f"{type(self).__name__}: cache must be a KVCache, PagedKVCache, Int8KVCache or SlidingKVCache in "
                f"self-attention; got {type(cache).__name__}."
            )
        mask, is_token, where = new_tokens(options, self._owner, x, self.rotary)
        k, v = self._keys(x)
        if self.rotary is not None:
            q, k = rotate_both(self.rotary, q, k, where)
        if cache is None:
            return Inputs(q, Keys(k, v, 0), mask, options.bias)
        keys = cache.append(k, v, is_token)
        return cached_inputs(q, keys, mask, options.bias, cache)

    def _refuse_context(self, context: Tensor | None) -> None:
        """Raises ValueError unless the context of self-attention is None."""
        if context is not None:
            got = type(context).__name__
            if isinstance(context, Tensor):
                got = "a nested tensor" if context.is_nested else f"one of shape {tuple(context.shape)}"
            raise ValueError(
                f"{type(self).__name__}: context must be None in self-attention; got {got}. "
                "Build the layer with context_dim=, or use CrossAttention. Pass a mask by keyword, mask=."
            )

    def _cross_inputs(self, x: Tensor, q: Tensor, context: Tensor | None, options: CallOptions) -> Inputs:
        """`_inputs` of cross-attention, from projected queries.

        Keys come from the context or from a filled cache; with both, the context must be the cached one.
        """
        mask, bias, _, cache, _ = options
        caller = type(self).__name__
        if cache is not None and not isinstance(cache, CrossKVCache):
            raise TypeError(f"{caller}: cache must be a CrossKVCache in cross-attention; got {type(cache).__name__}.")
        if context is None:
            if cache is None or not cache.length:
                raise ValueError(
                    f"{caller}: context must be (B, Lk, {self.context_dim}) unless a cache contains it; got None."
                )
        else:
            sizes = (context.shape[0], context.shape[2]) if isinstance(context, Tensor) and context.dim() == 3 else ()
            if sizes != (x.shape[0], self.context_dim):
                raise input_error(caller, "context", context, f"({x.shape[0]}, Lk, {self.context_dim})")
            if cache is None:
                return Inputs(q, Keys(*self._keys(context), None), mask, bias)
        cache.admit(self._owner, mask)
        if context is None or cache.length:
            if context is not None:
                cache.require(context)
            mask, _ = cache.split_padding(mask, x.shape[0], 0)
            keys = cache.keys()
            cache.require_dtype(q)
        else:
            mask, is_token = cache.split_padding(mask, *context.shape[:2])
            keys = cache.append(*self._keys(context), is_token)
            cache.remember(context)
        return cached_inputs(q, keys, mask, bias, cache)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, Hkv, Lk, head_dim) and values (B, Hkv, Lk, value_dim) of x or a context."""
        k = self._split_heads(project(self.k_proj, source), self.head_dim, self.k_norm)
        return k, self._split_heads(project(self.v_proj, source), self.value_dim, None)

    @staticmethod
    def _split_heads(x: Tensor, width: int, norm: HeadNorm | None) -> Tensor:
        """(B, L, heads * width) to (B, heads, L, width), a view; then ``norm``. In tensor parallelism, of one rank."""
        heads = x.shape[2] // width
        try:
            x = x.view(*x.shape[:2], heads, width).transpose(1, 2)
        except RuntimeError as error:
            if x.shape[2] % width == 0:
                raise
            raise ValueError(
                f"Attention: projections must return whole heads, of width {width}; got {x.shape[2]} channels. Over "
                "ranks, cut the layer by qkv.parallel.Heads(), and not its projections."
            ) from error
        return x if norm is None else norm(x)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Unpack[ConversionOptions]) -> Self:
        """The layer with the function of ``module``, for batch-first inputs, and a copy of its weights.

        Args:
            module: with equal kdim and vdim. If these differ from its embed_dim, the layer is cross-attention; if not,
                ``CrossAttention.from_torch`` makes it so.
            **options: options of the layer that the module does not have: ``mask``, ``window``, ...

        Raises:
            ValueError: for unequal kdim and vdim, add_bias_kv, add_zero_attn, and other numbers of heads.

        Example:
            >>> import torch, qkv
            >>> theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            >>> ours, x = qkv.MultiHeadAttention.from_torch(theirs), torch.randn(1, 5, 16)
            >>> torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)
            True
        """
        layer = cls._with_heads("from_torch", torch_mha.options(module), options)
        layer.load_state_dict(torch_mha.state(module))
        return layer.train(module.training)

    @classmethod
    def from_transformers(cls, module: nn.Module, **options: Unpack[ConversionOptions]) -> Self:
        """The layer with the function of an attention module of transformers, and a copy of its weights.

        Args:
            module: of Llama, Mistral, Qwen, Gemma, Phi, Granite, SmolLM3, StarCoder2, GPT-2, GPT-BigCode, GPT-NeoX,
                gpt-oss, OPT, MPT, Falcon, BERT (``BertAttention``, without its norm and residual), BART and those like
                it, and T5. BART's and T5's do not tell whether they are cross-attention:
                ``CrossAttention.from_transformers`` makes them that.
            **options: options of the layer, instead of the module's: ``mask``, ``rotary``, ``backend``, ... For T5's
                self-attention after the first layer, ``position_bias`` is that of the first.

        Masks are those that the model gives to the module, padding apart; dropout after the output projection is not
        part of a layer.

        Raises:
            TypeError: for modules of other classes, and projections that are wrapped or quantised.
            ValueError: for what layers do not have, and a layer with other numbers of heads.

        Example:
            >>> import torch, qkv
            >>> from transformers import LlamaConfig, LlamaModel
            >>> config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
            >>> layer = qkv.CausalAttention.from_transformers(LlamaModel(config).layers[0].self_attn)
            >>> layer.num_kv_heads, layer.rotary
            (2, RotaryEmbedding(8))
        """
        return cls._converted(module, transformers_modules.read(module), options)

    @classmethod
    def _converted(cls, module: nn.Module, converted: Converted, options: ConversionOptions) -> Self:
        """The layer of a module that was read."""
        position_bias = options.get("position_bias", converted.position_bias)
        layer = cls._with_heads("from_transformers", converted.options, {**options, "position_bias": None})
        if converted.needs_position_bias and layer.context_dim is None and "position_bias" not in options:
            raise ValueError(
                "from_transformers: position_bias must be given for self-attention whose model adds that of its first "
                f"layer; got a {type(module).__name__} without. Pass the position_bias of the first layer, or None."
            )
        layer.load_state_dict(converted.state)
        if position_bias is not None:
            require_position_bias(cls.__name__, position_bias)
            layer.position_bias = position_bias
        return layer.train(module.training)

    @classmethod
    def _with_heads(cls, caller: str, given: dict[str, Any], options: ConversionOptions) -> Self:
        """The layer with the options ``given`` by a module, and others. Raises ValueError for another head count."""
        layer = cls(**{**{name: value for name, value in given.items() if name not in cls._fixed}, **options})
        heads = given["num_heads"], given.get("num_kv_heads", given["num_heads"])
        if (layer.num_heads, layer.num_kv_heads) != heads:
            raise ValueError(
                f"{caller}: the layer must have the module's {heads[0]} query heads on {heads[1]} KV heads; got a "
                f"{cls.__name__} with {layer.num_heads} on {layer.num_kv_heads}. Convert an Attention, then pool its "
                "heads by qkv.convert.convert_layer."
            )
        return layer

    def to_torch(self) -> nn.MultiheadAttention:
        """The batch-first ``nn.MultiheadAttention`` with the function of this layer and a copy of its weights.

        Keys and values are repeated for each query head of a group, since the module has no groups.

        Raises:
            ValueError: for a layer that the module cannot express, listing every reason.

        Example:
            >>> import torch, qkv
            >>> ours, x = qkv.GroupedQueryAttention(16, 4, 2), torch.randn(1, 5, 16)
            >>> torch.allclose(ours.to_torch()(x, x, x)[0], ours(x), atol=1e-6)
            True
        """
        return torch_mha.build(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        """As ``nn.Module``, for state dicts with packed projections too. No hook: copies of a layer would share it."""
        unpack_state(self, state_dict, prefix, reports[-1])
        if self._share is not None:
            self._share.to_rank(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *reports)

    def options(self) -> Arguments:
        """The arguments with which the class builds a layer like this one, with other weights; here, `Attention`."""
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
            "position_bias": self.position_bias,
            "qk_norm": self.q_norm is not None,
            "qk_norm_eps": self.qk_norm_eps,
            "gate": self.gate_proj is not None,
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
