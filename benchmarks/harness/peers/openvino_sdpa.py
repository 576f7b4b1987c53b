"""OpenVINO's ScaledDotProductAttention, in a model with this single node."""

import importlib.util

import torch
from torch import Tensor

from harness.case import Case
from qkv.bench.attention_call import PreparedCall

NAME = "openvino"

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def why_not(case: Case, dtype: torch.dtype) -> str | None:
    """See `Peer`."""
    if importlib.util.find_spec("openvino") is None:
        return "is not installed (openvino)"
    if case.backward:
        return "has no backward"
    if dtype not in PRECISIONS:
        return "computes fp16 in another precision on CPU"
    if case.heads != case.kv_heads:
        return "requires as many KV heads as query heads in this operation"
    if case.window is not None or case.mask in ("padding", "packed"):
        return "has no windows, padding or packed texts in this operation"
    if case.is_decoding:
        return "uses another operation for decoding, with a cache inside the model"
    if case.mask == "causal" and case.lq != case.lk:
        return "aligns causal masks top-left"
    return None


def prepare(case: Case, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
    """See `Peer`."""
    import openvino
    from openvino import opset13

    kind = getattr(openvino.Type, PRECISIONS[dtype])
    parameters = [opset13.parameter(list(x.shape), kind, name=name) for name, x in (("q", q), ("k", k), ("v", v))]
    node = opset13.scaled_dot_product_attention(*parameters, causal=case.mask == "causal")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    output = torch.empty_like(q)

    def shared(x: Tensor) -> openvino.Tensor:
        bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
        return openvino.Tensor(bits.numpy(), openvino.Shape(list(x.shape)), kind)

    for index, x in enumerate((q, k, v)):
        request.set_input_tensor(index, shared(x))
    request.set_output_tensor(0, shared(output))

    def run() -> tuple[Tensor, ...]:
        request.infer()
        return (output,)

    return run
