"""What a model and its adapters hold in memory, by whom, for what, and where.

Storages are counted once, whatever shares them. What an optimizer keeps is not known here: it
belongs to the optimizer (AdamW keeps two tensors of the size of every trained factor).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tether.layers import Anchor, Holder, Layer, SiteAdapters, SiteLayer, layers_of
from tether.value import Json

if TYPE_CHECKING:
    from rich.table import Table

BASE, SHARED = "base model", "shared anchors"
ROLES = ("base", "anchor", "displacement", "gradients")
NOTE = "Optimizer state is not counted: it belongs to the optimizer."


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one owner, for one use, in one place.

    Attributes:
        owner: name of the adapter, "base model", or "shared anchors".
        role: "base", "anchor", "displacement" (what is trained, also without an anchor),
            "gradients", or "file".
        place: a device; for a file its path.
        bytes: held there.
        offloaded: whether they are parked, and not on the model.
    """

    owner: str
    role: str
    place: str
    bytes: int
    offloaded: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """What is held in memory. Prints as a table; `rich` draws it.

    Attributes:
        shares: owner by owner; none of 0 bytes.
        saved: bytes that are not held because adapters of a site share their anchor.
    """

    shares: tuple[Share, ...]
    saved: int = 0

    @property
    def base(self) -> int:
        """Bytes of the base model, without adapters and gradients."""
        return self._sum("base")

    @property
    def anchor(self) -> int:
        """Bytes of anchors on the model."""
        return self._sum("anchor")

    @property
    def displacement(self) -> int:
        """Bytes of trained factors, and all else that is trained, on the model."""
        return self._sum("displacement")

    @property
    def gradients(self) -> int:
        """Bytes of gradients on the model."""
        return self._sum("gradients")

    @property
    def adapters(self) -> int:
        """Bytes of anchors, displacements and their gradients on the model: what `limit` limits."""
        return sum(s.bytes for s in self.shares if not s.offloaded and s.owner != BASE)

    @property
    def offloaded(self) -> int:
        """Bytes parked in CPU memory."""
        return sum(s.bytes for s in self.shares if s.offloaded and s.role != "file")

    @property
    def files(self) -> int:
        """Bytes of the files that adapters are offloaded to."""
        return self._sum("file")

    @property
    def devices(self) -> dict[str, int]:
        """Device -> bytes in its memory, parked ones too."""
        totals: dict[str, int] = {}
        for share in self.shares:
            if share.role != "file":
                totals[share.place] = totals.get(share.place, 0) + share.bytes
        return totals

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON values.

        Returns:
            totals by role and by device, and every share.
        """
        totals: dict[str, Json] = {role: self._sum(role) for role in ROLES}
        names = Share.__slots__
        shares: list[Json] = [{n: getattr(s, n) for n in names} for s in self.shares]
        devices: dict[str, Json] = dict(self.devices)
        return totals | {
            "offloaded": self.offloaded,
            "files": self.files,
            "saved": self.saved,
            "devices": devices,
            "shares": shares,
        }

    def __str__(self) -> str:
        """A plain text table."""
        rows = [self._titles(), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
            cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, self._foot()])

    def __rich__(self) -> "Table":
        """The table as `rich` draws it."""
        from rich.table import Column, Table  # noqa: PLC0415  (importing tether stays light)
        from rich.text import Text  # noqa: PLC0415

        owner, place, *numbers = self._titles()
        columns = [Column(owner), Column(place, overflow="fold")]
        columns += [Column(title, justify="right") for title in numbers]
        table = Table(*columns, caption=Text(self._foot()), caption_justify="left")
        for row in self._rows():
            # Paths and names are shown as they are, without markup.
            table.add_row(*map(Text, row))
        return table

    def _sum(self, role: str) -> int:
        return sum(
            s.bytes for s in self.shares if s.role == role and s.offloaded == (role == "file")
        )

    def _titles(self) -> list[str]:
        return ["memory", "place", *ROLES, "total"]

    def _rows(self) -> Iterator[list[str]]:
        groups: dict[tuple[str, str, bool], dict[str, int]] = {}
        for s in self.shares:
            groups.setdefault((s.owner, s.place, s.offloaded), {})[s.role] = s.bytes
        for (owner, place, offloaded), roles in groups.items():
            cells = [readable(roles[role]) if role in roles else "–" for role in ROLES]
            name = f"{owner} (offloaded)" if offloaded else owner
            yield [name, place, *cells, readable(sum(roles.values()))]
        totals = [readable(self._sum(role)) for role in ROLES]
        yield ["on the model", "", *totals, readable(sum(map(self._sum, ROLES)))]

    def _foot(self) -> str:
        saved = f"Sharing anchors saves {readable(self.saved)}. " if self.saved else ""
        return saved + NOTE


def memory(model: nn.Module) -> Memory:
    """What a model and all its adapters hold.

    Args:
        model: any module; only looked at.

    Returns:
        the base's bytes, every adapter's own, and in one line the anchors that several adapters
        share. Of sharded tensors (DTensor) the part in this process.
    """
    return measure(model)


def measure(model: nn.Module, name: str | None = None) -> Memory:
    """What a model holds, or what one of its adapters uses.

    Args:
        model: any module; only looked at.
        name: of one adapter, with the anchors that it shares; None for the base and all.

    Returns:
        the bytes.
    """
    counter = _Counter()
    found = layers_of(model)
    if name is None:
        _count_base(counter, model)
    shared = {a: owners for a, owners in users(found).items() if len(owners) > 1}
    saved = 0
    for anchor, owners in shared.items():
        if name is None or name in owners:
            size = counter.holder(SHARED, anchor)
            saved += size * (len(owners) - 1)
    for owner, layers in found.items():
        if name is None or name == owner:
            _count_adapter(counter, owner, layers, shared)
    shares = tuple(Share(*key[:3], size, key[3]) for key, size in counter.bytes.items() if size)
    return Memory(shares, saved)


def users(found: Mapping[str, Mapping[str, Layer]]) -> dict[Anchor, list[str]]:
    """Who uses an anchor.

    Args:
        found: adapter name -> module path -> layer.

    Returns:
        anchor -> names of adapters.
    """
    owners: dict[Anchor, list[str]] = {}
    for name, layers in found.items():
        for layer in layers.values():
            if isinstance(layer, SiteLayer) and layer.anchor is not None:
                owners.setdefault(layer.anchor, []).append(name)
    return owners


def readable(size: int) -> str:
    """A number of bytes for people: powers of 1000.

    Args:
        size: in bytes.

    Returns:
        such as "12.3 MB".
    """
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.95:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


class _Counter:
    """Adds up storages that were not seen before."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.bytes: dict[tuple[str, str, str, bool], int] = {}

    def add(self, owner: str, role: str, tensors: Iterable[Tensor], offloaded: bool = False) -> int:
        added = 0
        for tensor in tensors:
            for storage in _storages(tensor):
                place = str(storage.device)
                if (place, storage.data_ptr()) not in self.seen:
                    self.seen.add((place, storage.data_ptr()))
                    key = (owner, role, place, offloaded)
                    self.bytes[key] = self.bytes.get(key, 0) + storage.nbytes()
                    added += storage.nbytes()
        return added

    def holder(self, owner: str, holder: Holder) -> int:
        """Count a part of an adapter; the bytes of its values."""
        parameters = dict(holder.named_parameters(recurse=False))
        buffers = dict(holder.named_buffers(recurse=False))
        parked = holder.parked
        size = self.add(owner, "anchor", buffers.values())
        size += self.add(owner, "displacement", parameters.values())
        self.add(owner, "gradients", (p.grad for p in parameters.values() if p.grad is not None))
        away = {n: t for n, t in parked.items() if n in buffers}
        size += self.add(owner, "anchor", away.values(), offloaded=True)
        away = {n: t for n, t in parked.items() if n in parameters}
        size += self.add(owner, "displacement", away.values(), offloaded=True)
        self.add(owner, "gradients", holder.gradients.values(), offloaded=True)
        return size


