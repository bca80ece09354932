"""The two-bit methods of Table 5: PACT with DoReFa weights, QIL, and LSQ, for networks of convolutions."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile.quantization import pact_quantize

BITS = 2
LEVELS = 2**BITS - 1


def round_through(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return x + (x.round() - x).detach()


class DoReFaWeight(nn.Module):
    """Weights of DoReFa (Zhou et al. 2016), as PACT uses them: w -> 2 q(tanh w / (2 max|tanh w|) + 1/2) - 1."""

    def forward(self, w: Tensor) -> Tensor:
        squashed = torch.tanh(w)
        unit = squashed / (2 * squashed.abs().max()) + 0.5
        result: Tensor = 2 * round_through(unit * LEVELS) / LEVELS - 1
        return result


class PactInput(nn.Module):
    """Inputs with a learned clip (Choi et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = nn.Parameter(torch.tensor(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return pact_quantize(x, self.clip, BITS)


class QilWeight(nn.Module):
    """Weights rounded within a learned interval of |w|, pruned below it and clipped above (Jung et al. 2019)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        largest = float(w.detach().abs().max())
        self.centre, self.distance = (nn.Parameter(torch.tensor(largest / 2)) for _ in range(2))

    def forward(self, w: Tensor) -> Tensor:
        unit = ((w.abs() - self.centre + self.distance) / (2 * self.distance)).clamp(0, 1)
        result: Tensor = w.sign() * round_through(unit)
        return result


class QilInput(nn.Module):
    """QIL's learned interval for non-negative activations, on 2^b - 1 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.centre, self.distance = (nn.Parameter(torch.tensor(1.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        unit = ((x - self.centre + self.distance) / (2 * self.distance)).clamp(0, 1)
        result: Tensor = round_through(unit * LEVELS) / LEVELS
        return result


class Lsq(nn.Module):
    """A grid with a learned step, whose gradient is scaled by 1 / sqrt(elements * high) (Esser et al. 2020)."""

    def __init__(self, low: int, high: int, start: Tensor) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.step = nn.Parameter(2 * start.detach().abs().mean() / high**0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / (x.numel() * self.high) ** 0.5
        step = (self.step * scale) + (self.step * (1 - scale)).detach()
        result: Tensor = round_through((x / step).clamp(self.low, self.high)) * step
        return result


def inner_convs(model: nn.Module) -> Iterator[nn.Conv2d]:
    """Return all convolutions except the first."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    yield from convs[1:]


def quantize(model: nn.Module, weight: Callable[[Tensor], nn.Module], input: Callable[[], nn.Module]) -> nn.Module:
    """Quantize weight and input of every convolution except the first; the linear head stays as it is."""
    for conv in inner_convs(model):
        device = conv.weight.device
        parametrize.register_parametrization(conv, "weight", weight(conv.weight).to(device))
        conv.add_module("quantize_input", input().to(device))
        conv.register_forward_pre_hook(lambda module, args: (module.quantize_input(args[0]),))
    return model


def pact(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train in full precision, then with DoReFa weights and learned clips."""
    yield model
    yield quantize(model, lambda w: DoReFaWeight(), PactInput)


def qil(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train in full precision, then with learned intervals."""
    yield model
    yield quantize(model, QilWeight, QilInput)


def lsq(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train in full precision, then with learned steps."""
    yield model
    yield quantize(model, lambda w: Lsq(-2, 1, w), lambda: Lsq(0, LEVELS, torch.full((1,), 0.8)))
