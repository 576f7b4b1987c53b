"""The pictures that stand without JavaScript, one subject a file."""

from qkv.analysis.page.pictures.cache_growth import cache as cache
from qkv.analysis.page.pictures.cut_curves import cuts as cuts
from qkv.analysis.page.pictures.head_agreement import head_agreement as head_agreement
from qkv.analysis.page.pictures.masks_and_groups import layers as layers
from qkv.analysis.page.pictures.price_by_layer import against as against
from qkv.analysis.page.pictures.price_by_layer import price_by_layer as price_by_layer
from qkv.analysis.page.pictures.reach_by_layers import reach_by_layers as reach_by_layers
from qkv.analysis.page.pictures.savings_against_price import savings as savings

__all__ = ["against", "cache", "cuts", "head_agreement", "layers", "price_by_layer", "reach_by_layers", "savings"]
