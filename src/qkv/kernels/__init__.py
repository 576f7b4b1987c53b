"""The compiled CPU kernel, loaded once, and its operators."""

from qkv.kernels.binding import LIBRARY as LIBRARY
from qkv.kernels.binding import Library as Library
from qkv.kernels.binding import absence as absence
from qkv.kernels.binding import load as load
from qkv.kernels.binding import loaded as loaded
from qkv.kernels.binding import use as use
from qkv.kernels.operators import Call as Call
from qkv.kernels.operators import append as append
from qkv.kernels.operators import can_bypass_dispatcher as can_bypass_dispatcher
from qkv.kernels.operators import count_scores as count_scores
from qkv.kernels.operators import fast_forward as fast_forward
from qkv.kernels.operators import forward as forward
from qkv.kernels.operators import forward_with_gradients as forward_with_gradients
from qkv.kernels.operators import is_plain as is_plain
from qkv.kernels.operators import is_tracing as is_tracing
from qkv.kernels.operators import quantize as quantize
from qkv.kernels.sequences import Sequences as Sequences
from qkv.kernels.sequences import forward_sequences as forward_sequences
from qkv.kernels.sequences import forward_sequences_with_gradients as forward_sequences_with_gradients
