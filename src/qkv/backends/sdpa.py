"""PyTorch's fused kernels, with the mask lowered to its cheapest exact form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.backends import blocks, flex
from qkv.backends.nonfinite import add_visible_nonfinite, distinct, zero_nonfinite
from qkv.backends.result import Result, accumulation_dtype, empty_result
from qkv.backends.sinks import add_sinks
from qkv.problem import Problem, trim
from qkv.torch_internals import forward_mode_is_active, is_batched, tracing_state, transforms_are_active

NAME = "sdpa"

SCORES = ("bias", "alibi", "sink_logits", "dropout")
"""The options of `Scores` that this backend supports."""

MAX_DENSE_MASK = 1 << 26
"""Elements of a dense mask on a GPU beyond which FlexAttention, which needs none, is worth compiling."""

ROW_BYTES = 16
"""Alignment of rows in torch's GPU kernels, which read out of bounds otherwise."""


def why_not(problem: Problem) -> list[str]:
    reasons = [f"scaled_dot_product_attention has no {name}" for name in problem.scores.unsupported_by(SCORES)]
    if _needs_lse(problem):
        wanted = "sink logits need" if problem.scores.sink_logits is not None else "the call needs"
        if problem.q.device.type not in ("cpu", "meta"):
            reasons.append(f"{wanted} the lse, which torch's kernels return on CPU only")
        if torch.onnx.is_in_onnx_export():
            reasons.append(f"{wanted} the lse, which ONNX's attention does not return")
        if problem.scores.dropout:
            reasons.append(f"{wanted} the lse, which torch's kernels do not return with dropout")
        if problem.needs_grad and _has_learned_bias(problem):
            reasons.append(f"{wanted} the lse, which torch's kernels do not return with a bias that needs a gradient")
        if problem.needs_grad and tracing_state():
            reasons.append(f"{wanted} the lse, whose gradient torch.jit.trace cannot record")
    return reasons


def why_rather_not(problem: Problem) -> list[str]:
    if forward_mode_is_active():
        return ["torch's fused kernels have no forward-mode derivatives"]
    if transforms_are_active() and any(map(is_batched, (problem.q, problem.k, problem.v))):
        return ["torch.vmap has no rule for the fused kernels and would run them one by one"]
    if problem.q.is_cuda and _dense_mask_size(problem) > MAX_DENSE_MASK and not flex.why_not(problem):
        return ["the mask is large, and FlexAttention needs no dense one"]
    return []


def run(problem: Problem) -> Result:
    clean, nonfinite = zero_nonfinite(trim(problem).dequantized())
    if clean.lq == 0 or clean.lk == 0:
        return add_visible_nonfinite(empty_result(clean), nonfinite)
    plan = blocks.plan(clean)
    return add_visible_nonfinite(_fused(clean) if plan is None else blocks.run(clean, plan, _fused), nonfinite)


def _needs_lse(problem: Problem) -> bool:
    """Whether the lse is part of the result or needed to add sink logits."""
    return problem.wants_lse or problem.scores.sink_logits is not None


def _dense_mask_size(problem: Problem) -> int:
    """Elements of the dense mask that `_lower` would allocate."""
    problem, mask = trim(problem), problem.mask
    if problem.scores.bias is not None or mask.allow is not None:
        return 0  # dense already
    if problem.scores.alibi is not None:
        return problem.num_heads * problem.lq * problem.lk
    if blocks.plan(problem) is not None or mask.is_full or mask.is_causal:
        return 0
    by_row = [problem.offset] if isinstance(problem.offset, Tensor) else []
    tensors = [*by_row, *(tensor for _, tensor in mask.tensors())]
    return max((tensor.shape[0] for tensor in tensors), default=1) * problem.lq * problem.lk


def _has_learned_bias(problem: Problem) -> bool:
    bias, alibi = problem.scores.bias, problem.scores.alibi
    return any(score is not None and score.requires_grad for score in (bias, alibi))


