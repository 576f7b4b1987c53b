"""onnxruntime's GroupQueryAttention, in a model with this single node."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from qkv.bench.attention_call import PreparedCall

NAME = "onnxruntime"

DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}
MAX_SCORES = 8192**2
"""Of one head. Windows do not save work: all scores are computed and masked."""


def why_not(case: Case, dtype: torch.dtype) -> str | None:
    """See `Peer`."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f"is not installed ({', '.join(missing)})"
    if case.backward:
        return "has no backward"
    if dtype not in DTYPES:
        return "has no bf16 on CPU"
    if case.mask != "causal":
        return "is always causal"
    if case.lq * case.lk > MAX_SCORES:
        return f"computes all scores of {case.lq} queries, which takes too long"
    return None


def prepare(case: Case, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
    """See `Peer`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_model(case, dtype), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    def bind(name: str, tensor: Tensor, *, is_output: bool = False) -> None:
        add = binding.bind_output if is_output else binding.bind_input
        array = tensor.numpy()
        add(name, "cpu", 0, array.dtype, list(tensor.shape), tensor.data_ptr())

    inputs = {
        "query": _tokens_of_heads(q),
        "key": _tokens_of_heads(k[:, :, case.offset :]),
        "value": _tokens_of_heads(v[:, :, case.offset :]),
        "seqlens_k": torch.full((case.batch,), case.lk - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor([case.lk], dtype=torch.int32),
    }
    # The same buffer is input and output cache, so that old entries are not copied.
    caches = {"key": k.clone(), "value": v.clone()}
    output = torch.empty_like(inputs["query"])
    for name, tensor in inputs.items():
        bind(name, tensor)
    for name, tensor in caches.items():
        bind(f"past_{name}", tensor)
        bind(f"present_{name}", tensor, is_output=True)
    bind("output", output, is_output=True)
    as_heads = output.unflatten(2, (case.heads, case.head_dim)).transpose(1, 2)

    # The binding holds only addresses, so the call keeps the tensors alive.
    def run(kept_alive: object = (inputs, caches)) -> tuple[Tensor, ...]:
        session.run_with_iobinding(binding)
        return (as_heads,)

    return run


def _tokens_of_heads(x: Tensor) -> Tensor:
    """Converts ``(B, H, L, D)`` to ``(B, L, H * D)``."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _model(case: Case, dtype: torch.dtype) -> bytes:
    from onnx import TensorProto, helper

    def tensor(name: str, *shape: int, kind: str = DTYPES[dtype]) -> Any:
        return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)

    new, cache = case.lq, (case.batch, case.kv_heads, case.lk, case.head_dim)
    inputs = [
        tensor("query", case.batch, new, case.heads * case.head_dim),
        tensor("key", case.batch, new, case.kv_heads * case.head_dim),
        tensor("value", case.batch, new, case.kv_heads * case.head_dim),
        tensor("past_key", *cache),
        tensor("past_value", *cache),
        tensor("seqlens_k", case.batch, kind="INT32"),
        tensor("total_sequence_length", 1, kind="INT32"),
    ]
    outputs = [
        tensor("output", case.batch, new, case.heads * case.head_dim),
        tensor("present_key", *cache),
        tensor("present_value", *cache),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        local_window_size=-1 if case.window is None else case.window,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], NAME, inputs, outputs), opset_imports=opsets, ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized
