"""`Problem`: one validated call of attention. The only place that validates tensors."""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from qkv import kernels
from qkv.arguments import more, require_strided
from qkv.masks import FULL, Mask, positions
from qkv.pages import Pages
from qkv.scores import ScoreOptions, Scores, make_scores

MAX_POSITION = 1 << 62
MAX_POSITION_OF_ROWS = 1 << 30
"""bound of the numbers in an offset tensor: the kernel counts positions in 32 bits"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Problem(NamedTuple):
    """One validated call of attention: the input of every backend."""

    q: Tensor
    """(B, H, Lq, D)"""
    k: Tensor
    """(B, Hkv, Lk, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv)"""
    k_scale: Tensor | None
    """(B, Hkv, Lk), what each key is multiplied by, as v_scale for values; in pages as k; None unless k is int8"""
    v_scale: Tensor | None
    mask: Mask
    offset: int | Tensor
    """position of the first query among the keys; int64 (B,), that of each row of the batch"""
    scores: Scores
    wants_lse: bool
    pages: Pages | None = None
    """where keys lie, if k and v are pages of a pool, (pages, Hkv, page_size, D); only the native backend reads them"""

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
        return self.k.shape[2] if self.pages is None else self.pages.length

    @property
    def needs_grad(self) -> bool:
        inputs = (self.q, self.k, self.v, self.k_scale, self.v_scale)
        tensors = (*inputs, *self.scores.tensors())
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def visible(self) -> Tensor:
        """The mask as a dense tensor, broadcastable to (B, H, Lq, Lk)."""
        return self.mask.visible(self.lq, self.lk, self.offset, device=self.q.device)

    def distance(self) -> Tensor:
        """``abs(i + offset - j)`` (B or 1, 1, Lq, Lk), the distance that ALiBi multiplies by its slopes."""
        position = positions(self.lq, self.offset, self.q.device)
        return (position[:, None, :, None] - torch.arange(self.lk, device=self.q.device)).abs()

    def dequantized(self) -> "Problem":
        """The problem with keys and values in the dtype of q, for backends without int8."""
        if self.k_scale is None or self.v_scale is None:
            return self
        k, v = self.k * self.k_scale[..., None], self.v * self.v_scale[..., None]
        return self._replace(k=k.to(self.q.dtype), v=v.to(self.q.dtype), k_scale=None, v_scale=None)

    def gathered(self) -> "Problem":
        """The problem with keys and values of each row side by side: a copy of those in pages."""
        if self.pages is None:
            return self
        gather = self.pages.gather
        scales = [None if x is None else gather(x) for x in (self.k_scale, self.v_scale)]
        return self._replace(k=gather(self.k), v=gather(self.v), k_scale=scales[0], v_scale=scales[1], pages=None)

    def select_queries(self, start: int, stop: int) -> "Problem":
        """The problem restricted to the query rows ``start .. stop - 1``, trimmed."""
        rows = self._replace(
            q=self.q[:, :, start:stop],
            mask=self.mask.select_queries(start, stop),
            offset=self.offset + start,
            scores=self.scores.select_queries(start, stop),
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
    pages: Pages | None = None,
    mask: Mask | None = None,
    offset: int | Tensor | None = None,
    wants_lse: bool = False,
    **options: Unpack[ScoreOptions],
) -> Problem:
    """The problem of a call to ``caller``, the function named in error messages. Validates all arguments.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for shapes, dtypes, devices and numbers that do not fit together.
    """
    keys, values = (k, v) if pages is None else _check_pages(caller, k, v, pages)
    _check_tensors(caller, q, keys, values)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        if pages is not None and k.dtype not in (dtype, torch.int8):  # cast the keys that are read, not the whole pool
            k, v, pages = pages.gather(k), pages.gather(v), None
        q, k, v = (x if x.dtype is torch.int8 else x.to(dtype) for x in (q, k, v))
    if k_scale is None and v_scale is None:
        _check_dtypes(caller, q, k, v)
    else:
        _check_dtypes(caller, q, q, q)
        _check_int8(caller, "k", k, k_scale)
        _check_int8(caller, "v", v, v_scale)
    mask = FULL if mask is None else mask
    if mask is not FULL:
        _check_mask(caller, mask, q, keys)
    scores = make_scores(caller, q, keys, **options)
    offset = _resolve_offset(caller, mask, scores, offset, q, keys.shape[2])
    problem = Problem(q, k, v, k_scale, v_scale, mask, offset, scores, wants_lse, pages)
    # torch 2.9 compiles properties of a named tuple only after _replace.
    return problem._replace() if torch.compiler.is_compiling() else problem


def trim(problem: Problem) -> Problem:
    """The problem without keys that no query sees and without bounds that hide nothing.

    For backends that do not skip hidden keys: a decoding step over a window then reads only the window, without a mask.
    """
    if problem.mask is FULL:
        return problem
    lq, lk = problem.q.shape[2], problem.k.shape[2]
    start, stop = problem.mask.key_range(lq, lk, problem.offset)
    if start > 0 or stop < lk:
        problem = problem._replace(
            k=problem.k[:, :, start:stop],
            v=problem.v[:, :, start:stop],
            k_scale=None if problem.k_scale is None else problem.k_scale[:, :, start:stop],
            v_scale=None if problem.v_scale is None else problem.v_scale[:, :, start:stop],
            mask=problem.mask.select_keys(start, stop),
            offset=problem.offset - start,
            scores=problem.scores.select_keys(start, stop),
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
            f"{caller}: only layers, such as qkv.CausalAttention, take nested tensors. For projected heads, call "
            "qkv.integrations.torch.varlen_attn with their values() and offsets()."
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_strided(caller, name, tensor)
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
            "Expand what is shared, without a copy: k.expand(batch, -1, -1, -1)."
        )
    if v_heads != kv_heads or lv != lk:
        raise ValueError(
            f"{caller}: k and v must have the same heads and length; "
            f"got {kv_heads} and {v_heads} heads, lengths {lk} and {lv}."
        )
    if k_width != width:
        raise ValueError(f"{caller}: q and k must have the same width; got {width} and {k_width}.")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{caller}: the number of heads of q must be a multiple of that of k and v; got {heads} and {kv_heads}."
            f"{more('heads')}"
        )


def _check_pages(caller: str, k: Tensor, v: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes of keys and values that lie in pages, for other checks."""
    if not isinstance(pages, Pages):
        raise TypeError(f"{caller}: pages must be a qkv.cache.Pages or None; got {type(pages).__name__}.")
    pages.require_fit(caller, k, v)
    return pages.stand_in(k), pages.stand_in(v)


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
            f"{caller}: k_scale and v_scale need k and v in int8, and must be float32 of shape {want}; "
            f"got {name} in {tensor.dtype} with {name}_scale {got}."
        )
    if scale is not None and scale.device != tensor.device:
        raise ValueError(
            f"{caller}: {name}_scale must be on the device of {name}; got {scale.device}, {tensor.device}."
        )


