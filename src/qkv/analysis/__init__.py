"""What models of transformers attend to on a text (`record`), and what changes would cost them (`price`)."""

from qkv.analysis.pricing import Price as Price
from qkv.analysis.pricing import PriceInterrupted as PriceInterrupted
from qkv.analysis.pricing import Together as Together
from qkv.analysis.pricing import losses as losses
from qkv.analysis.pricing import price as price
from qkv.analysis.reach import Reach as Reach
from qkv.analysis.reach import reach as reach
from qkv.analysis.recording import Recording as Recording
from qkv.analysis.recording import record as record
from qkv.analysis.seen import Against as Against
from qkv.analysis.seen import Agreement as Agreement
from qkv.analysis.seen import CostlyToken as CostlyToken
from qkv.analysis.seen import Saving as Saving
from qkv.analysis.seen import Seen as Seen
from qkv.analysis.seven import Seven as Seven
from qkv.analysis.seven import seven as seven
from qkv.layer_record import LayerRecord as LayerRecord

__all__ = [
    "Against",
    "Agreement",
    "CostlyToken",
    "LayerRecord",
    "Price",
    "PriceInterrupted",
    "Reach",
    "Recording",
    "Saving",
    "Seen",
    "Seven",
    "Together",
    "losses",
    "price",
    "reach",
    "record",
    "seven",
]