def _fused(problem: Problem) -> Result:
    """The result of a trimmed problem of finite numbers, by torch's fused kernels."""
    problem = _with_positive_scale(problem)
    attn_mask, is_causal = _lower(problem)
    value_width = problem.v.shape[3]
    if problem.q.is_cuda:
        problem = _prepare_for_gpu(problem, attn_mask)
    elif problem.q.device.type in ("cpu", "meta"):
        problem, attn_mask = _prepare_for_cpu(problem, attn_mask)
    if _needs_lse(problem):
        return _fused_with_lse(problem, attn_mask, is_causal, value_width)
    if torch.onnx.is_in_onnx_export() and not torch.compiler.is_compiling():
        # torch's tracing exporter has no enable_gqa.
        k, v = (x.repeat_interleave(problem.group, dim=1) for x in (problem.k, problem.v))
        problem = problem._replace(k=k, v=v)
    # A bool even for a symbolic number of heads, for which bool() gives a SymBool.
    grouped = True if problem.group != 1 else False  # noqa: SIM210
    out = F.scaled_dot_product_attention(
        problem.q,
        problem.k,
        problem.v,
        attn_mask=attn_mask,
        dropout_p=problem.scores.dropout,
        is_causal=is_causal,
        scale=problem.scores.scale,
        enable_gqa=grouped,
    )
    if attn_mask is not None and torch.onnx.is_in_onnx_export():
        # Before opset 23, torch exports the mean of all values for rows without visible keys.
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        out = out.masked_fill(~seen.any(dim=-1, keepdim=True), 0)
    return Result(out if out.shape[3] == value_width else out[..., :value_width], None)


def _with_positive_scale(problem: Problem) -> Problem:
    """An equal problem with a positive scale, for kernels that multiply the -inf of hidden scores by the scale."""
    scale = problem.scores.scale
    if scale > 0:
        return problem
    q, scale = (-problem.q, -scale) if scale < 0 else (problem.q * 0, 1.0)
    return problem._replace(q=q, scores=problem.scores._replace(scale=scale))


def _lower(problem: Problem) -> tuple[Tensor | None, bool]:
    """The mask and the additive scores as ``attn_mask`` and ``is_causal``."""
    mask = problem.mask
    score = _additive_score(problem)
    if score is not None:
        return score if mask.is_full else torch.where(problem.visible(), score, -torch.inf), False
    if mask.is_full:
        return None, False
    if mask.is_causal and not isinstance(problem.offset, Tensor):
        if problem.offset == 0:
            return None, True
        # Compilers cannot trace causal_lower_right.
        at_the_end = 0 < problem.offset == problem.lk - problem.lq
        if problem.q.is_cuda and at_the_end and not torch.compiler.is_compiling():
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes a second

            return causal_lower_right(problem.lq, problem.lk), False
    return problem.visible(), False


def _additive_score(problem: Problem) -> Tensor | None:
    """The sum of bias and ALiBi, broadcastable to (B, H, Lq, Lk); None without either."""
    dtype = accumulation_dtype(problem.q.dtype)
    bias, alibi = problem.scores.bias, problem.scores.alibi
    score = None if bias is None else bias.to(dtype)
    if alibi is not None:
        penalty = alibi.to(dtype)[:, None, None] * problem.distance().to(dtype)
        score = -penalty if score is None else score - penalty
    return score


