"""`CompileConfig(permute=True)`: the same outputs before pruning, more kept magnitude, and smaller errors after it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import ConfigError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A small residual network with batch norms, whose weights have channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    sizes = 4 * torch.rand(parameter.shape[1]).square()
                    parameter.mul_(sizes.view(-1, *[1] * (parameter.dim() - 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(self.pool(x + self.block(x)))
        return y


def compiled(model: nn.Module, mode: str = "weights", inplace: bool = False, **options: Any) -> Any:
    return nmcompile.compile(
        model.eval(), mode, args=(X,), config=CompileConfig(**options), inplace=inplace, calibration=[X, X.flip(0)]
    )


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module) -> float:
    return float((one(X) - other(X)).norm() / other(X).norm())


def kept(model: nn.Module) -> float:
    """Return the sum of magnitudes that a finalized model holds in its pruned layers."""
    plain = nmcompile.finalize(model)
    return sum(
        float(plain.get_parameter(f"{name}.weight").detach().abs().sum()) for name in ("block.0", "block.3", "head.0")
    )


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training"])
def test_outputs_before_pruning_are_the_same(mode: str) -> None:
    model = Residual().double().eval()
    pruned = nmcompile.compile(model, mode, args=(X.double(),), config=CompileConfig(permute=True))
    dense = nmcompile.decompile(pruned)
    with torch.no_grad():
        torch.testing.assert_close(dense(X.double()), model(X.double()), rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(p, q) for p, q in zip(dense.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
def test_more_magnitude_is_kept(mode: str) -> None:
    model = Residual()
    assert kept(compiled(model, mode, permute=True)) > 1.01 * kept(compiled(model, mode))


@pytest.mark.parametrize("masks", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_can_follow(masks: str) -> None:
    model = Residual()
    pruned = compiled(model, masks=masks, permute=True)
    assert nmcompile.verify(pruned).ok
    assert distance(pruned, model) < distance(compiled(model, masks=masks), model)


def test_the_source_keeps_its_order_unless_inplace() -> None:
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    expected = compiled(model, permute=True).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weight = model.block[0].weight
    assert compiled(model, permute=True, inplace=True) is model
    assert model.block[0].weight is weight
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_report_says_what_was_won_or_why_not() -> None:
    pruned = compiled(Residual(), permute=True)
    pruned(X)
    text = nmcompile.inspect(pruned).full()
    assert "of the pruned magnitude won back" in " ".join(text.split())
    assert '"permutation": "in-channels permuted' in nmcompile.inspect(pruned).to_json()


def test_a_model_without_a_whole_graph_keeps_its_order() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(x) if float(x.sum()) > 0 else self.first(x)
            return y

    torch.manual_seed(0)
    model = Branch()
    pruned = nmcompile.compile(model, "weights", config=CompileConfig(permute=True, ends="sparse"))
    pruned(torch.ones(2, 16))
    assert nmcompile.inspect(pruned).layer("second").permutation.startswith("in-channels keep their order")
    assert torch.equal(pruned.get_parameter("second.weight"), model.second.weight)


def test_masks_in_the_present_order_are_refused() -> None:
    pruned = compiled(Residual())
    pruned(X)
    with pytest.raises(ConfigError, match="masks in the present order"):
        nmcompile.compile(pruned, "weights", args=(X,), config=CompileConfig(permute=True))


def test_an_exported_model_permutes_nothing_at_run_time(tmp_path: Path) -> None:
    pruned = compiled(Residual(), permute=True)
    nmcompile.export(pruned, tmp_path / "model.onnx", args=(X,))
    assert nmcompile.verify(tmp_path / "model.onnx").ok
    import onnx

    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"Gather", "GatherElements", "ScatterND"}


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    ).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_that_share_memory_stay_right(inplace: bool) -> None:
    x, model = torch.randn(8, 16), network()
    model[4].weight = nn.Parameter(model.get_parameter("2.weight").data)
    expected = model(x)
    layers = dict.fromkeys(("2", "4"))  # the others move, so that a wrong order would show
    config = CompileConfig(permute=True, ends="sparse", layers=layers)
    dense = nmcompile.decompile(nmcompile.compile(model, "weights", args=(x,), config=config, inplace=inplace))
    torch.testing.assert_close(dense(x), expected)


@pytest.mark.parametrize("options", [{"permute": True}, {"masks": "sparsegpt"}, {"masks": "admm", "permute": True}])
def test_new_parameters_keep_attributes_and_hooks(options: dict[str, Any]) -> None:
    x, model = torch.randn(8, 16), network()
    weight = model[2].weight
    weight.lr_scale = 0.1
    calls = list[str]()
    weight.register_hook(lambda gradient: gradient * 0)
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    model[4].weight.requires_grad_(False)
    pruned = nmcompile.compile(model, "weights", args=(x,), config=CompileConfig(**options), calibration=[x])
    new: Any = pruned.get_parameter("2.weight")
    assert new is not weight
    assert new.lr_scale == 0.1
    assert not pruned.get_parameter("4.weight").requires_grad
    pruned(x).sum().backward()
    assert calls == ["accumulated"]
    assert new.grad is not None and not new.grad.any()
    new.register_hook(lambda gradient: gradient + 1)
    model(x).sum().backward()
    assert weight.grad is not None and not weight.grad.any()  # the source has none of the result's later hooks


@pytest.mark.parametrize("options", [{"permute": True}, {"masks": "sparsegpt"}])
def test_new_parameters_keep_their_strides(options: dict[str, Any]) -> None:
    model: Any = Residual()
    model.to(memory_format=torch.channels_last)
    model.head[0].weight = nn.Parameter(model.head[0].weight.detach().T.contiguous().T)
    pruned = compiled(model, **options)
    for name, old in model.named_parameters():
        assert pruned.get_parameter(name).stride() == old.stride(), name
    assert pruned.get_parameter("block.3.weight") is not model.block[3].weight


def test_buffers_keep_their_attributes() -> None:
    model: Any = Residual()
    model.stem[1].running_mean.source = "data"
    new = compiled(model, permute=True).get_buffer("stem.1.running_mean")
    assert new is not model.stem[1].running_mean
    assert new.source == "data"
