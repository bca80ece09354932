"""`nmcompile.freeze`: frozen weights are not compared, and any change to them ends the promise."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import StateError
from nmcompile.ir import operations
from nmcompile.three_gemm import triple as three_gemm
from nmcompile.three_gemm.triple import is_at_rest
from nmcompile.training import masks
from nmcompile.weight_cache import FROZEN

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def compiled(mode: str = "weights") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    config = CompileConfig(ends="sparse")
    return nmcompile.compile(net, mode, config=config, calibration=[X] if mode == "inference" else None).eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(X)
    return output


def fresh(model: nn.Module) -> Tensor:
    """Return the output of a model that is compiled with this one's present weights."""
    other = compiled()
    other.load_state_dict(model.state_dict())
    return run(other)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the weights whose fingerprint a call computed."""
    found: list[Tensor] = []

    def noted(x: Tensor) -> int:
        found.append(x)
        return 1

    for module in (three_gemm, masks):
        monkeypatch.setattr(module, "fingerprint", noted)
    return found


@pytest.mark.parametrize("mode", ["weights", "inference"])
def test_nothing_is_compared(mode: str, compared: list[Tensor]) -> None:
    model = compiled(mode)
    expected = run(model)
    nmcompile.freeze(model)
    compared.clear()
    found = run(model)
    # Small layers multiply integers too when they are frozen: their sums are exact.
    tolerance = 0.0 if mode == "weights" else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        assert torch.equal(model(X), found) and not compared


def test_masked_weights_are_cached_until_they_are_trained() -> None:
    model = compiled("weights")
    weight, expected = model.get_parameter("0.weight"), run(model)
    assert weight not in operations._masked
    nmcompile.freeze(model)
    assert torch.equal(run(model), expected) and weight in operations._masked
    assert torch.equal(run(model), expected)
    step(model)
    assert weight not in operations._masked
    torch.testing.assert_close(run(model), fresh(model))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager"),  # type: ignore[dict-item, return-value]
    "a parent": lambda model: nn.Sequential(model, nn.Identity()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_is_frozen_in_what_wraps_it(wrapper: str, compared: list[Tensor]) -> None:
    model = WRAPPERS[wrapper](compiled())
    run(model)
    nmcompile.freeze(model)
    run(model)  # torch.compile finds by the guards of the graph before that it needs another one
    compared.clear()
    run(model)
    assert not compared


def call_with_gradients(model: nn.Module) -> None:
    model(X)


def step(model: nn.Module) -> None:
    """Step one parameter, whose gradient exists already."""
    optimizer = torch.optim.SGD([model[2].bias], 0.1)  # type: ignore[index]
    model[2].bias.grad = torch.ones(16)  # type: ignore[index]
    optimizer.step()


def load(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


def load_sparse_state(model: nn.Module) -> None:
    nmcompile.load_sparse_state_dict(model, nmcompile.sparse_state_dict(model))


def move(model: nn.Module) -> None:
    model.double().float()


def compile_again(model: nn.Module) -> None:
    nmcompile.compile(model, "weights", config=CompileConfig(ends="sparse"), inplace=True)


@pytest.mark.parametrize("change", [call_with_gradients, step, load, load_sparse_state, move, compile_again])
def test_what_may_change_weights_takes_it_back(change: Callable[[nn.Module], None]) -> None:
    model = compiled()
    nmcompile.freeze(model)
    run(model)
    change(model)
    run(model)
    model[0].weight.data.mul_(torch.randn(32, 16))  # type: ignore[index]
    torch.testing.assert_close(run(model), fresh(model))


def test_what_changes_no_weight_does_not() -> None:
    model = compiled().requires_grad_(False)
    nmcompile.freeze(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    other = compiled()
    step(other)
    model.train().eval()
    nmcompile.inspect(model)
    assert model[0].three_gemms[""].frozen.holds  # type: ignore[index]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_frozen(make: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled()
    nmcompile.freeze(model)
    expected, copied = run(model), make(model)
    run(copied)
    copied[0].weight.data.mul_(-2 * torch.rand(32, 16))  # type: ignore[index]
    torch.testing.assert_close(run(copied), fresh(copied))
    assert torch.equal(run(model), expected)


def test_other_weights_in_the_place_of_frozen_ones_are_compared() -> None:
    model = compiled()
    nmcompile.freeze(model)
    run(model)
    other = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        for _ in range(2):
            found, expected = functional_call(model, other, (X,)), compiled()
            expected.load_state_dict(other)
            torch.testing.assert_close(found, run(expected))
            other["0.weight"].data.mul_(torch.randn(32, 16))


def test_elsewhere_than_on_the_cpu_only_frozen_weights_are_cached() -> None:
    """Off the CPU a comparison would wait for the device."""
    weight = torch.empty(4, 4, device="meta")
    found = [is_at_rest(content, weight, is_trained=False, is_compiling=False) for content in (1, FROZEN)]
    assert found == [False, True]


def test_a_model_that_is_not_compiled_is_refused() -> None:
    with pytest.raises(StateError, match="Linear is not compiled"):
        nmcompile.freeze(nn.Linear(4, 4))
