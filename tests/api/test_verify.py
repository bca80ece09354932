"""`finalize` makes the pruning real; `verify` counts the blocks that break it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import nmcompile
from nmcompile import CompileConfig, ThreeGemm
from nmcompile.errors import ConfigError, PassError, StateError
from nmcompile.training.find_masks import masks_of

ALL = CompileConfig(ends="sparse")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, groups=2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 6),
    )  # fmt: skip


def trained(mode: str) -> nn.Module:
    model = nmcompile.compile(network(), mode, config=ALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 4, 4)).square().mean().backward()
        optimizer.step()
    return model.eval()


def broken_blocks(weight: Tensor, n_keep: int, block: int) -> int:
    """Count broken blocks one by one along the in-channels, dim 1, with the last block as it is."""
    array: npt.NDArray[np.float32] = weight.detach().numpy()
    lines = np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
    starts = range(0, array.shape[1], block)
    return sum(int(np.count_nonzero(line[start : start + block]) > n_keep) for line in lines for start in starts)


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training"])
def test_finalized_model_is_plain_and_computes_the_same(mode: str) -> None:
    model = trained(mode)
    plain = nmcompile.finalize(model)
    assert [type(module) for module in plain.modules()] == [type(module) for module in network().modules()]
    x = torch.randn(4, 8, 4, 4)
    assert torch.equal(plain(x), model(x))
    assert list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training"])
def test_finalized_weights_obey_the_current_masks(mode: str) -> None:
    """The masks are three steps old, and not those that the weights would get today."""
    model = trained(mode)
    plain = nmcompile.finalize(model)
    for name, mask in nmcompile.sparse_state_dict(model).items():
        if name.endswith(".mask"):
            weight = plain.get_parameter(name.removesuffix(".mask"))
            dense = model.get_parameter(name.removesuffix(".mask"))
            assert torch.equal(weight, torch.where(mask, dense, 0.0))
            assert broken_blocks(weight, 2, 4) == 0 < broken_blocks(dense, 2, 4)


def test_finalize_leaves_the_compiled_model_alone() -> None:
    model = trained("training")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nmcompile.finalize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.get_submodule("0"), ThreeGemm)


def test_finalized_weights_survive_a_state_dict(tmp_path: Path) -> None:
    torch.save(nmcompile.finalize(trained("weights")).state_dict(), tmp_path / "weights.pt")
    plain = network()
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert nmcompile.verify(plain, "2:4").ok


def test_parametrized_weight_becomes_an_ordinary_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    sparse = nmcompile.compile(model, "weights", config=ALL)
    x = torch.randn(3, 8)
    output, plain = sparse(x), nmcompile.finalize(sparse)
    assert torch.equal(plain(x), output)
    assert broken_blocks(plain.get_parameter("0.weight"), 2, 4) == 0


PARAMETRIZATIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight and bias": lambda linear: parametrizations.weight_norm(parametrizations.weight_norm(linear), "bias"),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_finalize_leaves_parametrized_models_alone(name: str) -> None:
    """The weight is a property of a class, which a copy shares with the compiled and with the first model."""
    torch.manual_seed(0)
    model = nn.Sequential(PARAMETRIZATIONS[name](nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8)).eval()
    sparse, x = nmcompile.compile(model, "weights", config=ALL), torch.randn(3, 8)
    before, dense = sparse(x), model(x)
    plain = nmcompile.finalize(sparse)
    assert torch.equal(sparse(x), before) and torch.equal(model(x), dense)
    assert torch.equal(plain(x), before) and nmcompile.verify(plain).ok
    assert torch.equal(nmcompile.finalize(sparse)(x), before)


def test_weight_computed_in_forward_cannot_be_finalized() -> None:
    """Zeros in the parameter would not be zeros of the centered weight."""

    class Centered(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight - self.weight.mean(), self.bias)

    sparse = nmcompile.compile(nn.Sequential(Centered(8, 8), nn.ReLU(), nn.Linear(8, 8)), "weights", config=ALL)
    with pytest.raises(PassError, match=r"'0.*computed in forward.*CompileConfig"):
        nmcompile.finalize(sparse)


@pytest.mark.parametrize(("n_keep", "block"), [(2, 4), (1, 2), (4, 8), (2, 5)])
def test_counts_equal_an_independent_count(n_keep: int, block: int) -> None:
    model = network()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.mul_(torch.rand(parameter.shape, generator=generator) < 0.6)
    report = nmcompile.verify(model, f"{n_keep}:{block}")
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in ("0", "3", "5", "7")}
    expected = {name: broken_blocks(weight, n_keep, block) for name, weight in weights.items()}
    assert {check.name: check.violations for check in report.checks} == expected
    sizes = {name: -(-w.shape[1] // block) * (w.numel() // w.shape[1]) for name, w in weights.items()}
    assert {check.name: check.blocks for check in report.checks} == sizes
    assert not report.ok and any(expected.values())


def test_compiled_model_is_judged_by_its_effective_weights() -> None:
    model = trained("training")
    assert nmcompile.verify(model).ok
    assert not nmcompile.verify(nmcompile.decompile(model), "2:4").ok


def test_transposable_weights_are_checked_both_ways() -> None:
    checks = nmcompile.verify(trained("training")).checks
    assert {(check.name, check.axis) for check in checks} >= {("0.weight", "in"), ("0.weight", "out")}
    assert {check.axis for check in nmcompile.verify(trained("weights")).checks} == {"in"}


@pytest.mark.parametrize("axis", [0, 1])
def test_one_weight_too_many_is_found_in_a_finalized_model(axis: int) -> None:
    plain = nmcompile.finalize(trained("training"))
    weight = plain.get_parameter("5.weight")
    block = weight.data.narrow(axis, 0, 4).select(1 - axis, 0)
    block.fill_(1.0)
    broken = [check for check in nmcompile.verify(plain).checks if check.violations]
    assert ("5.weight", "out" if axis == 0 else "in") in [(check.name, check.axis) for check in broken]
    assert all(check.name == "5.weight" for check in broken)
    assert "5.weight" in str(nmcompile.verify(plain)) and "checks fail" in str(nmcompile.verify(plain))


@pytest.mark.parametrize(("mode", "operands"), [("training", {"weight", "grad_output"}), ("activations", {"input"})])
def test_step_looks_at_every_pruned_operand(mode: str, operands: set[str]) -> None:
    model = nmcompile.compile(nn.Sequential(nn.ReLU(), network()), mode, config=ALL)
    x = torch.rand(4, 8, 4, 4, requires_grad=True)
    report = nmcompile.verify(model, step=lambda: model(x).square().sum().backward())
    assert report.ok and "every block holds" in str(report)
    assert {check.operand for check in report.checks} == operands
    planned = [row for layer in nmcompile.inspect(model).layers for row in layer.plan.rows if row.is_sparse]
    assert len([check for check in report.checks if "(" in check.name]) == len(planned)


def test_a_model_without_sparse_weights_breaks_nothing() -> None:
    sparse = nmcompile.compile(network(), "gradients")
    assert nmcompile.verify(sparse).checks == nmcompile.verify(nmcompile.finalize(sparse)).checks == ()


def test_a_plain_model_needs_a_pattern() -> None:
    with pytest.raises(ConfigError, match="give the pattern"):
        nmcompile.verify(network())


class Parent(nn.Module):
    """Two models that were compiled separately, with layers of the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = model
        self.second = trained("weights")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x)
        return y


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "average": (AveragedModel, "module"),
    "parent": (Parent, "first"),
    "ddp": (DistributedDataParallel, "module"),
}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_broken_mask_is_found_through_a_wrapper(name: str) -> None:
    wrap, path = WRAPPERS[name]
    wrapped = wrap(trained("training"))
    assert nmcompile.verify(wrapped).ok
    masks_of(wrapped.get_submodule(path))["5.weight"].tensor.fill_(True)
    report = nmcompile.verify(wrapped)
    assert {check.name for check in report.checks if check.violations} == {f"{path}.5.weight"}
    assert {f"{path}.{number}.weight" for number in (0, 3, 5, 7)} <= {check.name for check in report.checks}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", WRAPPERS)