def _check_mask(caller: str, mask: Mask, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, Mask):
        remedy = "Mask.dense(allow)" if isinstance(mask, Tensor) else "Mask.causal(), Mask.padding(keep), ..."
        raise TypeError(
            f"{caller}: mask must be a qkv.Mask; got {type(mask).__name__}. Use {remedy}.{more('polarity')}"
        )
    batch, heads, lq, _ = q.shape
    mask.require_fit(caller, batch, heads, lq, k.shape[2], q.device)


def _resolve_offset(
    caller: str, mask: Mask, scores: Scores, offset: int | Tensor | None, q: Tensor, lk: int
) -> int | Tensor:
    """The offset, 0 if None, int64 if a tensor. Raises if it is needed and None, or out of range."""
    lq = q.shape[2]
    if offset is None:
        if (mask.is_positional or scores.is_positional()) and lq != lk:
            positional = repr(mask) if mask.is_positional else "alibi"
            raise ValueError(
                f"{caller}: {positional} depends on the positions of queries, so {lq} queries with {lk} keys need an "
                f"offset; got None. offset=0 aligns the first query with the first key (top-left: torch's is_causal); "
                f"offset={lk - lq} aligns the last query with the last key (bottom-right: flash-attn, decoding)."
                f"{more('offset')}"
            )
        return 0
    if isinstance(offset, Tensor):
        return _check_offsets(caller, mask, offset, q, lk)
    if not isinstance(offset, (int, torch.SymInt)) or isinstance(offset, bool):
        raise _not_an_offset(caller, repr(offset))
    if isinstance(offset, int) and not -MAX_POSITION < offset < MAX_POSITION:
        raise ValueError(f"{caller}: offset must be between -2**62 and 2**62; got {offset}.")
    if mask.positional_tensors() and (offset < 0 or offset + lq > lk):
        raise _queries_not_covered(caller, mask, str(offset), lq, lk)
    return offset


def _check_offsets(caller: str, mask: Mask, offset: Tensor, q: Tensor, lk: int) -> Tensor:
    """Checks offsets by row of the batch; returns them as int64. Their values are checked only on a CPU, untraced."""
    batch, _, lq, _ = q.shape
    if offset.dtype.is_floating_point or offset.dtype.is_complex or offset.dtype == torch.bool:
        raise _not_an_offset(caller, f"{offset.dtype} of shape {tuple(offset.shape)}")
    require_strided(caller, "offset", offset)
    if offset.shape != (batch,):
        raise ValueError(
            f"{caller}: offset must have shape ({batch},), a position for each row of the batch; "
            f"got shape {tuple(offset.shape)}. For the same position in all rows, pass an int."
        )
    if offset.device != q.device:
        raise ValueError(f"{caller}: offset must be on the device of q; got {offset.device} and {q.device}.")
    offset = offset.to(torch.int64)
    if batch and offset.is_cpu and kernels.can_read_values(offset):
        low, high = (int(bound) for bound in offset.aminmax())
        if not -MAX_POSITION_OF_ROWS < low <= high < MAX_POSITION_OF_ROWS:
            raise ValueError(f"{caller}: offset must be between -2**30 and 2**30 in each row; got {low} to {high}.")
        if mask.positional_tensors() and (low < 0 or high + lq > lk):
            raise _queries_not_covered(caller, mask, f"{low} to {high}", lq, lk)
    return offset


def _not_an_offset(caller: str, got: str) -> TypeError:
    return TypeError(
        f"{caller}: offset must be an int, the position of the first query, or an integer tensor (B,), that of each "
        f"row of the batch; got {got}."
    )


def _queries_not_covered(caller: str, mask: Mask, offset: str, lq: int, lk: int) -> ValueError:
    kind = "documents" if mask.document_ids is not None else "global_tokens"
    return ValueError(
        f"{caller}: a {kind} mask of {lk} positions must cover the queries; got offset={offset} and {lq} queries."
    )
