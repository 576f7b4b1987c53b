"""`Problem`: one call of attention, validated and trimmed. The only place that validates tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.arguments import require_finite, require_positive, require_probability
from qkv.masks import FULL, Mask

MOST_POSITIONS = 1 << 62
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Problem(NamedTuple):
    """What every backend receives.

    Scores are ``scale * q @ k.mT``, then softcap, bias and alibi, then the mask, then a softmax whose normaliser may
    hold one more term, the sink logit of the head, then dropout.
    """

    q: Tensor
    """(B, H, Lq, D)"""
    k: Tensor
    """(B, Hkv, Lk, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv)"""
    k_scale: Tensor | None
    """(B, Hkv, Lk), what each row of k is to be multiplied by, where k and v are int8"""
    v_scale: Tensor | None
    mask: Mask
    offset: int
    """Position of the first query, counted in keys."""
    scale: float
    softcap: float | None
    bias: Tensor | None
    """Broadcastable to (B, H, Lq, Lk), always with 4 dimensions."""
    alibi: Tensor | None
    """(H,)"""
    sink_logits: Tensor | None
    """(H,)"""
    dropout: float
    wants_lse: bool

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def lq(self) -> int:
        return self.q.shape[2]

    @property
    def lk(self) -> int:
        return self.k.shape[2]

    @property
    def needs_grad(self) -> bool:
        inputs = (self.q, self.k, self.v, self.k_scale, self.v_scale)
        tensors = (*inputs, self.bias, self.alibi, self.sink_logits)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def visible(self) -> Tensor:
        """The mask written out for these queries and keys, broadcastable to (B, H, Lq, Lk)."""
        return self.mask.visible(self.lq, self.lk, self.offset, device=self.q.device)

    def distance(self) -> Tensor:
        """How far each key lies from each query, (Lq, Lk), as ALiBi counts it."""
        position = torch.arange(self.lq, device=self.q.device) + self.offset
        return (position[:, None] - torch.arange(self.lk, device=self.q.device)).abs()

    def dequantized(self) -> "Problem":
        """The same problem with keys and values in the dtype of q, for backends that know no int8."""
        if self.k_scale is None or self.v_scale is None:
            return self
        k, v = self.k * self.k_scale[..., None], self.v * self.v_scale[..., None]
        return self._replace(k=k.to(self.q.dtype), v=v.to(self.q.dtype), k_scale=None, v_scale=None)

    def select_queries(self, start: int, stop: int) -> "Problem":
        """The same problem for the query rows ``start .. stop - 1`` alone."""
        bias = self.bias
        if bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, start:stop]
        rows = self._replace(
            q=self.q[:, :, start:stop],
            mask=self.mask.select_queries(start, stop),
            offset=self.offset + start,
            bias=bias,
        )
        return trim(rows)


def make_problem(
    caller: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mask: Mask = FULL,
    offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sink_logits: Tensor | None = None,
    dropout: float = 0.0,
    wants_lse: bool = False,
    **unknown: object,
) -> Problem:
    """The problem that a call of ``caller`` states.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for shapes, dtypes, devices and numbers that do not fit together.
    """
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument {next(iter(unknown))!r}.")
    _check_tensors(caller, q, k, v)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype is torch.int8 else x.to(dtype) for x in (q, k, v))
    if k_scale is None and v_scale is None:
        _check_dtypes(caller, q, k, v)
    else:
        _check_dtypes(caller, q, q, q)
        _check_int8(caller, "k", k, k_scale)
        _check_int8(caller, "v", v, v_scale)
    if mask is not FULL:
        _check_mask(caller, mask, q, k)
    offset = _resolve_offset(caller, mask, alibi, offset, q.shape[2], k.shape[2])
    if scale is None:
        if q.shape[3] == 0:
            raise ValueError(f"{caller}: heads of width 0 have no default scale, 1 / sqrt(width); give scale.")
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, Tensor):
        raise TypeError(f"{caller}: scale must be a number; got a tensor. Give q times a learned scale, and scale=1.0.")
    else:
        require_finite(caller, "scale", scale, ", or None for 1 / sqrt(width)")
    if softcap is not None:
        require_positive(caller, "softcap", softcap, " or None")
    if bias is not None:
        bias = _check_bias(caller, bias, q, k)
    if alibi is not None:
        _check_per_head(caller, "alibi", alibi, q)
    if sink_logits is not None:
        _check_per_head(caller, "sink_logits", sink_logits, q)
    require_probability(caller, "dropout", dropout)
    scores = (scale, softcap, bias, alibi, sink_logits)
    problem = Problem(q, k, v, k_scale, v_scale, mask, offset, *scores, dropout, wants_lse)
    # The compiler of torch 2.9 knows the properties of a named tuple only once it was replaced.
    return problem._replace() if torch.compiler.is_compiling() else problem


def trim(problem: Problem) -> Problem:
    """The same problem without the keys that no query sees and the bounds that hide nothing.

    For backends that do not skip what is hidden: a decoding step over a window then reads the window alone, and without
    a mask.
    """
    if problem.mask is FULL:
        return problem
    lq, lk = problem.q.shape[2], problem.k.shape[2]
    start, stop = problem.mask.key_range(lq, lk, problem.offset)
    if start > 0 or stop < lk:
        bias = problem.bias
        if bias is not None and bias.shape[3] != 1:
            bias = bias[..., start:stop]
        problem = problem._replace(
            k=problem.k[:, :, start:stop],
            v=problem.v[:, :, start:stop],
            k_scale=None if problem.k_scale is None else problem.k_scale[:, :, start:stop],
            v_scale=None if problem.v_scale is None else problem.v_scale[:, :, start:stop],
            mask=problem.mask.select_keys(start, stop),
            offset=problem.offset - start,
            bias=bias,
        )
        lk = stop - start
    mask = problem.mask.simplified(lq, lk, problem.offset)
    return problem if mask is problem.mask else problem._replace(mask=mask)


def _check_tensors(caller: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        got = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"{caller}: q, k and v must be tensors; got {got}.")
    if q.is_nested or k.is_nested or v.is_nested:
        raise ValueError(
            f"{caller}: nested tensors are for the layers, as qkv.CausalAttention. For heads of your own, call "
            "qkv.integrations.torch.varlen_attn with their values and offsets."
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_strided(caller, name, tensor)
    if not (q.dim() == k.dim() == v.dim() == 4):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"{caller}: q, k and v must have 4 dimensions (batch, heads, length, width); got shapes {got}."
        )
    batch, heads, _, width = q.shape
    k_batch, kv_heads, lk, k_width = k.shape
    v_batch, v_heads, lv, _ = v.shape
    if not (batch == k_batch == v_batch):
        raise ValueError(
            f"{caller}: q, k and v must have the same batch; got {batch}, {k_batch} and {v_batch}. "
            "Expand the one that is shared: k.expand(batch, -1, -1, -1) copies nothing."
        )
    if v_heads != kv_heads or lv != lk:
        raise ValueError(
            f"{caller}: k and v must have the same heads and length; "
            f"got k with {kv_heads} heads and {lk} keys, v with {v_heads} heads and {lv} values."
        )
    if k_width != width:
        raise ValueError(f"{caller}: q and k must have the same width; got {width} and {k_width}.")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{caller}: the {heads} query heads of q must be a multiple of the {kv_heads} heads of k and v, "
            "so that each group of query heads shares one of them."
        )


def _check_dtypes(caller: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype = q.dtype
    if not (dtype is k.dtype is v.dtype):
        remedy = " Keys and values in int8 need k_scale and v_scale." if k.dtype is torch.int8 else ""
        raise ValueError(
            f"{caller}: q, k and v must have the same dtype; got {dtype}, {k.dtype} and {v.dtype}.{remedy}"
        )
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"{caller}: q, k and v must be one of {names}; got {dtype}.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"{caller}: q, k and v must be on the same device; got {q.device}, {k.device} and {v.device}.")


def _check_int8(caller: str, name: str, tensor: Tensor, scale: Tensor | None) -> None:
    want = tuple(tensor.shape[:3])
    fits = isinstance(scale, Tensor) and scale.dtype is torch.float32 and scale.shape == want
    if tensor.dtype is not torch.int8 or not fits:
        got = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(
            f"{caller}: k_scale and v_scale are for k and v in int8, and must both be float32 (batch, heads, length); "
            f"got {name} in {tensor.dtype} with {name}_scale {got}, where {want} would fit."
        )
    if scale is not None and scale.device != tensor.device:
        raise ValueError(
            f"{caller}: {name}_scale must be on the device of {name}; got {scale.device}, {tensor.device}."
        )


def _check_strided(caller: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{caller}: {name} must be a strided tensor; got {tensor.layout}. Use {name}.to_dense().")


def _check_mask(caller: str, mask: Mask, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, Mask):
        remedy = "Mask.dense(allow)" if isinstance(mask, Tensor) else "Mask.causal(), Mask.padding(keep), ..."
        raise TypeError(f"{caller}: mask must be a qkv.Mask; got {type(mask).__name__}. Use {remedy}.")
    batch, heads, lq, _ = q.shape
    lk = k.shape[2]
    for name, tensor in mask.tensors():
        _check_strided(caller, f"mask's {name}", tensor)
        if tensor.device != q.device:
            raise ValueError(f"{caller}: mask is on {tensor.device}, q on {q.device}; use mask.to({str(q.device)!r}).")
        if name == "dense allow":
            want: tuple[int, ...] = (batch, heads, lq, lk)
        elif name == "padding lengths":
            want = (batch,)
        else:
            want = (batch, lk)
        per_row = name != "dense allow" and tensor.shape[1:] == want[1:]
        fits = _broadcasts(tensor, want) if name == "dense allow" else per_row and tensor.shape[0] in (1, batch)
        if not fits:
            raise ValueError(f"{caller}: mask's {name} must fit {want}; got shape {tuple(tensor.shape)}.")


def _resolve_offset(caller: str, mask: Mask, alibi: Tensor | None, offset: int | None, lq: int, lk: int) -> int:
    if offset is None:
        if (mask.is_positional or alibi is not None) and lq != lk:
            positional = repr(mask) if mask.is_positional else "alibi"
            raise ValueError(
                f"{caller}: {positional} depends on where the {lq} queries stand among the {lk} keys, and offset is "
                f"not given. offset=0 aligns the first query with the first key (top-left: torch's is_causal); "
                f"offset={lk - lq} aligns the last query with the last key (bottom-right: flash-attn, decoding)."
            )
        return 0
    if not isinstance(offset, (int, torch.SymInt)) or isinstance(offset, bool):
        raise TypeError(f"{caller}: offset must be an int, the position of the first query; got {offset!r}.")
    if isinstance(offset, int) and not -MOST_POSITIONS < offset < MOST_POSITIONS:
        raise ValueError(f"{caller}: offset must be a position that 64 bits can count; got {offset}.")
    if mask.document_ids is not None and (offset < 0 or offset + lq > lk):
        raise ValueError(
            f"{caller}: a documents mask of {lk} positions must cover the queries; got offset={offset} and {lq} "
            "queries."
        )
    return offset


def _check_bias(caller: str, bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    want = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(
            f"{caller}: bias must be a floating-point tensor, added to the scores; got {got}. "
            "A boolean mask is mask=Mask.dense(allow)."
        )
    _check_strided(caller, "bias", bias)
    if bias.device != q.device:
        raise ValueError(f"{caller}: bias must be on the device of q; got {bias.device} and {q.device}.")
    if bias.dim() > 4 or not _broadcasts(bias, want):
        raise ValueError(f"{caller}: bias must broadcast to {want}; got shape {tuple(bias.shape)}.")
    return bias[(None,) * (4 - bias.dim())]


def _check_per_head(caller: str, name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point or tensor.shape != (q.shape[1],):
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(
            f"{caller}: {name} must be floating-point of shape ({q.shape[1]},), one a query head; got {got}."
        )
    if tensor.device != q.device:
        raise ValueError(f"{caller}: {name} must be on the device of q; got {tensor.device} and {q.device}.")


def _broadcasts(tensor: Tensor, want: tuple[int, ...]) -> bool:
    missing = len(want) - tensor.dim()
    return all(size in (1, goal) for size, goal in zip(tensor.shape, want[missing:], strict=True))
