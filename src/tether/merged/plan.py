"""Which tensors of a checkpoint an adapter changes, and what becomes of a tied output head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from tether.checkpoint import Checkpoint
from tether.errors import (
    ConfigError,
    ModelError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedModuleError,
)
from tether.sites import layer_index
from tether.value import Adapter, Json, LayerAdapter, Trained

HEAD = "lm_head.weight"
TIE = "tie_word_embeddings"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Token embeddings to which transformers' causal language models tie a head named `lm_head`.
EMBEDDINGS = (
    "model.embed_tokens",
    "model.decoder.embed_tokens",
    "transformer.wte",
    "transformer.word_embeddings",
    "backbone.embeddings",
    "gpt_neox.embed_in",
)
# Causal language models with such an embedding whose head has another name.
_OTHER_HEADS = ("WhisperForCausalLM", "TrOCRForCausalLM")
# Endings of classes without an output head: there is nothing that could be tied.
_HEADLESS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True, slots=True)
class Edit:
    """A tensor of the merged model that is not a copy of the base's own.

    Attributes:
        path: of the site, or name of the parameter, as in the adapter.
        source: the base's tensor that it starts from.
        change: what is added; None for a head that is only stored apart from its embedding.
    """

    path: str
    source: str
    change: LayerAdapter | Trained | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merged model holds.

    Attributes:
        shards: file -> names of its tensors.
        edits: name of a tensor in the merged model -> how it is made; all others are copied.
        config: entries of config.json that change.
        untied: whether a head that was tied to the embedding is a tensor of its own now.
    """

    shards: Mapping[str, tuple[str, ...]]
    edits: Mapping[str, Edit]
    config: Mapping[str, Json]
    untied: bool


def make(base: Checkpoint, adapter: Adapter) -> Plan:
    """Find every tensor that an adapter changes, before any is read.

    Args:
        base: the checkpoint.
        adapter: made on it.

    Returns:
        the plan.

    Raises:
        ModelError: the folder has no config.json.
        UnsupportedModuleError: the base is quantised, or tied in a way that cannot be untied here.
        UnknownNameError: the base lacks a tensor that the adapter changes.
        ShapeMismatchError: a tensor has another shape.
    """
    if not base.config:
        raise ModelError(f"{base.folder}: has no config.json. Give the whole folder of a model.")
    _refuse_quantised(base)
    edits: dict[str, Edit] = {}
    for path, parameter, change in _changes(adapter):
        name, source = _find(base, path, parameter)
        if name in edits:
            raise ConfigError(
                f"the adapter changes {name!r} twice: {edits[name].path!r}, {path!r}."
            )
        label = path if isinstance(change, LayerAdapter) else f"{path}.{parameter}"
        edits[name] = Edit(label, source, change)
        _check(base, edits[name], adapter)
    touched = [name for name, edit in edits.items() if _of_vocabulary(base, edit)]
    if not touched or not _may_be_tied(base):
        return Plan(base.shards, edits, {}, untied=False)
    shards, stored = dict(base.shards), HEAD in base
    if not stored:
        source = _tied_embedding(base)
        for name in touched:
            if name not in (source, HEAD):
                raise _tied_error(base, name)
        edits.setdefault(HEAD, Edit(HEAD, source, None))
        file = next(file for file, names in shards.items() if source in names)
        shards[file] = (*shards[file], HEAD)
    untied = not stored or base.config.get(TIE) is True
    return Plan(shards, edits, {TIE: False}, untied)


def _changes(adapter: Adapter) -> Iterator[tuple[str, str, LayerAdapter | Trained]]:
    yield from ((path, "weight", layer) for path, layer in adapter.layers.items())
    yield from ((path, "bias", bias) for path, bias in adapter.biases.items())
    for path, state in adapter.modules.items():
        yield from ((path, parameter, value) for parameter, value in state.items())


def _find(base: Checkpoint, path: str, parameter: str) -> tuple[str, str]:
    """The tensor's name in the merged model, and the base's tensor that it starts from."""
    if f"{path}.{parameter}" == HEAD and HEAD not in base and _may_be_tied(base):
        return HEAD, _tied_embedding(base)
    name = base.weight_name(path, parameter)
    return name, name


