"""Block Lanczos on WᵀW: an orthonormal basis in which its largest eigenvalues settle first.

Source: Golub, Underwood 1977, The block Lanczos method for computing eigenvalues; full
reorthogonalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.linalg.estimate import Unseen

Apply = Callable[[Tensor], Tensor]
# Below this, relative to the operator, what is left of a direction is rounding.
_VANISHED = 1e-5


@dataclass(slots=True)
class Lanczos:
    """A growing basis. Vectors are rows.

    Attributes:
        apply: rows -> rows·WᵀW.
        basis: (capacity, n), float32; the first `size` rows are orthonormal, the block after them
            is the next to be multiplied.
        small: (capacity, capacity), float64, on the CPU: the operator in the basis. Float64,
            because gaps between its eigenvalues are a thousandth of the largest and less.
        block: vectors that are added at a time.
        size: vectors so far.
        largest: entry of `small`, about.
    """

    apply: Apply
    basis: Tensor
    small: Tensor
    block: int
    size: int = 0
    largest: float = 0.0

    @classmethod
    def begin(cls, apply: Apply, start: Tensor, capacity: int) -> "Lanczos":
        """Begin with a block of vectors.

        Args:
            apply: rows -> rows·WᵀW.
            start: (b, n), float32, of full rank.
            capacity: vectors to make room for; more is made when needed.

        Returns:
            a process of size 0.
        """
        block, n = start.shape
        basis = start.new_empty(capacity + block, n)
        basis[:block] = torch.linalg.qr(start.T)[0].T
        small = torch.zeros(capacity + block, capacity + block, dtype=torch.float64)
        return cls(apply, basis, small, block)

    def step(self) -> None:
        """Multiply the next block and add it to the basis."""
        begin, end = self.size, self.size + self.block
        self._make_room(end + self.block)
        known = self.basis[:end]
        rest = self.apply(known[begin:])
        # Twice: after one pass the basis loses its orthogonality and convergence stagnates.
        along = rest @ known.T
        rest.addmm_(along, known, alpha=-1)
        again = rest @ known.T
        rest.addmm_(again, known, alpha=-1)
        diagonal = (along + again)[:, begin:].double().cpu()
        self.small[begin:end, begin:end] = (diagonal + diagonal.T) / 2
        self.largest = max(self.largest, float(diagonal.max()))
        following, coupling = self._orthonormal(rest, known)
        self.basis[end : end + self.block] = following
        self.small[end : end + self.block, begin:end] = coupling
        self.small[begin:end, end : end + self.block] = coupling.T
        self.size = end

    def ritz(self, count: int, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The largest eigenpairs of the operator within the basis.

        Args:
            count: l <= size.
            precision: of the eigenvectors: float32 is good to about 1e-6 and takes half the time.

        Returns:
            values (l,), descending, float64; coefficients (size, l), float64, on the CPU;
            couplings ρᵀρ (l, l) of the residuals ρ, float64.
        """
        values, vectors = torch.linalg.eigh(self.small[: self.size, : self.size].to(precision))
        values, vectors = values[-count:].flip(0).double(), vectors[:, -count:].flip(1).double()
        # Only the last block reaches out of the basis.
        residual = self._coupling() @ vectors[-self.block :]
        return values, vectors, residual.T @ residual

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Combine the basis.

        Args:
            coefficients: (size, l).

        Returns:
            (l, n), float32.
        """
        known = self.basis[: self.size]
        return coefficients.T.to(known.device, known.dtype) @ known

    def unseen(self) -> Unseen:
        """What the last block tells of the rest of the operator.

        Returns:
            its center and spread.
        """
        last = self.small[self.size - self.block : self.size, self.size - self.block : self.size]
        spread = float(self._coupling().norm()) / self.block**0.5
        return Unseen(float(last.diagonal().mean()), spread)

    def _coupling(self) -> Tensor:
        """From the last block to the next, (b, b)."""
        begin, end = self.size - self.block, self.size
        return self.small[end : end + self.block, begin:end]

    def _orthonormal(self, rest: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The next block, and how it couples to the last."""
        q, r = torch.linalg.qr(rest.T)
        coupling = r.double().cpu()
        sizes = coupling.diagonal().abs()
        self.largest = max(self.largest, float(coupling.abs().max()))
        if float(sizes.min()) <= _VANISHED * self.largest:
            # The basis holds an invariant subspace. What is left of a direction is rounding, in
            # the worst case within the basis: others are drawn, which also find what the start
            # missed.
            generator = torch.Generator().manual_seed(self.size)
            vanished = sizes <= _VANISHED * self.largest
            drawn = torch.randn(len(q), int(vanished.sum()), generator=generator)
            q[:, vanished.to(q.device)] = drawn.to(q.device)
            for _ in range(2):
                q = torch.linalg.qr(q - known.T @ (known @ q))[0]
            coupling = (q.T @ rest.T).double().cpu()
        return q.T, coupling

    def _make_room(self, wanted: int) -> None:
        have = len(self.basis)
        if wanted <= have:
            return
        more = wanted + have // 2
        basis, small = self.basis, self.small
        self.basis = basis.new_empty(more, basis.shape[1])
        self.basis[:have] = basis
        self.small = torch.zeros(more, more, dtype=torch.float64)
        self.small[:have, :have] = small
