"""The base's weights before peft took parts of them: re-read from a folder, or put together again.

peft keeps W_res = W − s·B0·A0 in the model, rounded to the weight's dtype. Putting the part back
gives W but for rounding; `slack` bounds that, so a base, or an anchor, that does not belong here is
told from one that does.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tether.checkpoint import Checkpoint
from tether.errors import BaseMismatchError, ShapeMismatchError, UnknownNameError
from tether.integrations.peft.live import Live
from tether.integrations.peft.place import Place
from tether.layout import Layout
from tether.value import Factors

# Half a unit in the last place of a factor of a float32 product, by torch's setting.
_PRODUCT = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What an adapter took out of a weight when it was made: s·B0·A0.

    Attributes:
        factors: A0 (r, in), B0 (out, r).
        scaling: s.
        layout: of the weight.
    """

    factors: Factors
    scaling: float
    layout: Layout

    @property
    def product(self) -> Tensor:
        """s·B0·A0 in the weight's own shape, in float64."""
        factors = self.factors.to(torch.float64)
        return self.layout.stored(self.scaling * (factors.B @ factors.A))


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The folder that a model was loaded from.

    Attributes:
        checkpoint: the folder.
        live: the model.
    """

    checkpoint: Checkpoint
    live: Live

    @classmethod
    def open(cls, folder: str | os.PathLike[str], live: Live) -> "Base":
        """Read the headers of a model folder.

        Args:
            folder: of the base model. Only read.
            live: the model.

        Returns:
            the base.

        Raises:
            ModelError: it is no folder of a model.
        """
        return cls(Checkpoint.open(Path(folder)), live)

    def tensor(self, place: Place, parameter: str = "weight") -> Tensor:
        """One parameter as it was loaded.

        Args:
            place: its module.
            parameter: its name there.

        Returns:
            the values on the CPU, in the dtype they have in the live model.

        Raises:
            UnknownNameError: the folder has no such tensor.
            ShapeMismatchError: it has another shape.
        """
        live = place.module.get_parameter(parameter)
        found = self.checkpoint.tensor(self._name(place.path, parameter)).to(live.dtype)
        if found.shape != live.shape:
            raise ShapeMismatchError(
                f"{place.path}.{parameter}: {tuple(live.shape)} in the model, {tuple(found.shape)} "
                f"in {self.checkpoint.folder}. Give the folder that the model was loaded from."
            )
        return found

    def _name(self, path: str, parameter: str) -> str:
        """The tensor's name; tied weights are stored once, under the name of one of them."""
        try:
            return self.checkpoint.weight_name(path, parameter)
        except UnknownNameError:
            for other in self.live.sharing.get(path, ()) if parameter == "weight" else ():
                if f"{other}.weight" in self.checkpoint.names:
                    return f"{other}.weight"
            raise


def put_together(residual: Tensor, parts: Sequence[Part]) -> Tensor:
    """W_res + Σ s·B0·A0.

    Args:
        residual: the weight now, as stored.
        parts: what was taken out of it.

    Returns:
        as stored, float64, on the CPU.
    """
    return sum((part.product for part in parts), start=residual.cpu().double())


def slack(residual: Tensor, parts: Sequence[Part]) -> float:
    """How far `put_together` can be from the weight that the parts were taken out of.

    With u half a unit in the last place of the weight's dtype, |·| taken elementwise:

        |E|_F <= k·u·(|W_res|_F + Σ|P|_F) + Σ s·((r + 3)·u32 + 2·v)·| |B0|·|A0| |_F,    P = s·B0·A0

    The first term is the rounding of each of the k residuals; the second the product, which peft
    computes in float32, and the rounding of the factors to a half-precision weight's dtype, which
    it does after the product was taken (v = u + u²/2 there, 0 otherwise).

    Args:
        residual: the weight now, as stored.
        parts: what was taken out of it.

    Returns:
        the bound, in the Frobenius norm.
    """
    unit = torch.finfo(residual.dtype).eps / 2
    single = _PRODUCT[torch.get_float32_matmul_precision()]
    rounded = unit + unit**2 / 2 if residual.dtype.itemsize < 4 else 0.0
    size = float(torch.linalg.vector_norm(residual.cpu(), dtype=torch.float64))
    total = 0.0
    for part in parts:
        a, b = part.factors.A.abs().float(), part.factors.B.abs().float()
        size += float(torch.linalg.vector_norm(part.product))
        share = (part.factors.rank + 3) * single + 2 * rounded
        total += abs(part.scaling) * share * float(torch.linalg.vector_norm(b @ a))
    return total + len(parts) * unit * size


def check(place: Place, weight: Tensor, parts: Sequence[Part], folder: Path) -> None:
    """Raise unless the model's weight is an original one without the parts.

    Args:
        place: the site.
        weight: the original, as stored.
        parts: what was taken out of it.
        folder: of the original, for the message.

    Raises:
        BaseMismatchError: naming the site, the distance and what rounding explains.
    """
    residual = place.weight
    distance = float(torch.linalg.vector_norm(weight.double() - put_together(residual, parts)))
    bound = slack(residual, parts)
    if distance > bound:
        raise BaseMismatchError(
            f"site {place.path!r}: the weight in the model and the initial factors together differ "
            f"from that in {folder} by {distance:.3g}; rounding explains {bound:.3g}. Either this "
            "is not the folder that the model was loaded from, or these are not the factors that "
            "the adapter started with: training had begun, another checkpoint was loaded, or "
            "init_lora_weights was changed since."
        )


def recover(taken: Tensor, current: Part) -> Part:
    """The initial factors, from what is missing in the weight and the factors as they are now.

    s·B0·A0 = P fixes B0 and A0 up to an invertible matrix; it is chosen so that A0 is nearest to A,
    the projection of A on the rows of P, so that the displacement is no larger than it must be.

    Args:
        taken: P = W − W_res, of rank r but for rounding: as stored, float64.
        current: A, B and s now.

    Returns:
        A0 and B0 with s·B0·A0 = P, as far as P has rank r: float32.
    """
    part = current.layout.matrix(taken) / current.scaling
    a = current.factors.A.double()
    q = torch.linalg.qr(part @ a.T)[0]
    rows = q.T @ part
    mixing = a @ torch.linalg.pinv(rows)
    if float(torch.linalg.cond(mixing)) < 1e6:
        rows, q = mixing @ rows, torch.linalg.solve(mixing, q, left=False)
    factors = Factors(rows.float().contiguous(), q.float().contiguous())
    return Part(factors, current.scaling, current.layout)