def _prepare_for_gpu(problem: Problem, attn_mask: Tensor | None) -> Problem:
    """An equal problem that torch's fused GPU kernels take, so that scores are not all in memory."""
    q, k, v = map(_aligned, (problem.q, problem.k, problem.v))
    if type(attn_mask) is Tensor and problem.group != 1 and problem.lq > 1:
        # The kernel with masks has no groups; torch would fall back to one with all scores in memory.
        k, v = (x.repeat_interleave(problem.group, dim=1) for x in (k, v))
    return problem._replace(q=q, k=k, v=v)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its rows are aligned to `ROW_BYTES`."""
    elements = (tensor.storage_offset(), *tensor.stride()[:3])
    return tensor.contiguous() if any(n * tensor.itemsize % ROW_BYTES for n in elements) else tensor


def _prepare_for_cpu(problem: Problem, attn_mask: Tensor | None) -> tuple[Problem, Tensor | None]:
    """An equal problem, and its mask, that torch's fused CPU kernel takes.

    Called by name, the kernel checks nothing and may read out of bounds: q, k and v must have one width and rows that
    are contiguous and do not overlap, and the mask contiguous rows, broadcast dimensions apart. Otherwise, torch would
    fall back to a kernel with all scores in memory.
    """
    q, k, v = problem.q, problem.k, problem.v
    missing = q.shape[3] - v.shape[3]
    if missing > 0:
        v = F.pad(v, (0, missing))  # zeros, which change no score and are cut off the output
    elif missing < 0:
        q, k = F.pad(q, (0, -missing)), F.pad(k, (0, -missing))
    if attn_mask is not None and attn_mask.stride(3) not in (0, 1):
        attn_mask = attn_mask.contiguous()
    return problem._replace(
        q=_with_contiguous_rows(q), k=_with_contiguous_rows(k), v=_with_contiguous_rows(v)
    ), attn_mask


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its rows are contiguous and do not overlap, as BLAS requires."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) >= tensor.shape[3] else tensor.contiguous()


def _fused_with_lse(problem: Problem, attn_mask: Tensor | None, is_causal: bool, value_width: int) -> Result:
    """`_fused` on a CPU by `_FlashWithLse`, cut to ``value_width`` and with sink logits."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = attn_mask.new_zeros((), dtype=accumulation_dtype(problem.q.dtype))
        attn_mask = torch.where(attn_mask, zero, -torch.inf)
    operands: Any = (*distinct(problem.q, problem.k, problem.v, attn_mask), is_causal, problem.scores.scale)
    kernel = _FlashWithLse.apply if problem.needs_grad else _FlashWithLse.forward
    out, lse = kernel(*operands)
    out = out[..., :value_width]
    if attn_mask is not None:
        # torch's kernel returns 0 for rows without visible keys.
        lse = lse.masked_fill((attn_mask == -torch.inf).all(dim=-1), -torch.inf)
    if problem.scores.sink_logits is not None:
        out, lse = add_sinks(out, lse, problem.scores.sink_logits)
    return Result(out, lse if problem.wants_lse else None)


class _FlashWithLse(torch.autograd.Function):
    """torch's fused CPU kernel, with a differentiable lse.

    ``aten::_scaled_dot_product_flash_attention_for_cpu`` returns the lse, but its backward ignores the gradient of it.
    That gradient is a term of ``dS = P * (dP - delta)``, where ``delta = rowsum(dO * O) - dlse``. One more column, 1 in
    dO, -dlse in O and 0 in V, makes the kernel's own ``rowsum`` that delta.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, attn_mask, is_causal, scale = inputs
        ctx.save_for_backward(q, k, v, attn_mask, *output)
        ctx.is_causal, ctx.scale = is_causal, scale

    @staticmethod
    def backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
        q, k, v, attn_mask, out, lse = ctx.saved_tensors
        width = v.shape[3]
        d_lse = d_lse.to(out.dtype)[..., None]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.cat([d_out, torch.ones_like(d_lse)], dim=-1),
            F.pad(q, (0, 1)),
            F.pad(k, (0, 1)),
            F.pad(v, (0, 1)),
            torch.cat([out, -d_lse], dim=-1),
            lse,
            0.0,
            ctx.is_causal,
            attn_mask=attn_mask,
            scale=ctx.scale,
        )
        return dq[..., :width], dk[..., :width], dv[..., :width], None, None, None
