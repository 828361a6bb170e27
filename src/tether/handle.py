"""Handles: an adapter on a live model, until it is detached."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tether import freeze, offload, saving
from tether.errors import DetachedError, HookNotFiredError
from tether.layers import (
    Layer,
    SiteLayer,
    carriers,
    check_in_place,
    layers_of,
    originals,
    records_of,
    take_off,
    withdraw,
)
from tether.layers.record import to_shape
from tether.memory import Memory, measure
from tether.ranks import reshard
from tether.source import Source, of_adapter
from tether.start import original
from tether.switch import Share, quiet, set_active, set_shares
from tether.value import CHILD, Adapter, Trained


class Handle:
    """An adapter that is attached to a model. Made by `attach` and `handles`."""

    def __init__(self, model: nn.Module, name: str, layers: Mapping[str, Layer]) -> None:
        """Point at an attached adapter; use `attach` or `handles` instead.

        Args:
            model: the model.
            name: of the adapter.
            layers: module path -> layer.
        """
        self.model, self.name = model, name
        self._layers = dict(layers)
        self.record = next(iter(self._layers.values())).record

    def __repr__(self) -> str:
        """Name, state and size."""
        state = ("offloaded" if self.offloaded else "attached") if self.attached else "detached"
        return f"<Handle {self.name!r}: {len(self.sites)} sites, {state}>"

    @property
    def attached(self) -> bool:
        """Whether the adapter is still on the model."""
        path, layer = next(iter(self._layers.items()))
        return layers_of(self.model).get(self.name, {}).get(path) is layer

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return self.record.active

    @property
    def weight(self) -> float:
        """By which the adapter's change is multiplied; set by `activate` and `only`."""
        return self.record.weight

    @property
    def merged(self) -> bool:
        """Whether the adapter's change is in the base's weights now; see `merge`."""
        return self.record.merged

    @property
    def offloaded(self) -> bool:
        """Whether the adapter's values are off the model; it then takes no part."""
        return self.record.parked is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the sites, in the model's order."""
        return tuple(p for p, layer in self._layers.items() if isinstance(layer, SiteLayer))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by module: dA and dB, or A and B without an anchor.

        Also dm with DoRA, db with trained biases, and the displacements of modules trained whole
        under their parameters' own names.

        Yields:
            ("model.layers.0.mlp.up_proj.dA", parameter) and so on, in a fixed order.

        Raises:
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        reshard(self.model)  # else an optimizer would train copies that FSDP2 had gathered
        for path, layer in self._layers.items():
            for name, parameter in layer.trained():
                yield f"{path}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained factors, for an optimizer.

        Yields:
            parameters in the order of `named_parameters`.

        Raises:
            DetachedError: the adapter was detached.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    def snapshot(self) -> Adapter:
        """The adapter now, as a value; also an offloaded one. Changes nothing in the model.

        Of an adapter that fully_shard sharded all ranks must call it, and each gets the whole.

        Returns:
            copies on the CPU, float32 (float64 if attached so).

        Raises:
            DetachedError: the adapter was detached.
            FormatError: it is offloaded to a file that is missing, damaged or another one.
            ShardedWeightError: FSDP1 or DeepSpeed's ZeRO-3 holds its values.
        """
        self._check_attached()
        return offload.snapshot(self.model, self.name)

    def source(self) -> Source:
        """The adapter now, to be read site by site. Changes nothing in the model.

        Returns:
            a source whose values are copied from the model when they are asked for.

        Raises:
            DetachedError: the adapter was detached.
            FormatError: it is offloaded to a file that is missing, damaged or another one.
        """
        if self.record.parked is not None:
            return of_adapter(self.snapshot())
        self._check_attached()
        carrying = carriers(self.model, self.name)
        live = {_part(module, self.name).path: module for module in carrying}

        def parameter(path: str, name: str) -> Trained:
            with originals(self.model):
                value: Trained = _part(live[path], self.name).parameter(live[path], name)
                return value

        return Source(
            about=offload.snapshot(self.model, self.name, to_shape),
            layer=lambda path: _part(live[path], self.name).value(),
            bias=lambda path: _part(live[path], self.name).bias(),
            module=parameter,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter now to a native file. Changes nothing in the model.

        Of an adapter that fully_shard sharded all ranks must call it: rank 0 gathers and writes.

        Args:
            path: of the file; replaced in one rename.

        Raises:
            WriteError: it cannot be written; what was there stays.
            DistributedError: rank 0 could not write it, on the other ranks.
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        saving.save(self.model, self.name, path)

    def annotate(self, **changes: str | int | float | None) -> None:
        """Set fields of the provenance, such as the learning rate.

        Args:
            **changes: fields of `Provenance`.

        Raises:
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        self.record.provenance = replace(self.record.provenance, **changes)  # type: ignore[arg-type]

    def detach(self) -> Adapter:
        """Take the adapter off the model, which is then as it was before `attach`.

        A merged one is un-merged first.

        Returns:
            the adapter as it was at this moment; nothing is lost.

        Raises:
            DetachedError: it was detached before.
            MergedError: in a block that leaves merged adapters out.
        """
        self._check_attached()
        model = original(self.model)
        check_in_place(model)
        adapter = self.snapshot()
        if self.merged:
            withdraw(model, self.record)
        for module in carriers(model, self.name):
            take_off(module, self.name)
        offload.tidy(model)
        freeze.release(model, self.record)
        freeze.reset_compiler()
        return adapter

    def memory(self) -> Memory:
        """What the adapter holds: anchors (shared ones too), trained factors, gradients.

        Returns:
            bytes by use and place; prints as a table. Optimizer state is not counted.

        Raises:
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        return measure(self.model, self.name)

    def offload(self, where: str | os.PathLike[str] = "cpu") -> None:
        """Take the adapter's values off the model's memory; `restore` puts back every bit.

        Until then the adapter takes no part in the forward pass. Its parameters stay the same
        objects, empty, so an optimizer over them and its state stay valid, and skip them.
        `snapshot`, `save` and `detach` still give the values. Gradients are parked in CPU memory
        and come back too; call `zero_grad` after restoring if they are not wanted. Anchors that
        an adapter on the model uses as well stay there. All or nothing: on an error the adapter is
        as it was.

        Args:
            where: "cpu" for CPU memory (for a model on the CPU that frees nothing); or the path
                of a native file, which is yours and stays after restoring. A file that is there
                is never replaced: it may be another adapter's that is offloaded. If it holds this
                very adapter it is used as it is.

        Raises:
            WriteError: the file cannot be written, or is there and holds something else.
            NonFiniteError: a value is NaN or Inf, and `where` is a file; "cpu" takes it.
            ConfigError: `where` is a device other than "cpu".
            ShardedWeightError: FSDP sharded the adapter.
            OffloadedError: it is offloaded to another place.
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        offload.offload(original(self.model), self.name, where)

    def restore(self) -> None:
        """Put an offloaded adapter back, every bit; does nothing if it is not offloaded.

        Values, gradients, requires_grad and modes are as they were, and it takes part in the
        forward pass if it did. It goes where the model is by now, also in its dtype.

        Raises:
            FormatError: the file that it was offloaded to is missing, damaged or another one. The
                adapter stays offloaded.
            ShardedWeightError: FSDP sharded the model meanwhile.
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        offload.restore(original(self.model), self.name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave this adapter out of the forward pass within the block.

        Yields:
            nothing; the model's output is what it would be without this adapter.
        """
        self._check_attached()
        with ExitStack() as stack:
            states = {self.record: False}
            if self.merged:
                merged = {r: True for r in records_of(self.model) if r.merged}
                states = merged | states
                stack.enter_context(originals(self.model))
            stack.enter_context(set_active(self.model, states))
            yield

    def verify(self, batch: Any) -> None:
        """Run one batch and check that every site's adapter took part. Changes nothing.

        Args:
            batch: named inputs of the model as a mapping, or its one positional input.

        Raises:
            HookNotFiredError: naming the first site whose forward was never called.
            DetachedError: the adapter was detached.
        """
        self._check_attached()
        fired: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(quiet(original(self.model)))
            stack.enter_context(originals(self.model))
            stack.enter_context(set_active(self.model, {self.record: True}))
            stack.enter_context(set_shares({r: Share() for r in records_of(self.model)}))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for path, layer in self._layers.items():
                hook = layer.register_forward_hook(_adder(fired, path))
                stack.callback(hook.remove)
            model = original(self.model)
            _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
        missed = [path for path in self._layers if path not in fired]
        if missed:
            raise HookNotFiredError(
                f"site {missed[0]!r}: its forward was never called in this batch"
                + (f", nor were {len(missed) - 1} others" if len(missed) > 1 else "")
                + ", so the adapter has no effect there. Exclude it with exclude_modules, or give "
                "a batch that reaches it."
            )

    def _check_attached(self) -> None:
        if not self.attached:
            raise DetachedError(
                f"adapter {self.name!r} is no longer on the model. Use the value that detach() "
                "returned, or attach it again."
            )


def handles(model: nn.Module) -> dict[str, Handle]:
    """The adapters on a model, also on a copy or a wrapper of the model they were attached to.

    Args:
        model: any module.

    Returns:
        name -> handle, in the order of attaching.
    """
    found = layers_of(model)
    return {name: Handle(model, name, layers) for name, layers in found.items()}


def _part(module: nn.Module, name: str) -> Any:
    """An adapter's layer on a module that carries it."""
    return getattr(module, CHILD)[name]


def _adder(fired: set[str], path: str) -> Callable[..., None]:
    return lambda *_: fired.add(path)
