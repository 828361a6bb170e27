"""How a site's start is chosen. One file per method; a file in this folder is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from tether.methods.base import Context, Method, Nested, get, method_settings, names, register

__all__ = ["Context", "Method", "Nested", "get", "method_settings", "names", "register"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
