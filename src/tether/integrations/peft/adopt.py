"""adopt: from a live peft model to a tether handle on the restored base."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tether import whole
from tether.attach import attach
from tether.errors import ConfigError, UnsupportedAdapterError, UntrackedError
from tether.handle import Handle, handles
from tether.integrations.peft import originals
from tether.integrations.peft.find import find, trained_biases
from tether.integrations.peft.live import Live
from tether.integrations.peft.originals import Base
from tether.integrations.peft.snapshot import Folder
from tether.integrations.peft.starts import Tracker
from tether.integrations.peft.values import source_of, take
from tether.value import Adapter


@dataclass(frozen=True, slots=True)
class Restored:
    """How close a weight that `adopt` wrote is to the original.

    Attributes:
        exact: it was re-read from the base's folder: the original, bit for bit.
        error: a bound on |W' − W|_F / |W|_F; 0 if exact. It holds if the adapter's start is right.
    """

    exact: bool
    error: float


class Adopted(Handle):
    """The handle that `adopt` returns.

    Attributes:
        restored: site path -> how close its weight is; only weights that were written.
    """

    def __init__(self, handle: Handle, restored: Mapping[str, Restored]) -> None:
        """Point at an adopted adapter; use `adopt` instead.

        Args:
            handle: of the adapter.
            restored: what became of the base's weights.
        """
        super().__init__(handle.model, handle.name, handle._layers)
        self.restored = dict(restored)


@torch.no_grad()
def adopt(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    base: Folder | None = None,
    trainable: bool | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Adopted:
    """Take a live peft model over: its adapters on the restored base, peft's layers gone.

    This writes base weights, because that is what it is for: into every weight that an adapter took
    a part out of, the original is written back, bit for bit from `base`, else W_res + s·B0·A0,
    computed in float64 and rounded. Trained biases are set back to their start. All adapters of the
    model are taken over under their names; those that are active in peft are active afterwards.
    Everything or nothing: on an error the peft model is as it was.

    The output stays what it was, up to rounding in the weights' dtype, where all adapters that took
    parts out of the weights are active. Where one of several is not, peft's output lacked its part,
    which is there again. Modes stay as they are. Do not use the PeftModel any more: `handle.model`
    is the plain base model.

    The factors are new parameters: training goes on with a new optimizer on `handle.parameters()`,
    or with the old one, given as `optimizer`. A displacement has the gradient of its factor, so the
    state of SGD, Adam and the like goes on unchanged; weight decay from now on pulls towards the
    start instead of zero.

    Args:
        model: a PeftModel.
        adapter_name: whose handle to return; None for the only one, or the only active one.
        base: folder that the base model was loaded from. Also stands in for `track`, as in
            `snapshot`.
        trainable: whether the factors require gradients; None for each as it is in peft.
        optimizer: of the training so far; its parameters are replaced by the new ones.

    Returns:
        the handle; `restored` says how close the weights are. Those of the other adapters are in
        `tether.handles(handle.model)`.

    Raises:
        UntrackedError: how an adapter started is not known.
        BaseMismatchError: weights, starts and `base` do not fit together.
        UnsupportedAdapterError: something that would be lost, by name.
        UnsupportedModuleError: a bias that cannot be trained beside the base.
        ConfigError: the state of the optimizer cannot go on.
        AttachError: an adapter cannot be put on the base.
    """
    live = Live.of(model)
    name = live.name(adapter_name)
    opened = None if base is None else Base.open(base, live)
    tracker = Tracker.of(live)
    # Starts first: what one adapter took out of a weight is known only when all are.
    starts = {each: find(live, tracker, each, None, opened) for each in live.names}
    values = {
        each: take(source_of(live, tracker, each, start, opened)) for each, start in starts.items()
    }
    _check(live, values)
    active, inner = live.active, live.base
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    with ExitStack() as undo:
        _unwrap(live, undo)
        restored = _restore(live, tracker, opened, undo)
        for each, value in values.items():
            pairs += _attach(live, each, value, trainable, undo)
        for each, handle in handles(inner).items():
            if each in values:
                handle.record.active = each in active
        if optimizer is not None:
            _carry_over(optimizer, pairs)
        undo.pop_all()
    return Adopted(handles(inner)[name], restored)


def _check(live: Live, values: Mapping[str, Adapter]) -> None:
    """Refuse what would be lost, or would be another model afterwards."""
    for name, value in values.items():
        if live.config(name).ensure_weight_tying:
            raise UnsupportedAdapterError(
                f"adapter {name!r}: ensure_weight_tying lets two modules share factors, which "
                "would be trained apart. Save it with save_as_lora instead."
            )
        unknown = [path for path, bias in value.biases.items() if bias.anchor is None]
        if unknown:
            raise UntrackedError(
                f"adapter {name!r}: the bias of {unknown[0]!r} is trained, and its start is not "
                "known, so the base cannot be restored. Give the folder of the base model (base=)."
            )
    first: dict[int, str] = {}
    for path, place in live.places.items():
        other = first.setdefault(id(place.module), path)
        if other != path and (place.adapters or live.places[other].adapters):
            raise UnsupportedAdapterError(
                f"site {other!r} is also {path!r}: peft adapts one of the two, a handle on the "
                "module would adapt both. Save it with save_as_lora instead."
            )


def _unwrap(live: Live, undo: ExitStack) -> None:
    """Put the base's own modules back in the places of peft's."""
    inner = live.base
    own = {
        id(wrapper): place.module
        for place in live.places.values()
        if (wrapper := place.lora if place.lora is not None else place.saved) is not None
    }
    for parent in list(inner.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in own:
                parent._modules[key] = own[id(child)]
                undo.callback(parent._modules.__setitem__, key, child)
    config: Any = vars(inner).pop("peft_config", None)
    if config is not None:
        undo.callback(setattr, inner, "peft_config", config)


def _restore(
    live: Live, tracker: Tracker, base: Base | None, undo: ExitStack
) -> dict[str, Restored]:
    """Write the original weights and biases back."""
    restored: dict[str, Restored] = {}
    for path, place in live.places.items():
        parts = tracker.parts(path)
        if not parts:
            continue
        residual = place.weight
        if base is not None:
            original, restored[path] = base.tensor(place), Restored(True, 0.0)
        else:
            original = originals.put_together(residual, parts)
            size = float(torch.linalg.vector_norm(original))
            rounding = torch.finfo(residual.dtype).eps / 2
            restored[path] = Restored(False, originals.slack(residual, parts) / size + rounding)
        _write(residual, original, undo)
    for name in live.names:
        for path in trained_biases(live, name):
            bias = live.places[path].module.get_parameter("bias").detach()
            _write(bias, tracker.adapters[name].biases[path], undo)
    return restored


def _write(target: Tensor, value: Tensor, undo: ExitStack) -> None:
    """Overwrite a tensor in place, so that tied ones follow."""
    undo.callback(target.copy_, target.to("cpu", copy=True))
    target.copy_(value)


def _attach(
    live: Live, name: str, value: Adapter, trainable: bool | None, undo: ExitStack
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Attach one adapter; its parameters in peft, and what they became."""
    if value.biases:
        # Refuses biases that a hook cannot move, which `attach` takes as they come.
        whole.biases(live.base, live.config(name).bias, list(value.layers), list(value.modules))
    before = _parameters(live, name, value)
    anything = any(p.requires_grad for p in before.values()) if trainable is None else trainable
    wide = any(layer.dtype == torch.float64 for layer in value.layers.values())
    dtype = torch.float64 if wide else torch.float32
    required = {key: parameter.requires_grad for key, parameter in before.items()}
    handle = attach(live.base, value, name, anything, dtype=dtype, verify=False)
    undo.callback(handle.detach)
    # Two may train one module whole; which take part is said when all are on the model.
    handle.record.active = False
    pairs = []
    for key, parameter in handle.named_parameters():
        if trainable is None:
            parameter.requires_grad_(required[key])
        pairs.append((before[key], parameter))
    return pairs


