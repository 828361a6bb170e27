"""peft: for those who train with it already. Keep the start of an adapter, save it, adopt it.

model = get_peft_model(base, LoraConfig(init_lora_weights="pissa", …))
track(model)                       # before training: A0 and B0 are remembered
…
save_as_lora(model, "adapter")     # a plain LoRA for the original base; the model goes on living
handle = adopt(model, base="…")    # or go on training on the restored base
"""

from tether import export
from tether.integrations.peft.adopt import Adopted, Restored, adopt
from tether.integrations.peft.live import is_peft
from tether.integrations.peft.snapshot import read, save_as_lora, snapshot, track
from tether.integrations.peft.starts import Tracker

__all__ = [
    "Adopted",
    "Restored",
    "Tracker",
    "adopt",
    "is_peft",
    "read",
    "save_as_lora",
    "snapshot",
    "track",
]

# So that `tether.save_as_lora` takes a live peft model too.
export.readers.append(read)
