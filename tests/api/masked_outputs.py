"""A network whose outputs are masked with an infinity, as a model masks what must not be chosen."""

import torch
from torch import Tensor, nn


class MaskedOutputs(nn.Module):
    """A network of eight outputs, of which the first is minus infinity."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return y.masked_fill(torch.arange(8) == 0, -torch.inf)
