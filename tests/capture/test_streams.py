"""Streams: which results are added or concatenated, and how far each may reach so that all sums fit into 8 bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nmcompile.capture import capture_model


class Chain(nn.Module):
    """A first result to which those of other layers are added, each sum followed by `between`."""

    def __init__(
        self, added: int, between: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(added + 1))
        self.between, self.join = between, join

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.layers[0](x))
        for layer in list(self.layers)[1:]:
            x = self.between(self.join(layer(x), x))
        return x.mean()


def room(model: nn.Module) -> int | None:
    captured = capture_model(model, (torch.randn(1, 4, 3, 3),))
    streams = {facts.stream for facts in captured.facts.values()}
    [stream] = streams
    assert stream is None or set(stream.layers) == set(captured.facts)
    return None if stream is None else stream.room


@pytest.mark.parametrize("added", [1, 2, 5])
def test_rectified_sums_take_the_whole_byte(added: int) -> None:
    """A sum of k results, each up to r, reaches k r. The ReLU before it reaches as far, and the smallest is 0."""
    found = room(Chain(added, torch.relu, torch.add))
    assert found == max(r for r in range(256) if (added + 1) * r <= 255)


@pytest.mark.parametrize("added", [1, 2, 5])
def test_signed_sums_take_half_of_it(added: int) -> None:
    found = room(Chain(added, nn.Identity(), lambda a, b: a + b))
    assert found == max(r for r in range(256) if (added + 1) * r <= 127)


def test_a_sum_that_is_read_before_its_relu_is_signed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            return torch.relu(y).sum() + y.sigmoid().sum()

    assert room(Both()) == 127 // 2


def test_results_side_by_side_have_room_for_all_of_it() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1).mean()

    assert room(Side()) == 255


@pytest.mark.parametrize(
    "between",
    [torch.sigmoid, nn.ReLU6(), lambda x: x * 2, lambda x: x + 1, nn.AvgPool2d(1)],
    ids=["sigmoid", "relu6", "scaled", "shifted", "pooled"],
)
def test_anything_else_between_ends_a_stream(between: Callable[[Tensor], Tensor]) -> None:
    assert room(Chain(2, between, torch.add)) is None


@pytest.mark.parametrize(
    "join",
    [lambda a, b: torch.add(a, b, alpha=2), torch.sub, torch.mul, lambda a, b: a + a],
    ids=["weighted", "sub", "mul", "twice"],
)
def test_only_sums_join(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert room(Chain(1, torch.relu, join)) is None
