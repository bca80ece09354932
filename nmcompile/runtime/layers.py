"""The layers of a compiled model as a runtime computes them: integers, and float32 factors of each out-channel."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export.collect_layers import deployed_layers
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer, StackedLinearLayer
from nmcompile.runtime.codes import prunes_codes, step_of
from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm

DEPTH = 2**16
"""Products of bytes in a sum, from which on it may need more than 32 bits."""


@dataclass(frozen=True)
class RuntimeLayer:
    """A layer, and the gain and the shift of the norm that it absorbs, float32 `(out,)`."""

    deployed: DeployedLayer
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def layer(self) -> Layer:
        return self.deployed.layer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def changes_activations(self) -> bool:
        """Return whether anything but the weight tells the layer from the plain model's."""
        parts = self.deployed.input, self.deployed.output
        return bool(self.deployed.norm) or any(part.grid or part.pattern for part in parts)

    @property
    def has_integers(self) -> bool:
        """Return whether integer kernels take the layer: both operands are on grids, any pruning is one of codes."""
        weight, input, layer = self.deployed.weight, self.deployed.input, self.layer
        if weight.grid is None or input.grid is None or weight.scale is None:
            return False
        is_plain = isinstance(layer, LinearLayer) and not isinstance(layer, StackedLinearLayer)
        is_planar = isinstance(layer, ConvLayer) and layer.spatial_dims == 2
        fits = layer.parameters // layer.out_features < DEPTH
        return (is_plain or is_planar) and fits and (input.pattern is None or prunes_codes(input, self.channels))

    @property
    def channels(self) -> int:
        """Return the channels of the input, all groups together."""
        return self.layer.in_features * self.layer.groups

    def integers(self) -> Tensor:
        """Return the weight's integers, int8 `(out, height, width, in / groups)`."""
        weight = self.deployed.weight
        assert weight.scale is not None
        found = torch.round(weight.values / weight.scale).to(torch.int8).movedim(self.layer.out_dim, 0)
        planar = found if found.dim() == 4 else found[:, :, None, None]
        return planar.permute(0, 2, 3, 1).contiguous()

    def steps(self) -> Tensor:
        """Return the steps of the integer sums, float32 `(out,)`."""
        scale = self.deployed.weight.scale
        assert scale is not None
        return (scale * step_of(self.deployed.input)).reshape(-1).expand(self.layer.out_features).contiguous()


@torch.no_grad()
def runtime_layers(compiled: nn.Module) -> dict[str, RuntimeLayer]:
    """Return every layer of a compiled model by name.

    Raises:
        CalibrationError: an input is to be quantized, but not calibrated.
        ExportError: a layer is not float32 on the CPU, or its input is pruned by magnitude and may be negative.
    """
    return {name: _with_norm(compiled, one) for name, one in deployed_layers(compiled).items() if _checked(name, one)}


def of_weights(
    layers: Mapping[str, RuntimeLayer], names: Mapping[str, frozenset[str]]
) -> dict[str, list[RuntimeLayer]]:
    """Return the layers by the name of their weight.

    Args:
        names: all names of each parameter.
    """
    found: dict[str, list[RuntimeLayer]] = {}
    for layer in layers.values():
        for name in names.get(layer.deployed.weight.name, ()):
            found.setdefault(name, []).append(layer)
    return found


def names_of(plain: nn.Module) -> dict[str, frozenset[str]]:
    """Return all names of each parameter, by each of them: tied parameters have several."""
    named = list(plain.named_parameters(remove_duplicate=False))
    aliases: dict[int, set[str]] = {}
    for name, parameter in named:
        aliases.setdefault(id(parameter), set()).add(name)
    return {name: frozenset(aliases[id(parameter)]) for name, parameter in named}


def _with_norm(compiled: nn.Module, deployed: DeployedLayer) -> RuntimeLayer:
    norm = compiled.get_submodule(deployed.norm) if deployed.norm else None
    if not isinstance(norm, AbsorbedNorm):
        return RuntimeLayer(deployed)
    return RuntimeLayer(deployed, *norm.gain_and_shift(torch.float32))


def _checked(name: str, deployed: DeployedLayer) -> bool:
    values = deployed.weight.values
    if values.device.type != "cpu" or values.dtype != torch.float32:
        raise ExportError(
            f"layer {name!r}: its weight is {values.dtype} on {values.device}, and a runtime computes float32 on the "
            "CPU; call compiled.float().cpu() first"
        )
    return True
