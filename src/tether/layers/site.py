"""One adapter's factors at one site."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tether import quantized
from tether.layers.dora import stretch
from tether.layers.linear import add_change
from tether.layers.record import Holder, Layer, Record, Take, contiguous_copy, to_value
from tether.linalg import check_finite
from tether.value import Factors, LayerAdapter, Layout, Trained


class Anchor(Holder):
    """Frozen initial factors; one object for all adapters of a site that have the same."""

    A0: Tensor
    B0: Tensor

    def __init__(self, path: str, factors: Factors, dtype: torch.dtype) -> None:
        """Copy the factors.

        Args:
            path: of the site.
            factors: A0 (r, in), B0 (out, r).
            dtype: of the copies.
        """
        super().__init__()
        for name, factor in (("A0", factors.A), ("B0", factors.B)):
            copied = contiguous_copy(factor, dtype)
            check_finite(copied, f"site {path!r}: factor {name[0]} in {dtype}")
            self.register_buffer(name, copied)

    def equals(self, factors: Factors) -> bool:
        """Whether these are the same numbers, in this dtype and on this device.

        Args:
            factors: to compare with.

        Returns:
            True if every bit agrees.
        """
        pairs = ((self.A0, factors.A), (self.B0, factors.B))
        return all(
            mine.shape == other.shape and torch.equal(mine, other.to(mine)) for mine, other in pairs
        )


class SiteLayer(Layer):
    """One adapter's factors at one site; trains (dA, dB) or, without an anchor, (A, B)."""

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    db: Tensor
    b0: Tensor
    dm: Tensor
    m0: Tensor

    def __init__(
        self,
        path: str,
        layer: LayerAdapter,
        layout: Layout,
        record: Record,
        dtype: torch.dtype,
        anchor: Anchor | None = None,
        bias: Trained | None = None,
    ) -> None:
        """Copy a layer's factors.

        Args:
            path: of the site.
            layer: the value; copied.
            layout: of the live module.
            record: shared by the adapter's layers.
            dtype: of the factors.
            anchor: one that is on the site already and equals the layer's; None to copy it.
            bias: of the site, with its anchor, if it is trained.
        """
        super().__init__(path, record)
        self.layout = layout
        self.scaling, self.dropout = layer.scaling, layer.dropout
        self.names = ("A", "B") if layer.anchor is None else ("dA", "dB")
        self.add(self.names[0], contiguous_copy(layer.trainable.A, dtype))
        self.add(self.names[1], contiguous_copy(layer.trainable.B, dtype))
        self.anchor: Anchor | None = None
        if layer.anchor is not None:
            self.anchor = anchor or Anchor(path, layer.anchor, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self._add_whole("db", "b0", bias, wide)
        # Never in half precision: the lengths are compared with those of the weight's rows.
        self._add_whole("dm", "m0", layer.magnitude, wide)

    def _add_whole(self, moved: str, start: str, value: Trained | None, dtype: torch.dtype) -> None:
        """A parameter trained whole: its displacement is trained, its anchor kept."""
        if value is None:
            return
        assert value.anchor is not None
        self.add(moved, contiguous_copy(value.trainable, dtype))
        # A bias's anchor is only kept for the value; lengths are computed with.
        kept = value.anchor.dtype if start == "b0" else dtype
        self.register_buffer(start, contiguous_copy(value.anchor, kept))

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two factors whose product is ΔW without s, and no large halves that cancel.

        Args:
            dtype: to compute in.

        Returns:
            [B, dB] (out, 2r) and [dA; A0] (2r, in); without an anchor B and A.
        """
        a, b = (getattr(self, name).to(dtype) for name in self.names)
        if self.anchor is None:
            return b, a
        a0, b0 = self.anchor.A0.to(dtype), self.anchor.B0.to(dtype)
        return torch.cat([b0 + b, b], dim=1), torch.cat([a, a0])

    @property
    def dora(self) -> bool:
        """Whether the rows' lengths are trained."""
        return "dm" in self._parameters

    @property
    def biased(self) -> bool:
        """Whether the site's bias is trained."""
        return "db" in self._parameters

    def value(self, take: Take = to_value) -> LayerAdapter:
        """The layer now, as a value: float32 (or float64) copies on the CPU.

        Args:
            take: how to copy a tensor.

        Returns:
            a layer that shares nothing with the model.
        """
        a, b = (take(self.held(name)) for name in self.names)
        anchor = None
        if self.anchor is not None:
            anchor = Factors(*(take(self.anchor.held(name)) for name in ("A0", "B0")))
        magnitude = None
        if self.dora:
            magnitude = Trained(take(self.held("dm")), take(self.held("m0")))
        return LayerAdapter(
            Factors(a, b), anchor, self.scaling, self.layout, self.dropout, magnitude
        )

    def bias(self, take: Take = to_value) -> Trained | None:
        """The site's bias now, as a value.

        Args:
            take: how to copy a tensor.

        Returns:
            copies on the CPU, or None if it is not trained.
        """
        if not self.biased:
            return None
        return Trained(take(self.held("db")), take(self.held("b0")))

    def forward(self, module: nn.Module, x: Tensor, output: Tensor, base: Tensor) -> Tensor:
        """The output with this adapter's change added.

        Args:
            module: the base module.
            x: its input.
            output: its output so far.
            base: its own output, without any adapter.

        Returns:
            output + s·(B0·(dA·x) + dB·((A0 + dA)·x)), rounded once to the output's dtype; with
            DoRA, W' = m·(W + ΔW)/|W + ΔW| in place of W + ΔW.
        """
        if self.layout.kind in ("linear", "transposed") and not (self.dora or self.biased):
            return self._add(x, output)
        change = self._change(module, x)
        if self.dora:
            # g·(Wx + ΔWx) − Wx = (g − 1)·Wx + g·ΔWx, as its negative.
            weight = quantized.values(f"site {self.path!r}: weight", module)
            excess = self._spread(stretch(self, weight))
            bias = getattr(module, "bias", None)
            without = base if bias is None else base - self._spread(bias)
            change = (1 + excess) * change - excess * without.to(change.dtype)
        if self.biased:
            change = change - self._spread(self.db)
        if self.record.weight != 1:
            change = change * self.record.weight
        # A change of zero leaves every bit of the base's output: `change` is the negative, so it
        # is subtracted, and + 0.0 makes its zeros positive: −0.0 − 0.0 is −0.0.
        return (output - (change + 0.0)).to(output.dtype)

    def _add(self, x: Tensor, output: Tensor) -> Tensor:
        """The output of a linear site with its change."""
        x = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        a, b = (getattr(self, name) for name in self.names)
        anchor = None if self.anchor is None else (self.anchor.A0, self.anchor.B0)
        return add_change(output, x, (a, b), anchor, self.scaling * self.record.weight)

    def _change(self, module: nn.Module, x: Tensor) -> Tensor:
        """−ΔW·x."""
        if self.layout.kind != "embedding":
            x = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.anchor is None:
            return self._up(module, self._down(module, x, self.A), self.B)
        moved = self._down(module, x, self.dA)
        # B·(dA·x) + dB·(A0·x) with B = B0 + dB, regrouped: no sum of a large and a small
        # *weight*, in which half precision would lose a small displacement.
        change = self._up(module, moved, self.anchor.B0)
        start = self._down(module, x, self.anchor.A0)
        return change + self._up(module, moved + start, self.dB)

    def _down(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """A·x."""
        match self.layout.kind:
            case "embedding":
                return functional.embedding(x, a.T, module.padding_idx)  # type: ignore[arg-type]
            case "conv":
                kernel = a.view(a.shape[0], *self.layout.shape[1:])
                result: Tensor = module._conv_forward(x.to(a.dtype), kernel, None)  # type: ignore[operator]
                return result
        return functional.linear(x.to(a.dtype), a)

    def _up(self, module: nn.Module, hidden: Tensor, b: Tensor) -> Tensor:
        """−s·B·hidden."""
        hidden = hidden * -self.scaling
        if self.layout.kind == "conv":
            spatial = len(self.layout.shape) - 2
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
            return convolve(hidden, b.view(*b.shape, *[1] * spatial))
        change = functional.linear(hidden, b)
        if self.layout.kind == "embedding":
            scale = getattr(module, "embed_scale", None)  # Gemma and others scale the lookup
            return change if scale is None else change * scale
        return change

    def _spread(self, vector: Tensor) -> Tensor:
        """A vector (out,) along the output's channels."""
        if self.layout.kind != "conv":
            return vector
        return vector.view(-1, *[1] * (len(self.layout.shape) - 2))
