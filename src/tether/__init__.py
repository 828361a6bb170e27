"""tether: LoRA adapters that start from the weights they adapt, and never damage them.

The initial factors are frozen (the anchor), the displacement is trained, the base is never written:

    ΔW = s·(B·dA + dB·A0)
"""

from importlib.metadata import version as _version

from tether.algebra import to_lora
from tether.attach import attach
from tether.config import LoraConfig
from tether.conversion import ConversionReport
from tether.errors import TetherError
from tether.export import save_as_lora
from tether.fingerprints import fingerprint
from tether.formats import load, save
from tether.handle import Handle, handles
from tether.provenance import Fingerprint, Provenance
from tether.start import init
from tether.switch import only, reference
from tether.value import Adapter, Factors, LayerAdapter, Layout

__version__ = _version("tether")

__all__ = [
    "Adapter",
    "ConversionReport",
    "Factors",
    "Fingerprint",
    "Handle",
    "LayerAdapter",
    "Layout",
    "LoraConfig",
    "Provenance",
    "TetherError",
    "attach",
    "fingerprint",
    "handles",
    "init",
    "load",
    "only",
    "reference",
    "save",
    "save_as_lora",
    "to_lora",
]
