"""transformers' Trainer and its subclasses, TRL's among them: `adapt` is the way in.

    model = AutoModelForCausalLM.from_pretrained(...)
    tether.attach(model, last_adapter("run") or tether.LoraConfig(init="pissa"))
    trainer = adapt(SFTTrainer)(model=model, args=args, train_dataset=data,
                                callbacks=[ExportLora(), ReportDrift()])
    trainer.train()

A mixin before the Trainer, rather than a callback or a wrapper of the model: callbacks are not
asked what is saved, and code that reads the model's class, signature or attributes would meet a
wrapper. See `tether.integrations.transformers.trainer` for what is overridden, and why.
"""

from tether.drift import Drift, measure_drift
from tether.errors import MissingExtraError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "Training in a Trainer needs transformers. Install tether with its extra 'trl': "
        "pip install '.[trl]' in its folder."
    ) from error

from tether.integrations.transformers.adapt import adapt
from tether.integrations.transformers.callbacks import (
    CheckpointCallback,
    ExportLora,
    ReportDrift,
)
from tether.integrations.transformers.folders import ADAPTER_FILE, last_adapter
from tether.integrations.transformers.quantized import allow_quantized
from tether.integrations.transformers.reference import Reference
from tether.integrations.transformers.trainer import AdapterTrainer

__all__ = [
    "ADAPTER_FILE",
    "AdapterTrainer",
    "CheckpointCallback",
    "Drift",
    "ExportLora",
    "Reference",
    "ReportDrift",
    "adapt",
    "allow_quantized",
    "last_adapter",
    "measure_drift",
]
