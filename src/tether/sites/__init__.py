"""Which weights an adapter changes: names, globs, all-linear -> sites and their matrix views.

| | |
|---|---|
| `paths` | of modules, and the patterns that select them |
| `weights` | how a module stores its weight, and reading it |
| `select` | the sites that a configuration selects |
"""

from tether.sites.paths import base_modules, layer_index, matches, short_targets
from tether.sites.select import ALL_LINEAR, Site, find
from tether.sites.weights import (
    base_weight,
    check_readable,
    check_unmerged,
    is_conv1d,
    layout_of,
    stored_weight,
)

__all__ = [
    "ALL_LINEAR",
    "Site",
    "base_modules",
    "base_weight",
    "check_readable",
    "check_unmerged",
    "find",
    "is_conv1d",
    "layer_index",
    "layout_of",
    "matches",
    "short_targets",
    "stored_weight",
]