def _count_base(counter: _Counter, model: nn.Module) -> None:
    inside = {
        m for child in model.modules() if isinstance(child, SiteAdapters) for m in child.modules()
    }
    own = [module for module in model.modules() if module not in inside]
    parameters = [p for module in own for p in module.parameters(recurse=False)]
    counter.add(BASE, "base", parameters)
    counter.add(BASE, "base", (b for module in own for b in module.buffers(recurse=False)))
    counter.add(BASE, "gradients", (p.grad for p in parameters if p.grad is not None))


def _count_adapter(
    counter: _Counter, owner: str, layers: Mapping[str, Layer], shared: Mapping[Anchor, Any]
) -> None:
    for layer in layers.values():
        for holder in layer.modules():
            if isinstance(holder, Holder) and holder not in shared:
                counter.holder(owner, holder)
    parked = next(iter(layers.values())).record.parked
    if parked is not None and parked.path is not None and parked.path.is_file():
        counter.bytes[owner, "file", str(parked.path), True] = parked.path.stat().st_size


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory behind a tensor, also behind a sharded or a quantised one's parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = (getattr(tensor, name) for name in names)
        for part in parts:
            yield from _storages(part) if isinstance(part, Tensor) else ()
    elif tensor.device.type != "meta":
        yield tensor.untyped_storage()
