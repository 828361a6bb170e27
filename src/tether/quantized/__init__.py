"""Quantised base weights: recognised, read and fingerprinted, never written.

One file per library; another one is a reader more in `_READERS`. No such library is imported here:
a weight is told by its class, and who holds one has the library loaded already.
"""

from tether.quantized.foreign import check_layer, is_linear
from tether.quantized.read import check, dense, read, values
from tether.quantized.stored import Quantized

__all__ = ["Quantized", "check", "check_layer", "dense", "is_linear", "read", "values"]
