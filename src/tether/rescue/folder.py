"""A PEFT folder read site by site: shapes from the header, values when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tether.checkpoint import DTYPES
from tether.errors import HeaderError
from tether.formats import container, peft_config, peft_names, peft_read, peft_write
from tether.linalg import check_finite
from tether.value import Adapter, Json, LayerAdapter, Trained

# Settings of the starts that are rescued; they say nothing about what the tensors mean.
_OF_STARTS = ("corda_config", "lora_ga_config")


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """A PEFT LoRA on disk. Made by `open`.

    Attributes:
        path: of the folder.
        config: its settings.
        weights: its tensors' file.
        shapes: the adapter as its header describes it: tensors on the meta device, no values.
        keys: site path -> names of its tensors in the file.
        dtypes: site path -> the coarsest dtype of its tensors.
    """

    path: Path
    config: Mapping[str, Json]
    weights: Path
    shapes: Adapter
    keys: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def open(cls, path: Path) -> "PeftFolder":
        """Read settings and header.

        Args:
            path: of the folder. Only read.

        Returns:
            the folder; no file stays open.

        Raises:
            NotAnAdapterError: a file is missing, or it is not a LoRA.
            PickleRefusedError: the weights are a .bin.
            UnsupportedAdapterError: it holds something that would be lost, by name.
            HeaderError: a file is malformed.
        """
        config = peft_config.read_config(path)
        peft_config.refuse_unsupported(path, config, _OF_STARTS)
        weights = peft_config.weights_file(path)
        described = _describe(weights)
        shapes = peft_read.assemble(weights, config, described)
        keys = {site: _keys(site, described) for site in shapes.layers}
        dtypes = {
            site: max((described[key].dtype for key in keys[site]), key=coarseness)
            for site in shapes.layers
        }
        return cls(path, config, weights, shapes, keys, dtypes)

    def layer(self, site: str) -> LayerAdapter:
        """Read one site.

        Args:
            site: its path.

        Returns:
            its trained factors, float32, in memory of their own.

        Raises:
            NonFiniteError: a factor holds NaN or Inf.
        """
        # Of one site alone: what is trained whole is not looked for.
        config = dict(self.config) | {"bias": "none", "modules_to_save": None}
        with container.opened(self.weights) as file:
            tensors = {key: file.get_tensor(key) for key in self.keys[site]}
        return peft_read.assemble(self.weights, config, tensors).layers[site]

    def bias(self, path: str) -> Trained:
        """Read one trained bias.

        Args:
            path: of its module.

        Returns:
            the bias itself, float32.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        return self._whole(peft_write.bias_key(self.shapes, path))

    def module(self, path: str, name: str) -> Trained:
        """Read one parameter of a module trained whole.

        Args:
            path: of the module.
            name: of the parameter.

        Returns:
            the parameter itself, float32.

        Raises:
            NonFiniteError: it holds NaN or Inf.
        """
        return self._whole(peft_write.module_key(path, name))

    def _whole(self, key: str) -> Trained:
        with container.opened(self.weights) as file:
            tensor = file.get_tensor(key).to(torch.float32, copy=True)
        check_finite(tensor, f"{self.weights}: tensor {key!r} in float32")
        return Trained(tensor, None)


def coarseness(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype.

    Args:
        dtype: floating.

    Returns:
        its unit roundoff.
    """
    return float(torch.finfo(dtype).eps / 2)


def _describe(weights: Path) -> dict[str, Tensor]:
    described = {}
    with container.opened(weights) as file:
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise HeaderError(
                    f"{weights}: tensor {key!r} has dtype {part.get_dtype()}; read are "
                    f"{', '.join(DTYPES)}."
                )
            dtype = DTYPES[part.get_dtype()]
            described[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return described


def _keys(site: str, described: Mapping[str, Tensor]) -> tuple[str, ...]:
    stem = f"{peft_names.PREFIX}{site}.lora_"
    return tuple(key for key in described if key.startswith(stem))
