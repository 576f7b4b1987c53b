"""Figures of matplotlib: of masks, heads and caches, of what layers attend to, and of what changes cost.

Each function takes the axes to draw in, or makes a figure of its own, and returns the figure. None changes a setting of
matplotlib, and none uses pyplot, so that notebooks show them after ``%matplotlib inline``. Install them by
``pip install 'qkv[plots]'``.
"""

from qkv.plots.attended import block_map as block_map
from qkv.plots.attended import cut as cut
from qkv.plots.attended import heads as heads
from qkv.plots.canvas import svg as svg
from qkv.plots.costs import agreement as agreement
from qkv.plots.costs import price as price
from qkv.plots.costs import savings as savings
from qkv.plots.costs import tokens as tokens
from qkv.plots.mechanisms import cache as cache
from qkv.plots.mechanisms import groups as groups
from qkv.plots.mechanisms import mask as mask
from qkv.plots.mechanisms import reach as reach

__all__ = [
    "agreement",
    "block_map",
    "cache",
    "cut",
    "groups",
    "heads",
    "mask",
    "price",
    "reach",
    "savings",
    "svg",
    "tokens",
]