def _parameters(live: Live, name: str, value: Adapter) -> dict[str, nn.Parameter]:
    """The parameters in peft, under the names that the handle gives to what they become."""
    found: dict[str, nn.Parameter] = {}
    for path, place in live.sites(name).items():
        moved = "" if value.layers[path].anchor is None else "d"
        for key, parameter in zip("AB", place.parameters(name), strict=True):
            found[f"{path}.{moved}{key}"] = parameter
        magnitude = place.magnitude(name)
        if magnitude is not None:
            found[f"{path}.dm"] = magnitude
    for path in value.biases:
        found[f"{path}.db"] = live.places[path].module.get_parameter("bias")
    for path, place in live.saved(name).items():
        for key, parameter in place.saved.modules_to_save[name].named_parameters():
            found[f"{path}.{key}"] = parameter
    return found


def _carry_over(
    optimizer: torch.optim.Optimizer, pairs: list[tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Let an optimizer go on with the new parameters and the old ones' state."""
    states = {}
    for old, new in pairs:
        state = {}
        for key, entry in optimizer.state.get(old, {}).items():
            shaped = isinstance(entry, Tensor) and entry.dim() > 0
            if shaped and old.shape not in (new.shape, entry.shape):
                raise ConfigError(
                    f"the optimizer's {key!r} of shape {tuple(entry.shape)} does not go with a "
                    f"factor whose shape changes from {tuple(old.shape)} to {tuple(new.shape)}. "
                    "Make a new optimizer on handle.parameters()."
                )
            same = shaped and entry.shape == old.shape
            state[key] = entry.reshape(new.shape) if same else entry
        states[new] = state
    become = {id(old): new for old, new in pairs}
    for group in optimizer.param_groups:
        group["params"] = [become.get(id(p), p) for p in group["params"]]
    for old, new in pairs:
        if optimizer.state.pop(old, None) is not None:
            optimizer.state[new] = states[new]
