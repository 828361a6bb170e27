"""The README.md of a PEFT folder: what the adapter is and how to load it."""

import json

from tether.provenance import Provenance
from tether.value import Adapter


def model_card(adapter: Adapter, dtype: str) -> str:
    """A model card in the hub's form.

    Args:
        adapter: plain, as written.
        dtype: name of the dtype of the tensors.

    Returns:
        Markdown with a metadata block.
    """
    origin = adapter.provenance
    base = origin.base_model
    rank = max(layer.rank for layer in adapter.layers.values())
    facts = {
        "start": origin.method,
        "sites": len(adapter.layers),
        "rank of this file": rank,
        "dtype": dtype,
        "learning rate": origin.learning_rate,
        "steps": origin.steps,
        "seed": origin.seed,
        "base": _quantised(origin),
        "gap": _gap(origin),
    }
    rows = "\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items() if v is not None)
    metadata = ["library_name: peft", "tags:", "- lora", "- tether"]
    if base is not None:
        # JSON strings are YAML strings: a name from elsewhere cannot break out of its line.
        metadata.insert(0, f"base_model: {_quoted(base)}")
    name = _quoted(base) if base is not None else '"the base model"'
    return f"""---
{chr(10).join(metadata)}
---
# LoRA adapter

A plain LoRA for the **unchanged** base model: no residual weights, no second file.

| | |
|---|---|
{rows}

{_load(origin)}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name})
model = PeftModel.from_pretrained(model, "path/of/this/folder")
```

The scaling is folded into `lora_B` (`lora_alpha` = `r`), and every site has the same rank, so that
all LoRA runtimes read it alike.
"""


def _quantised(origin: Provenance) -> str | None:
    kinds = origin.quantization
    return f"quantised as {', '.join(kinds)}" if kinds else None


def _gap(origin: Provenance) -> str | None:
    """How far a quantised base lies from the original weights, where that was measured."""
    if not origin.gaps:
        return None
    low, high = min(origin.gaps.values()), max(origin.gaps.values())
    return f"of this base to the original weights: {low:.2g} to {high:.2g} of their norm, per site"


def _load(origin: Provenance) -> str:
    """What to do before the code that follows."""
    if not origin.quantization:
        return ""
    return (
        "It belongs to a **quantised** base. Load that base quantised in the same way, or its\n"
        "output differs by more than what the adapter was trained for.\n\n"
    )


def _quoted(text: str) -> str:
    """A string for YAML and Python alike: JSON, with what YAML does not print escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)


def _cell(value: object) -> str:
    """One cell of a table, whatever a file of others put there."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
