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
from tether.layers.merged import (
    check_dora,
    check_in_place,
    merged_beside,
    originals,
    rewrite,
    targets,
    withdraw,
)
from tether.layers.parking import Budget, bring_back, budgets_of, park, set_budget, share_anchors
from tether.layers.record import Holder, Layer, Parked, Record, Rows
from tether.layers.site import Anchor, SiteLayer
from tether.layers.whole import BiasLayer, ModuleLayer

__all__ = [
    "Anchor",
    "BiasLayer",
    "Budget",
    "Holder",
    "Layer",
    "ModuleLayer",
    "Parked",
    "Record",
    "Rows",
    "SiteAdapters",
    "SiteLayer",
    "apply_adapters",
    "bring_back",
    "budgets_of",
    "carriers",
    "check_dora",
    "check_in_place",
    "hang",
    "layers_of",
    "merged_beside",
    "originals",
    "park",
    "records_of",
    "rewrite",
    "set_budget",
    "share_anchors",
    "take_off",
    "targets",
    "withdraw",
]
