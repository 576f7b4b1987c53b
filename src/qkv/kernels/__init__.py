"""The compiled CPU kernel, loaded once."""

from qkv.kernels.binding import Library as Library
from qkv.kernels.binding import absence as absence
from qkv.kernels.binding import loaded as loaded
