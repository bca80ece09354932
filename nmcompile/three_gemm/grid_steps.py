"""The steps of a layer's grids: SAWB's of the weight, and calibrated or learned ones of the input and the output.

SAWB's step is not state: it follows the dense weight, and so does the step of 8-bit weights. A weight that was rounded
while it was pruned is dense no more, and its moments say nothing about its grid, so the step of that grid is state.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmcompile.errors import CalibrationError
from nmcompile.ir.plan import EIGHT, PlanRow
from nmcompile.quantization import Grid, positive_clip, sawb_scale
from nmcompile.weight_cache import WeightCache, is_cacheable

DIGITS = 2**10
_weight_steps: WeightCache[Tensor] = WeightCache()


class ActivationStep:
    """The clip of one layer, kept out of `parameters()` and `state_dict()`: dense checkpoints keep their keys.

    Args:
        layer: the layer's name, for messages; of a stream, the first one.
        row: the plan's row, with the grid, and `pact` as operator if the clip is learned.
        device: device of the layer's weight.
    """

    def __init__(self, layer: str, row: PlanRow, device: torch.device) -> None:
        assert row.grid is not None
        self.layer = layer
        self.row = row
        self.grid: Grid = row.grid
        self.is_calibrated = False
        # On the CPU even for a model on meta, where a clip would lose its value.
        device = torch.device("cpu") if device.type == "meta" else device
        self.clip = nn.Parameter(torch.full((), torch.nan, device=device), requires_grad=row.operator == "pact")

    def current(self) -> Tensor:
        """Return the step, positive, 0-d float32; NaN before it is calibrated."""
        return positive_clip(self.clip) / self.grid.high

    def check(self) -> None:
        """Raise CalibrationError if no clip was found yet."""
        if not self.is_calibrated:
            raise CalibrationError(
                f"layer {self.layer!r}: its {self.row.operand} is to be quantized, but no clip is calibrated; pass "
                "calibration=loader to nmcompile.compile, or call nmcompile.calibrate(model, loader)"
            )

    @torch.no_grad()
    def calibrate(self, clip: float | Tensor) -> None:
        """Set the clip: the largest magnitude that the grid holds.

        The step of a stream gets so few digits that its multiples, and their sums, are exact in float32.
        """
        self.clip.fill_(clip)
        if self.row.stream:
            mantissa, exponent = torch.frexp(positive_clip(self.clip) / self.grid.high)
            self.clip.copy_(torch.ldexp((mantissa * DIGITS).round() / DIGITS, exponent) * self.grid.high)
        self.is_calibrated = True

    def move(self, device: torch.device) -> None:
        if self.clip.device != device and device.type != "meta":
            with torch.inference_mode(False), torch.no_grad():
                self.clip.data = self.clip.data.to(device)


@dataclass
class GridSteps:
    """The steps that a layer's integers are multiplied by; None if an operand is in full precision.

    Args:
        weight_grid: grid of the weight.
        weight_dim: the weight's out dim if every out-channel has its own step, None for one step.
        weight: step of a weight whose values are on its grid already; None for one that follows the weight.
        input: step of the input.
        output: step of the output, after its ReLU if that grid is unsigned.
        unused: another grid, with its step, that the weight was rounded to before; a later compilation may ask for it.

    `activations` are the existing steps of the input and of the output.
    """

    weight_grid: Grid | None = None
    weight_dim: int | None = None
    weight: Tensor | None = None
    input: ActivationStep | None = None
    output: ActivationStep | None = None
    unused: tuple[Grid, Tensor] | None = None
    activations: tuple[ActivationStep, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.activations = tuple([step for step in (self.input, self.output) if step is not None])

    def current(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the steps of the weight, of the input and of the output."""
        if self.weight_grid is None and not self.activations:
            return None, None, None
        return self.of_weight(weight), self.of_input(), self.of_output()

    def of_weight(self, weight: Tensor) -> Tensor | None:
        """Return the step of the weight: that of the dense weight, unless the weight was rounded to another."""
        if self.weight is not None:
            return self.weight.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return None if self.weight_grid is None else self._of_weight(weight, self.weight_grid.bits)

    def move(self, device: torch.device) -> None:
        """Move the steps that are state to where the layer runs."""
        for step in self.activations:
            step.move(device)
        if self.weight is not None and device.type not in ("meta", self.weight.device.type):
            with torch.inference_mode(False), torch.no_grad():
                self.weight = self.weight.to(device)

    @torch.no_grad()
    def _of_weight(self, weight: Tensor, bits: int) -> Tensor:
        dim = self.weight_dim
        if not is_cacheable(weight):
            return _step(weight, bits, dim)
        return _weight_steps.get(weight, (), (bits, dim), lambda: _step(weight, bits, dim))

    @torch.no_grad()
    def of_accumulator(self, weight: Tensor) -> Tensor | None:
        """Return the step of the integer sums, float64, one or `(out,)`; None unless weight and input are quantized."""
        step, input_step = self.of_weight(weight), self.of_input()
        return None if step is None or input_step is None else step.double().reshape(-1) * input_step.double()

    def check(self) -> None:
        """Raise CalibrationError if an activation has no clip yet."""
        for step in self.activations:
            step.check()

    def of_input(self) -> Tensor | None:
        return None if self.input is None else self.input.current()

    def of_output(self) -> Tensor | None:
        return None if self.output is None else self.output.current()


def _step(weight: Tensor, bits: int, dim: int | None) -> Tensor:
    """Return SAWB's step of a dense weight; for 8 bits the largest magnitude's, since nothing is won by clipping."""
    if bits < EIGHT:
        return sawb_scale(weight, bits, dim=dim)
    others = [d for d in range(weight.dim()) if dim is None or d != dim % weight.dim()]
    largest = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs().amax(others, keepdim=dim is not None)
    step = largest / Grid(bits, signed=True).high
    return torch.where(step == 0, 1.0, step)
