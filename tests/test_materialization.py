"""A compiled model survives every way in which PyTorch brings a model to its weights, in every mode and function."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
MODES = ["weights", "training", "activations", "inference"]
State = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))


def compiled(model: nn.Module, mode: str) -> nn.Module:
    return nmcompile.compile(model, mode, config=CompileConfig(ends="sparse", refresh=2))


def on_meta(mode: str, inside: bool) -> nn.Module:
    with torch.device("meta"):
        model = net()
        if inside:
            return compiled(model, mode)
    return compiled(model, mode)


def _loaded(state: State) -> nn.Module:
    model = net()
    model.load_state_dict(state)
    return model


def usual(mode: str, state: State) -> nn.Module:
    return compiled(_loaded(state), mode)


def in_inference_mode(mode: str, state: State) -> nn.Module:
    model = _loaded(state)
    with torch.inference_mode():
        return compiled(model, mode)


def within_a_device(mode: str, state: State) -> nn.Module:
    """Compile under a default device: the weights exist, and only tensors that compile makes could be misplaced."""
    model = _loaded(state)
    with torch.device("meta"):
        return compiled(model, mode)


def to_empty(mode: str, state: State) -> nn.Module:
    model = on_meta(mode, inside=False).to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def assign(mode: str, state: State) -> nn.Module:
    model = on_meta(mode, inside=False)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    return model


def assign_inside(mode: str, state: State) -> nn.Module:
    model = on_meta(mode, inside=True)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    return model


def attributes(mode: str, state: State) -> nn.Module:
    model = on_meta(mode, inside=False)
    for name, value in copy.deepcopy(state).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, attribute, nn.Parameter(value) if attribute in module._parameters else value)
    return model


def entries(mode: str, state: State) -> nn.Module:
    """Fill in the weights as Accelerate and Transformers do, past `nn.Module.__setattr__`."""
    model = on_meta(mode, inside=True)
    for name, value in copy.deepcopy(state).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(value)
        else:
            module._buffers[attribute] = value
    return model


WAYS: list[Callable[[str, State], nn.Module]] = [
    in_inference_mode, within_a_device, to_empty, assign, assign_inside, attributes, entries,
]  # fmt: skip


@pytest.fixture
def state() -> State:
    model = net()
    model(X)
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(model: nn.Module) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        output: Tensor = model(X)
        output.square().mean().backward()
        optimizer.step()
    return output.detach()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    output: Tensor = model.eval()(X)
    return output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_the_usual_one(way: Callable[[str, State], nn.Module], mode: str, state: State) -> None:
    model, expected = way(mode, state), usual(mode, state)
    _same_state(model, expected)
    for one in (model, expected):
        if mode == "inference":
            nmcompile.calibrate(one, [X])
    for function in (outputs, train, outputs, lambda one: outputs(copy.deepcopy(one))):
        assert torch.equal(function(model), function(expected))
    assert torch.equal(outputs(nmcompile.finalize(model)), outputs(nmcompile.finalize(expected)))
    for one in (model, expected):
        one(X)
    _same_state(model, expected)
    nmcompile.load_sparse_state_dict(model, nmcompile.sparse_state_dict(expected))
    assert nmcompile.verify(model).ok


def _same_state(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = nmcompile.sparse_state_dict(model), nmcompile.sparse_state_dict(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert not found[name].is_meta and not found[name].is_inference()
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", [in_inference_mode, assign_inside])
def test_it_is_exported(way: Callable[[str, State], nn.Module], state: State, tmp_path: Path) -> None:
    model = way("inference", state).eval()
    nmcompile.calibrate(model, [X])
    nmcompile.export(model, tmp_path / "model.onnx", (X,))
    assert nmcompile.verify(tmp_path / "model.onnx").ok


def test_a_clip_outlives_meta(state: State) -> None:
    """It is found before the weights go, and read after they come back."""
    model = usual("inference", state)
    nmcompile.calibrate(model, [X])
    expected = outputs(model)
    model.to("meta")
    model.load_state_dict(state, assign=True)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("mode", ["weights", "inference"])
def test_weights_that_are_inference_tensors_run(mode: str, state: State) -> None:
    with torch.inference_mode():
        model = usual(mode, state)
        if mode == "inference":
            nmcompile.calibrate(model, [X])
        found = model.eval()(X)
    expected = usual(mode, state)
    if mode == "inference":
        nmcompile.calibrate(expected, [X])
    assert torch.equal(outputs(model), outputs(expected)) and torch.equal(found, outputs(expected))
