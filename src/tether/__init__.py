"""tether: LoRA adapters that start from the weights they adapt, and never damage them.

The initial factors are frozen (the anchor), the displacement is trained, the base is never written:

    ΔW = s·(B·dA + dB·A0)
"""

from importlib.metadata import version as _version

from tether import combine as combine
from tether.algebra import to_lora
from tether.attach import attach
from tether.compare import Comparison, compare
from tether.config import LoraConfig
from tether.conversion import ConversionReport
from tether.errors import TetherError
from tether.export import save_as_lora
from tether.fingerprints import fingerprint
from tether.formats import save
from tether.handle import Handle, handles
from tether.integrations import peft as _peft  # noqa: F401  save_as_lora then reads its models
from tether.memory import Memory, memory
from tether.merge import merge, unmerge
from tether.offload import limit
from tether.provenance import Fingerprint, Provenance
from tether.rescue import load
from tether.rows import rows
from tether.start import init
from tether.swap import slot, swap
from tether.switch import activate, only, reference
from tether.value import Adapter, Factors, LayerAdapter, Layout, Trained

__version__ = _version("tether")

__all__ = [
    "Adapter",
    "Comparison",
    "ConversionReport",
    "Factors",
    "Fingerprint",
    "Handle",
    "LayerAdapter",
    "Layout",
    "LoraConfig",
    "Memory",
    "Provenance",
    "TetherError",
    "Trained",
    "activate",
    "attach",
    "compare",
    "fingerprint",
    "handles",
    "init",
    "limit",
    "load",
    "memory",
    "merge",
    "only",
    "reference",
    "rows",
    "save",
    "save_as_lora",
    "slot",
    "swap",
    "to_lora",
    "unmerge",
]
