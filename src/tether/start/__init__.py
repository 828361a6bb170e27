"""init: a model and a configuration -> an adapter. Reads the base, changes nothing."""

from tether.start.adapter import Found, Search, find, init
from tether.start.model import base_class, base_name, original
from tether.start.site import seed_for

__all__ = ["Found", "Search", "base_class", "base_name", "find", "init", "original", "seed_for"]
