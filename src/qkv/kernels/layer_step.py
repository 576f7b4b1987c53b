"""A layer's call with few tokens, from its input to its output, by the kernel."""

from qkv.kernels.binding import loaded
from qkv.kernels.structs import StepNumbers, StepTensors, pack_step


def layer_step(tensors: StepTensors, numbers: StepNumbers) -> bool:
    """Writes keys, values and ``out`` of new tokens.

    Returns:
        True if written. False, with nothing changed, for tensors that do not fit together or are not supported: shapes,
        dtypes and strides are checked in C (native/src/abi/fast_layer_step.cpp).

    Raises:
        MemoryError: if scratch memory cannot be allocated.
    """
    call = loaded().layer_step
    if call is None:
        return False
    status = call(*tensors, pack_step(numbers))
    if status == 1:
        raise MemoryError(f"qkv's kernel: not enough scratch memory for {tuple(tensors.x.shape)} tokens; pass fewer.")
    return status == 0
