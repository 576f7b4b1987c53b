"""The compiled CPU kernel: forward passes over everything that an interval, padding and per-head scores describe."""

import torch
from torch import Tensor

from qkv import kernels
from qkv.backends.result import Result
from qkv.kernels.binding import PROBLEM, UNBOUNDED
from qkv.problem import Problem

NAME = "native"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST_POSITION = 1 << 30
"""Positions are 32 bits wide in the kernel."""


def why_not(problem: Problem) -> list[str]:
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    if not _is_plain(q, k, v):
        return ["the kernel is called outside of compilation, export and functorch alone, on plain tensors"]
    absent = kernels.absence()
    if absent is not None:
        return [absent]
    reasons: list[str] = []
    if q.device.type != "cpu":
        reasons.append("the kernel runs on CPU")
    if q.dtype not in DTYPES:
        reasons.append("the kernel has no fp64")
    if problem.needs_grad:
        reasons.append("the kernel has no backward yet")
    if problem.dropout:
        reasons.append("the kernel has no dropout yet")
    if problem.bias is not None:
        reasons.append("the kernel adds no bias yet")
    if mask.document_ids is not None or mask.allow is not None:
        reasons.append("the kernel takes no documents and no dense masks yet")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        reasons.append("the last dimension of q, k and v must be contiguous for the kernel")
    if not -LARGEST_POSITION < problem.offset < LARGEST_POSITION:
        reasons.append("the kernel counts positions in 32 bits")
    return reasons


def why_rather_not(problem: Problem) -> list[str]:
    # Measured: benchmarks/kernel.py. A single fp32 query shares nothing among heads without groups, and little among
    # few keys; torch's kernel then has less to set up.
    fp32, lq, lk = problem.q.dtype == torch.float32, problem.lq, problem.lk
    if lq == 1 and (lk < (512 if fp32 else 16) or (fp32 and problem.group == 1 and problem.q.shape[3] < 128)):
        return [f"for one query over {lk} keys in groups of {problem.group} torch's kernel is faster"]
    if fp32 and lq > 1 and lq * lk < 1024 and problem.mask.is_full:
        return [f"for {lq} queries over {lk} keys without a mask torch's kernel is faster"]
    return []


def run(problem: Problem) -> Result:
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    batch, heads, lq, width = q.shape
    kv_heads, lk, value_width = v.shape[1:]
    # Tokens outside of heads, as torch's kernels lay it out: joining the heads again copies nothing.
    out = q.new_empty((batch, lq, heads, value_width)).transpose(1, 2)
    lse = q.new_empty((batch, heads, lq), dtype=torch.float32) if problem.wants_lse else None
    keep = None if mask.keep is None else mask.keep.contiguous()
    lengths = None if mask.lengths is None else mask.lengths.to(torch.int64).contiguous()
    alibi, sink_logits = _floats(problem.alibi), _floats(problem.sink_logits)
    kernels.loaded().forward(
        PROBLEM.pack(
            DTYPES[q.dtype],
            *(batch, heads, kv_heads, lq, lk, width, value_width),
            *(q.data_ptr(), *q.stride()[:3]),
            *(k.data_ptr(), *k.stride()[:3]),
            *(v.data_ptr(), *v.stride()[:3]),
            *(out.data_ptr(), *out.stride()[:3]),
            _address(lse),
            *(problem.offset, UNBOUNDED if mask.left is None else mask.left),
            *(UNBOUNDED if mask.right is None else mask.right, mask.sink_tokens),
            *(_address(keep), 0 if keep is None or keep.shape[0] == 1 else lk),
            *(_address(lengths), 0 if lengths is None or lengths.shape[0] == 1 else 1),
            *(problem.scale, problem.softcap or 0.0),
            *(_address(alibi), _address(sink_logits)),
            torch.get_num_threads(),
        )
    )
    return Result(out, lse)


def _is_plain(*tensors: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