def _check(base: Checkpoint, edit: Edit, adapter: Adapter) -> None:
    shape, dtype, change = base.shape(edit.source), base.dtype(edit.source), edit.change
    assert change is not None
    layer = change if isinstance(change, LayerAdapter) else None
    wanted = layer.layout.shape if layer else tuple(change.trainable.shape)
    if dtype not in _FLOATING:
        raise UnsupportedModuleError(
            f"{edit.path!r}: {edit.source!r} in {base.folder} is {dtype}, not floating point: the "
            "base is quantised. Give the unquantised model."
        )
    if wanted != shape:
        raise ShapeMismatchError(
            f"{edit.path!r}: {edit.source!r} in {base.folder} is {shape}, the adapter changes one "
            f"of {wanted}. Give the base model that the adapter was made on."
        )
    if layer and adapter.provenance.tether_version is None:
        _refuse_unclear_square(base, edit.path, layer)


def _refuse_unclear_square(base: Checkpoint, path: str, layer: LayerAdapter) -> None:
    """A PEFT folder has one flag, `fan_in_fan_out`, for all sites; in a square one it is all."""
    kind, shape = layer.layout.kind, layer.layout.shape
    if kind not in ("linear", "transposed") or shape[0] != shape[1]:
        return
    if (kind == "transposed") != _stores_transposed(base):
        raise ShapeMismatchError(
            f"site {path!r}: weight {shape} is square, and the adapter's fan_in_fan_out "
            f"({kind == 'transposed'}) is not what the other weights of {base.folder} show: "
            "whether it is stored transposed cannot be told. Merge the native file instead."
        )


def _stores_transposed(base: Checkpoint) -> bool:
    """Whether a bias fits the columns of its weight and not the rows: transformers' Conv1D."""
    for name in base.names:
        bias = name.removesuffix(".weight") + ".bias"
        if bias != name and bias in base and len(base.shape(name)) == 2:
            rows, columns = base.shape(name)
            if rows != columns and base.shape(bias) == (columns,):
                return True
    return False


def _refuse_quantised(base: Checkpoint) -> None:
    nested = [value for value in base.config.values() if isinstance(value, dict)]
    for config in (base.config, *nested):
        settings = config.get("quantization_config") or config.get("compression_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise UnsupportedModuleError(
                f"{base.folder}: is quantised ({method}): W + ΔW would be rounded to its few "
                "values. Merge into the unquantised model, then quantise the result."
            )


def _of_vocabulary(base: Checkpoint, edit: Edit) -> bool:
    """Whether a tensor may be token embedding or output head: a row per token, in no layer."""
    if layer_index(edit.path) is not None:
        return False
    shape, text = base.shape(edit.source), base.config.get("text_config")
    sizes = [c.get("vocab_size") for c in (base.config, text) if isinstance(c, dict)]
    return len(shape) == 2 and (edit.path in EMBEDDINGS or shape[0] in sizes)


def _may_be_tied(base: Checkpoint) -> bool:
    # Where the setting is left out, the model's class decides; most language models then tie.
    return base.config.get(TIE, True) is not False and not _architecture(base).endswith(_HEADLESS)


def _architecture(base: Checkpoint) -> str:
    names = base.config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else ""
    # `GPT2LMHeadModel` has a head; `GPT2Model` has none.
    return str(name).replace("LMHeadModel", "ForCausalLM")


def _tied_embedding(base: Checkpoint) -> str:
    """The tensor that the head of a causal language model is tied to."""
    architecture = _architecture(base)
    if (
        not architecture.endswith("ForCausalLM")
        or architecture in _OTHER_HEADS
        or base.config.get("is_encoder_decoder")
    ):
        raise _tied_error(base, HEAD)
    found = set()
    for path in EMBEDDINGS:
        try:
            found.add(base.weight_name(path))
        except UnknownNameError:
            continue
    if len(found) != 1:
        raise _tied_error(base, HEAD)
    return found.pop()


def _tied_error(base: Checkpoint, name: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{base.folder}: the adapter changes {name!r}, and the token embedding and the output head "
        f"of {_architecture(base) or 'this model'} may be one tensor; how to store them apart is "
        "known for causal language models with a head named 'lm_head' only. Save the base with "
        f"{TIE}=false and a head of its own, and merge into that."
    )
