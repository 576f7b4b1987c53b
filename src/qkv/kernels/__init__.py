"""The compiled CPU kernel: loading it, calling it, and its operators in torch."""

from qkv.kernels.append import append as append
from qkv.kernels.append import append_pages as append_pages
from qkv.kernels.append import quantize as quantize
from qkv.kernels.binding import LIBRARY as LIBRARY
from qkv.kernels.binding import Library as Library
from qkv.kernels.binding import absence as absence
from qkv.kernels.binding import load as load
from qkv.kernels.binding import loaded as loaded
from qkv.kernels.binding import supported_isas as supported_isas
from qkv.kernels.binding import use as use
from qkv.kernels.dispatch import can_bypass_dispatcher as can_bypass_dispatcher
from qkv.kernels.forward import count_scores as count_scores
from qkv.kernels.forward import fast_forward as fast_forward
from qkv.kernels.forward import forward as forward
from qkv.kernels.linear import fast_linear as fast_linear
from qkv.kernels.linear import is_faster as is_faster
from qkv.kernels.sequences import Sequences as Sequences
from qkv.kernels.sequences import forward_sequences as forward_sequences
from qkv.kernels.structs import Call as Call
from qkv.tracing import can_read_values as can_read_values
from qkv.tracing import is_exact_tensor as is_exact_tensor
from qkv.tracing import is_tracing as is_tracing