def test_finalize_and_verify_work_through_a_wrapper(name: str) -> None:
    wrap, path = WRAPPERS[name]
    wrapped, x = wrap(trained("training")).eval(), torch.randn(4, 8, 4, 4)
    plain = nmcompile.finalize(wrapped)
    assert type(plain) is type(wrapped) and not nmcompile.is_compiled(plain)
    assert torch.equal(plain(x), wrapped(x))
    assert nmcompile.verify(plain).ok and len(nmcompile.verify(plain).checks) >= 7
    plain.get_parameter(f"{path}.5.weight").data.fill_(1.0)
    assert {check.name for check in nmcompile.verify(plain).checks if check.violations} == {f"{path}.5.weight"}


def test_step_names_layers_by_their_place_in_the_wrapper() -> None:
    parent, x = Parent(trained("training")), torch.rand(4, 8, 4, 4)
    report = nmcompile.verify(parent, step=lambda: parent(x).square().sum().backward())
    assert report.ok
    assert {"first.5 (forward)", "second.5 (forward)", "first.5 (update)"} <= {check.name for check in report.checks}


def test_a_part_of_a_compiled_model_cannot_be_finalized() -> None:
    with pytest.raises(StateError, match=r"part of a compiled model.*finalize the whole"):
        nmcompile.finalize(trained("weights").get_submodule("5"))


def test_finalizing_twice_changes_nothing() -> None:
    plain = nmcompile.finalize(nmcompile.finalize(trained("weights")))
    assert len(nmcompile.verify(plain).checks) == 4
