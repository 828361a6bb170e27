"""The live parts of adapters: child modules of the base's modules, reached by a forward hook.

The base module stays what it was: its class, its weight, its keys. The hook is one function for
all modules and finds its layers through the module it is called on, so that `copy.deepcopy` and
pickling keep each copy with its own factors.
"""

from tether.layers.hooks import (
    SiteAdapters,
    apply_adapters,
    carriers,
    hang,
    layers_of,
    records_of,
    take_off,
)
from tether.layers.record import Layer, Record, Rows
from tether.layers.site import Anchor, SiteLayer
from tether.layers.whole import BiasLayer, ModuleLayer

__all__ = [
    "Anchor",
    "BiasLayer",
    "Layer",
    "ModuleLayer",
    "Record",
    "Rows",
    "SiteAdapters",
    "SiteLayer",
    "apply_adapters",
    "carriers",
    "hang",
    "layers_of",
    "records_of",
    "take_off",
]
