"""The batch norm after a quantized layer: in eval() it computes the same as export does for the two.

In train() it is the original norm. In eval() its gain goes into the layer's scale and its shift is rounded to whole
steps of the layer's accumulator, as integer kernels add it. Its result is then put on the grid of the layer's output,
if the plan has one; the gradient passes straight through inside the grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nmcompile.quantization import absorbed_step, fake_quantize
from nmcompile.three_gemm.modules import ThreeGemmLayer
from nmcompile.three_gemm.rewritten import Rewritten, put_class


class AbsorbedNorm(Rewritten):
    """Mixin of such a norm; `absorbing_layer` is the layer's module."""

    PREFIX = "Absorbed"
    absorbing_layer: ThreeGemmLayer

    num_features: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    training: bool
    _check_input_dim: Callable[[Tensor], None]

    def forward(self, input: Tensor) -> Tensor:
        observer = self.absorbing_layer.three_gemms[""].observer
        return self.run_absorbed(input) if observer is None else observer.run_norm(self, input)

    def run_absorbed(self, input: Tensor, is_rounded: bool = True) -> Tensor:
        """Return the norm of `input`: rounded to the layer's accumulator and output grid, or in full precision."""
        self._check_input_dim(input)
        if self.training or not self._is_along_channels(input):
            output: Tensor = super().forward(input)  # type: ignore[misc]
        else:
            output = self._in_eval(input, is_rounded)
        return self._to_grid(output) if is_rounded else output

    def _to_grid(self, output: Tensor) -> Tensor:
        """Put `output` on the grid of the layer's output, if it has one."""
        step = self.absorbing_layer.three_gemms[""].steps.output
        return output if step is None else fake_quantize(output, step.current(), step.grid)

    def _to_accumulator(self, shift: Tensor, gain: Tensor) -> Tensor:
        """Round `shift`, `(channels,)`, to whole steps of the layer's accumulator times `gain`."""
        layer = self.absorbing_layer
        accumulator = layer.three_gemms[""].accumulator_step(layer.weight)
        assert accumulator is not None  # both operands of such a layer are quantized
        step = absorbed_step(accumulator, gain)
        return shift + ((shift / step).round() * step - shift).detach()

    def _is_along_channels(self, input: Tensor) -> bool:
        """Return whether the norm's dim 1 is the layer's channel dim; a linear layer's features are the last dim."""
        return self.absorbing_layer.three_gemms[""].layer.channel_dim % input.dim() == 1

    def gain_and_shift(self, dtype: torch.dtype, is_rounded: bool = True) -> tuple[Tensor, Tensor]:
        """Return the gain and the shift of each channel in eval(), `(channels,)`; the shift in whole steps if rounded.

        Args:
            dtype: dtype of the arithmetic, to which both are rounded.
            is_rounded: whether the shift is added to integers.
        """
        gain = (self.running_var.double() + self.eps).rsqrt()
        gain = gain if self.weight is None else gain * self.weight.double()
        shift = -gain * self.running_mean.double()
        shift = shift if self.bias is None else shift + self.bias.double()
        shift = self._to_accumulator(shift, gain.detach()) if is_rounded else shift
        return gain.to(dtype), shift.to(dtype)

    def _in_eval(self, input: Tensor, is_rounded: bool) -> Tensor:
        gain, shift = self.gain_and_shift(torch.promote_types(input.dtype, torch.float32), is_rounded)
        shape = -1, *(1,) * (input.dim() - 2)
        return (input * gain.view(shape) + shift.view(shape)).to(input.dtype)


def absorb(norm: nn.Module, layer: nn.Module) -> None:
    """Make `norm`, the batch norm that alone reads the output of the rewritten `layer`, compute as described."""
    norm.__dict__["absorbing_layer"] = layer  # not a child, which would change the names of parameters
    put_class(norm, AbsorbedNorm)
