"""FlexAttention, with the mask and the scores lowered to its ``mask_mod`` and ``score_mod``. Meant for CUDA."""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.backends.nonfinite import add_visible_nonfinite, zero_nonfinite
from qkv.backends.result import Result, accumulation_dtype
from qkv.backends.sinks import add_sinks
from qkv.masks import Mask
from qkv.problem import Problem, trim

# From torch 2.14 on FlexAttention imports sympy, which takes a second, so it is imported where it is used.
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "flex"

SCORES = ("softcap", "bias", "alibi", "sink_logits")
"""The options of `Scores` that this backend supports."""

MIN_HEAD_DIM = 16
"""Smallest head width of its GPU kernels. Narrower heads are padded with zeros."""

MAX_COMPILATIONS = 256
"""Limit of compilations, one for each kind of mask and scores. torch's default of 8 is too low."""

MAX_UNCOMPILED_PAIRS = 1 << 24
"""Pairs of queries and keys up to which blocks are found from a dense mask, without compiling."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def why_not(problem: Problem) -> list[str]:
    reasons = [f"FlexAttention has no {name}" for name in problem.scores.unsupported_by(SCORES)]
    if problem.q.device.type == "cpu" and problem.needs_grad:
        reasons.append("FlexAttention has no backward on CPU")
    if problem.q.is_cuda and problem.q.dtype is torch.float64:
        reasons.append("FlexAttention's kernels have no fp64")
    if problem.q.numel() == 0 or trim(problem).k.numel() == 0 or problem.v.numel() == 0:
        reasons.append("FlexAttention takes no empty tensors")
    return reasons


def why_rather_not(problem: Problem) -> list[str]:
    if problem.q.device.type != "cuda":
        return [f"FlexAttention runs uncompiled on {problem.q.device.type}, with all scores in memory"]
    return []


def run(problem: Problem) -> Result:
    clean, nonfinite = zero_nonfinite(trim(problem).dequantized())
    return add_visible_nonfinite(_run(clean), nonfinite)


def _run(problem: Problem) -> Result:
    """The result of a trimmed problem of finite numbers."""
    from torch.nn.attention.flex_attention import AuxRequest

    scores = problem.scores
    wants_lse = problem.wants_lse or scores.sink_logits is not None
    q, k, v = map(_padded, (problem.q, problem.k, problem.v))
    out, aux = _attend(problem.q.device.type)(
        q,
        k,
        v,
        score_mod=lower_scores(problem),
        block_mask=_block_mask(problem),
        scale=scores.scale,
        enable_gqa=problem.group != 1,
        return_aux=AuxRequest(lse=True) if wants_lse else AuxRequest(),
    )
    out, lse = out[..., : problem.v.shape[3]], aux.lse
    if scores.sink_logits is not None:
        out, lse = add_sinks(out, lse, scores.sink_logits)
    return Result(out, lse if problem.wants_lse else None)


def _padded(tensor: Tensor) -> Tensor:
    """The tensor on a GPU, with zeros up to the smallest head width."""
    missing = MIN_HEAD_DIM - tensor.shape[3]
    return F.pad(tensor, (0, missing)) if missing > 0 and not tensor.is_cpu else tensor


def lower_mask(mask: Mask, offset: int | Tensor, lk: int) -> MaskMod:
    """The ``mask_mod`` of the mask."""
    left, right, sink_tokens, dilation = mask.left, mask.right, mask.sink_tokens, mask.dilation
    prefix, chunk, start = mask.prefix_tokens, mask.chunk, mask.chunk_start
    prefixes, is_global = mask.prefix_lengths, mask.is_global
    keep, ids, allow = mask.keep_keys(lk), mask.document_ids, mask.allow

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = _position(offset, b, i)
        seen = j >= 0
        if left is not None:
            seen = j >= position - left
        if dilation != 1:
            seen = seen & ((position - j) % dilation == 0)
        seen = seen | (j < sink_tokens)
        if right is not None:
            ahead = (j <= position + right) | (j < prefix)
            seen = seen & (ahead if prefixes is None else ahead | (j < _at(prefixes, b)))
        if chunk is not None:
            seen = seen & ((position - start) // chunk == (j - start) // chunk)
        if is_global is not None:
            of_query = _at(is_global, b, position.clamp(0, lk - 1)) & (position >= 0) & (position < lk)
            seen = seen | of_query | _at(is_global, b, j)
        if keep is not None:
            seen = seen & _at(keep, b, j)
        if ids is not None:
            same = _at(ids, b, position.clamp(0, lk - 1)) == _at(ids, b, j)
            seen = seen & same & (position >= 0) & (position < lk)
        if allow is not None:
            seen = seen & _at(allow, b, h, i, j)
        return seen

    return mask_mod


def lower_scores(problem: Problem) -> ScoreMod | None:
    """The ``score_mod`` of softcap, bias and ALiBi; None without any."""
    softcap, bias, alibi = problem.scores.softcap, problem.scores.bias, problem.scores.alibi
    offset = problem.offset
    if softcap is None and bias is None and alibi is None:
        return None
    dtype = accumulation_dtype(problem.q.dtype)
    # A tensor, since compiled code would be specialised on a number.
    cap = None if softcap is None else torch.full((), softcap, dtype=dtype, device=problem.q.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score.to(dtype)
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            score = score + _at(bias, b, h, i, j)
        if alibi is not None:
            score = score - alibi[h].to(dtype) * (_position(offset, b, i) - j).abs()
        return score

    return score_mod


def _position(offset: int | Tensor, b: Tensor, i: Tensor) -> Tensor:
    """The position of query i of row b."""
    return i + (offset[b] if isinstance(offset, Tensor) else offset)


def _at(tensor: Tensor, *index: Tensor) -> Tensor:
    """``tensor[index]``, with index 0 in broadcast dimensions."""
    return tensor[tuple(i if size != 1 else i * 0 for size, i in zip(tensor.shape, index, strict=True))]


def _block_mask(problem: Problem) -> "BlockMask | None":
    """The mask as FlexAttention takes it; None if it hides nothing."""
    mask = problem.mask
    if mask.is_full:
        return None
    if mask.has_tensors or isinstance(problem.offset, Tensor):
        return _build_block_mask(problem)
    return _interval_block_mask(mask, problem.offset, problem.lq, problem.lk, problem.q.device)


@functools.lru_cache(maxsize=64)
def _interval_block_mask(mask: Mask, offset: int, lq: int, lk: int, device: torch.device) -> "BlockMask":
    """Block mask of an interval. Cached, since all layers of a model need the same one."""
    return _find_blocks(device.type, lq * lk)(lower_mask(mask, offset, lk), None, None, lq, lk, device=device)


def _build_block_mask(problem: Problem) -> "BlockMask":
    """Block mask of a mask with tensors, or of offsets by row."""
    mask, offset = problem.mask, problem.offset
    by_row = [offset] if isinstance(offset, Tensor) and mask.is_positional else []
    batch = max(tensor.shape[0] for tensor in (*by_row, *(tensor for _, tensor in mask.tensors())))
    heads = 1 if mask.allow is None else mask.allow.shape[1]
    mask_mod = lower_mask(mask, offset, problem.lk)
    find = _find_blocks(problem.q.device.type, batch * heads * problem.lq * problem.lk)
    return find(mask_mod, batch, heads, problem.lq, problem.lk, device=problem.q.device)


def _find_blocks(device_type: str, pairs: int) -> "Callable[..., BlockMask]":
    """``create_block_mask``, compiled if a dense mask would be large."""
    from torch.nn.attention.flex_attention import create_block_mask

    return _compiled(create_block_mask) if device_type == "cuda" and pairs > MAX_UNCOMPILED_PAIRS else create_block_mask


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for any sizes, or as it is while the caller is being compiled."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
            return compiled(*args, **kwargs)

    return call


@functools.cache
def _attend(device_type: str) -> Callable[..., Any]:
    """``flex_attention``, compiled on CUDA only."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        return _compiled(flex_attention)

    def eager(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*without torch.compile.*")
            return flex_attention(*args, **kwargs)

    return eager
