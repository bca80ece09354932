"""Experiments beyond the paper: their parts against closed forms."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nmcompile.config import CompileConfig
from nmcompile.errors import ConfigError
from nmcompile.paper import drift, noise, table6
from nmcompile.paper.capacity import half_the_weights
from nmcompile.paper.experiment import Options
from nmcompile.paper.fig5 import PruneByValue, without_relu
from nmcompile.paper.masters import InBfloat16
from nmcompile.paper.methods import Compiled, plain
from nmcompile.paper.networks import NETWORKS, build_network
from nmcompile.paper.text import load_text
from nmcompile.paper.tiles import LooseTiles
from nmcompile.paper.variance import optimal_variance
from nmcompile.pruning.references import OPERATORS


def test_noise_of_known_gradients() -> None:
    torch.manual_seed(0)
    batch, deviation, mean = 8, 3.0, torch.full((40,), 0.5)
    gradients = [mean + deviation / batch**0.5 * torch.randn(40) for _ in range(4000)]
    found = noise.measure_noise(gradients, batch)
    assert found.variance == pytest.approx(40 * deviation**2, rel=0.03)
    assert found.signal == pytest.approx(40 * 0.25, rel=0.03)
    size = found.batch_for(added=10_000.0, share=0.01)
    assert found.more_steps(10_000.0, size) == pytest.approx(0.01)


def test_gradients_behind_batch_norm_sum_to_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    gradients = drift.watch(model)
    F.cross_entropy(model(torch.randn(8, 1, 6, 6)), torch.arange(8) % 3).backward()
    (gradient,) = gradients.values()
    assert gradient.shape == (8, 4, 4, 4) and (gradient.sum((0, 2, 3)).abs() < 1e-5 * gradient.abs().sum()).all()
    skewed = torch.tensor([3.0, -1, 3, -1, -2, -2]).view(6, 1, 1, 1)  # sums to zero; greedy keeps 3, 3 and -2
    assert drift.imbalance(skewed, "greedy").item() == pytest.approx(4 / 12)


@pytest.mark.parametrize(("mean", "ratio"), [(0.0, 1.0), (0.4, 4.0)])
def test_averages_are_set_beside_what_noise_gives(mean: float, ratio: float) -> None:
    torch.manual_seed(0)
    average, noise = drift.sizes(mean + torch.randn(64, 20_000))
    assert average / noise == pytest.approx(ratio, rel=0.03)


def test_loose_tiles_prune_consecutive_inputs_of_an_out_channel() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 8, 2, 2, requires_grad=True)
    pruned = LooseTiles()(w)
    tiles = (pruned != 0).reshape(4, 2, 4, 4)
    assert (tiles.sum(2) == 2).all() and (tiles.sum(3) == 2).all()
    pruned.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))  # type: ignore[arg-type]


def test_pruning_in_place_of_relu_keeps_the_largest_values() -> None:
    x = torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, 1]).view(1, 8, 1, 1)
    assert PruneByValue()(x).flatten().tolist() == [-1, -2, -3, 0, 0, 0, 0, 1]
    model = build_network("small", torch.zeros(1, 1, 28, 28), 10, 0)
    (changed,) = without_relu(model, [])
    kinds = [type(module) for module in changed.modules()]
    assert nn.ReLU not in kinds and kinds.count(PruneByValue) == 7


def test_a_network_of_half_the_weights() -> None:
    model = build_network("small", torch.zeros(1, 1, 28, 28), 10, 0)
    (narrow,) = half_the_weights(model, [torch.zeros(4, 1, 28, 28)])
    inner, kept = (sum(p.numel() for p in m.get_submodule("layers").parameters()) for m in (model, narrow))
    assert kept / inner == pytest.approx(0.5, abs=0.03) and narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ConfigError, match="not a Sequential"):
        list(half_the_weights(nn.Sequential(), []))


def test_bfloat16_masters() -> None:
    model = build_network("small", torch.zeros(1, 1, 28, 28), 10, 0)
    (made,) = InBfloat16(Compiled("training", CompileConfig()))(model, [torch.zeros(4, 1, 28, 28)])
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert str(InBfloat16(plain)) == "plain, bfloat16"


def test_text_is_followed_by_its_next_characters(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("abcde" * 10_000)
    data = load_text(file)
    ((x, y),) = data.train.batches([torch.arange(3)], 0)
    assert data.classes == 5 and torch.equal((x + 1) % 5, y) and torch.equal(x[1, :1], y[0, -1:])
    file.write_text("short")
    with pytest.raises(ConfigError, match="5 characters"):
        load_text(file)


def test_the_transformer_does_not_look_ahead() -> None:
    x = torch.randint(20, (2, 16))
    model = build_network("transformer", x, 20, 0)
    changed = x.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(model(x)[:, :9], model(changed)[:, :9])


@pytest.mark.parametrize("name", [name for name in NETWORKS if "small" in name or name == "resnet18-cifar"])
def test_networks_of_images_train(name: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    if name == "small":
        x = x[:, :1]
    model = build_network(name, x, 10, 0)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cifar_resnet18_has_the_papers_parameters() -> None:
    model = build_network("resnet18-cifar", torch.zeros(1, 3, 32, 32), 10, 0)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # He et al. 2016, in its CIFAR form


def test_unknown_networks_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build_network("resnet81", torch.zeros(1, 3, 32, 32), 10, 0)


def test_overheads_count_the_pruning_alone() -> None:
    x = torch.randn(64, 64)
    assert table6.pruning_seconds(lambda: x @ x) == 0
    assert table6.pruning_seconds(lambda: OPERATORS["mvue"](x, "2:4")) == 0  # not as an operator of a graph


def test_overheads_take_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --data"):
        table6.EXPERIMENT.run(Options(tmp_path, data=tmp_path))


def test_pruning_adds_the_variance_of_the_operator() -> None:
    """For one linear layer on fixed inputs the added variance of the weights' gradient has a closed form."""
    gradient = torch.rand(8, 4, dtype=torch.float64)
    expected = sum(optimal_variance(gradient[start : start + 4].T, 2).sum() for start in (0, 4))
    draws = torch.stack([OPERATORS["mvue"](gradient, "2:4", dim=0) for _ in range(20_000)])
    assert (draws - gradient).square().sum((1, 2)).mean() == pytest.approx(float(expected), rel=0.05)
