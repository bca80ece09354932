"""Small compiled networks whose convolutions have weights and inputs of four bits."""

import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, Phase


class Convolutions(nn.Module):
    first: nn.Conv1d | nn.Conv2d
    last: nn.Conv1d | nn.Conv2d


class Images(Convolutions):
    """Three convolutions: one of signed inputs with a bias, a grouped one with a stride, and a dilated one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, (3, 1), stride=(2, 1), padding=(2, 0), groups=2, bias=False)
        self.last = nn.Conv2d(24, 12, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.grouped(torch.relu(self.norm(self.first(x))))))
        return y


class Signals(Convolutions):
    """Two 1-d convolutions; the first pads by wrapping around, so it reads another input than its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 16, 5, padding=2, padding_mode="circular")
        self.last = nn.Conv1d(16, 12, 3, stride=2, padding=3, dilation=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


INPUTS: dict[type[Convolutions], tuple[int, ...]] = {Images: (2, 8, 7, 9), Signals: (2, 8, 19)}


def model(
    kind: type[Convolutions] = Images,
    backend: str = "cpu",
    bits: int = 4,
    granularity: str = "tensor",
    clip: str = "mse",
    prunes_inputs: bool = False,
) -> tuple[Convolutions, Tensor]:
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(INPUTS[kind])
    every = nmcompile.presets["inference"]
    every = every if prunes_inputs else LayerConfig(every.weight, weight_bits=bits, input_bits=4)
    config = CompileConfig(layers={"_default": every}, ends="sparse", granularity=granularity, clip=clip)
    compiled = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend=backend)
    assert isinstance(compiled, kind)
    return compiled.eval(), x


def kernels_of(compiled: nn.Module) -> list[str]:
    return [layer.choices[Phase.FORWARD].kernel for layer in nmcompile.inspect(compiled).layers]
