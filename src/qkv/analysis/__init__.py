"""What models of transformers attend to on a text (`record`), and what changes would cost them (`price`)."""

from qkv.analysis.pricing import Price as Price
from qkv.analysis.pricing import PriceInterrupted as PriceInterrupted
from qkv.analysis.pricing import Together as Together
from qkv.analysis.pricing import losses as losses
from qkv.analysis.pricing import price as price
from qkv.analysis.recording import Recording as Recording
from qkv.analysis.recording import record as record
from qkv.analysis.seen import Against as Against
from qkv.analysis.seen import CostlyToken as CostlyToken
from qkv.analysis.seen import Saving as Saving
from qkv.analysis.seen import Seen as Seen
from qkv.layer_record import LayerRecord as LayerRecord

__all__ = [
    "Against",
    "CostlyToken",
    "LayerRecord",
    "Price",
    "PriceInterrupted",
    "Recording",
    "Saving",
    "Seen",
    "Together",
    "losses",
    "price",
    "record",
]
