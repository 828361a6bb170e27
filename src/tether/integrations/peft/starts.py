"""How the adapters of a peft model started: the record that is kept, on the model itself."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from tether.fingerprints import fingerprint_tensor
from tether.integrations.peft.live import Live, splits
from tether.integrations.peft.originals import Part
from tether.provenance import Fingerprint

_ATTRIBUTE = "_tether_tracker"


@dataclass(slots=True, eq=False)
class Start:
    """How one adapter started.

    Attributes:
        method: peft's init_lora_weights.
        parts: site path -> what was taken out of its weight, or None where B·A was zero.
        biases: module path -> initial bias, float32.
        marks: site path -> a module of the adapter, by which it is recognised.
    """

    method: str | bool
    parts: dict[str, Part | None]
    biases: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, nn.Module] = field(default_factory=dict)

    def belongs(self, live: Live, name: str) -> bool:
        """Whether the adapter of that name is still the one that was tracked.

        Args:
            live: the peft model.
            name: of the adapter.

        Returns:
            False if it was deleted, and perhaps another one made under its name.
        """
        sites = live.sites(name)
        return sites.keys() == self.marks.keys() and all(
            place.mark(name) is self.marks[path] for path, place in sites.items()
        )


@dataclass(slots=True, eq=False)
class Tracker:
    """The starts of a peft model's adapters, on the CPU. Made by `track`.

    Kept on the model itself, outside its state dict: `copy.deepcopy` and pickling take it along.

    Attributes:
        adapters: adapter name -> start.
        gone: of adapters that peft deleted; it leaves their parts missing in the base.
        fingerprints: site path -> fingerprint of its original weight, where that was at hand.
    """

    adapters: dict[str, Start] = field(default_factory=dict)
    gone: list[Start] = field(default_factory=list)
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Names and number of sites."""
        sites = {name: len(start.parts) for name, start in self.adapters.items()}
        return f"<Tracker: {sites} sites>"

    @classmethod
    def of(cls, live: Live) -> "Tracker":
        """The tracker of a peft model.

        Args:
            live: the peft model.

        Returns:
            a copy, empty if nothing is tracked; what was tracked of an adapter that has been
            deleted since is among `gone`.
        """
        kept = vars(live.model).get(_ATTRIBUTE) or cls()
        found = cls(gone=list(kept.gone), fingerprints=dict(kept.fingerprints))
        for name, start in kept.adapters.items():
            if name in live.names and start.belongs(live, name):
                found.adapters[name] = start
            else:
                found.gone.append(start)
        return found

    def keep(self, live: Live) -> None:
        """Put the tracker on the model.

        Args:
            live: the peft model.
        """
        vars(live.model)[_ATTRIBUTE] = self

    def parts(self, path: str) -> list[Part]:
        """What was taken out of a weight, as far as it is known.

        Args:
            path: of the site.

        Returns:
            the parts.
        """
        starts = [*self.gone, *self.adapters.values()]
        return [part for start in starts if (part := start.parts.get(path)) is not None]

    def unknown(self, live: Live, path: str) -> list[str]:
        """The adapters that may have taken an unknown part out of a weight, or of one tied to it.

        Args:
            live: the peft model.
            path: of the site.

        Returns:
            their names.
        """
        places = [live.places[other] for other in live.sharing.get(path, (path,))]
        return [
            name
            for place in places
            for name in place.adapters
            if place.linear and name not in self.adapters and splits(live.model.peft_config[name])
        ]

    def identify(self, live: Live, name: str) -> None:
        """Take fingerprints of the weights that no adapter took a part out of.

        Args:
            live: the peft model.
            name: of the adapter whose sites they are.
        """
        for path, place in live.sites(name).items():
            whole = not (self.parts(path) or self.unknown(live, path))
            if whole and path not in self.fingerprints and place.readable:
                self.fingerprints[path] = fingerprint_tensor(place.weight)
