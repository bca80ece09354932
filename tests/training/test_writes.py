"""Writes to a weight are seen, however made, by calls that do not train it, and by all calls until a step is seen."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import nmcompile
from nmcompile import CompileConfig
from nmcompile.fingerprint import fingerprint
from nmcompile.three_gemm import triple as three_gemm
from nmcompile.training import masks
from nmcompile.training.find_masks import masks_of

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def compiled_linear(refresh: int | None = 100) -> nn.Linear:
    torch.manual_seed(1)
    model = nmcompile.compile(nn.Linear(64, 64), "weights", config=CompileConfig(refresh=refresh, ends="sparse"))
    assert isinstance(model, nn.Linear)
    return model


def masked_by_hand(weight: Tensor) -> Tensor:
    """Keep the two largest of each four."""
    blocks = weight.detach().unflatten(1, (-1, 4))
    smaller = (blocks.abs().unsqueeze(-2) > blocks.abs().unsqueeze(-1)).sum(-1)
    return (blocks * (smaller < 2)).flatten(1)


def by_hand(model: nn.Linear, x: Tensor = X) -> Tensor:
    return nn.functional.linear(x, masked_by_hand(model.weight), model.bias)


def one_element(weight: Tensor) -> None:
    weight.data[41, 7] = 100.0


def one_neuron(weight: Tensor) -> None:
    weight.data[41] = 0


def two_change_places(weight: Tensor) -> None:
    weight.data[[3, 4]] = weight.data[[4, 3]]


def an_average(weight: Tensor) -> None:
    weight.data.lerp_(torch.randn_like(weight), 0.9)


def another_tensor(weight: Tensor) -> None:
    weight.data = torch.randn_like(weight)


def numpy_writes(weight: Tensor) -> None:
    weight.detach().numpy()[5] *= -3


def a_storage(weight: Tensor) -> None:
    weight.untyped_storage().copy_(torch.randn(64, 64).untyped_storage())


def a_fused_kernel(weight: Tensor) -> None:
    """Write as a fused kernel does, which counts no version."""
    torch._fused_sgd_(
        [weight.data], [torch.randn(64, 64)], [],
        weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


WRITES = [
    one_element, one_neuron, two_change_places, an_average, another_tensor, numpy_writes, a_storage, a_fused_kernel,
]  # fmt: skip
CALLS: dict[str, Callable[[nn.Module], Tensor]] = {
    "no_grad": torch.no_grad()(lambda model: model(X)),
    "inference_mode": torch.inference_mode()(lambda model: model(X)),
    "gradients": lambda model: model(X),
    "weights that are not trained": lambda model: model.requires_grad_(False)(X),
}


@pytest.mark.parametrize("refresh", [100, None])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write: Callable[[Tensor], None], call: str, refresh: int | None) -> None:
    model = compiled_linear(refresh)
    CALLS[call](model)
    write(model.weight)
    torch.testing.assert_close(CALLS[call](model).detach(), by_hand(model))


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_graph_sees_a_write(grad: bool) -> None:
    model = compiled_linear()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for write in (one_element, an_average, another_tensor):
            run(X)
            write(model.weight)
            torch.testing.assert_close(run(X).detach(), by_hand(model))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


COPIES: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "moved": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize("make", COPIES)
def test_an_average_of_a_trained_model_is_seen(make: str) -> None:
    """As ema_pytorch and others write it: through `.data`, and before the copy has run."""
    model = compiled_linear()
    train(model)
    average = COPIES[make](model)
    for _ in range(2):
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(torch.randn_like(theirs), 0.5)
        torch.testing.assert_close(average(X).detach(), by_hand(average))


def test_a_copy_of_a_frozen_mask_stays() -> None:
    model = compiled_linear(refresh=None)
    model(X)
    before = masks_of(model)["weight"].tensor.clone()
    train(model, 20)
    for make in COPIES.values():
        copied = make(model)
        copied(X)
        with torch.no_grad():
            copied(X)
        assert torch.equal(masks_of(copied)["weight"].tensor, before)
    assert not torch.equal(masked_by_hand(model.weight) != 0, before)


def test_a_state_says_that_the_mask_is_stale() -> None:
    model = compiled_linear()
    model(X)
    an_average(model.weight)
    assert nmcompile.sparse_state_dict(model)["weight.clock"].tolist() == [0, 1]
    loaded = compiled_linear()
    loaded.load_state_dict(model.state_dict())
    nmcompile.load_sparse_state_dict(loaded, nmcompile.sparse_state_dict(model))
    torch.testing.assert_close(loaded(X), model(X))
    nmcompile.load_sparse_state_dict(loaded, nmcompile.sparse_state_dict(model))
    an_average(loaded.weight)
    torch.testing.assert_close(loaded(X).detach(), by_hand(loaded))


def test_a_mask_that_is_taken_over_is_not_one_of_another_weight() -> None:
    model = compiled_linear()
    model(X)
    an_average(model.weight)
    again = nmcompile.compile(model, "weights", config=CompileConfig(ends="sparse"))
    assert isinstance(again, nn.Linear)
    torch.testing.assert_close(again(X).detach(), by_hand(again))


def test_finalize_and_verify_see_a_write() -> None:
    model = compiled_linear()
    model(X)
    an_average(model.weight)
    torch.testing.assert_close(nmcompile.finalize(model).weight, masked_by_hand(model.weight))
    assert nmcompile.verify(model).ok


def test_a_training_step_compares_nothing_and_other_calls_compare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = compiled_linear(), []
    train(model, 1)

    def noted(weight: Tensor) -> int | None:
        compared.append(weight)
        return fingerprint(weight)

    for module in (three_gemm, masks):
        monkeypatch.setattr(module, "fingerprint", noted)
    train(model)
    assert not compared
    with torch.no_grad():
        model(X)
    assert len(compared) == 1
    run = torch.compile(model, backend="eager", fullgraph=True)
    for context, comparisons in (torch.enable_grad, 0), (torch.no_grad, 1):
        with context():
            run(X)
            compared.clear()
            run(X)
        assert len(compared) == comparisons


def test_an_optimizer_that_nobody_sees_is_followed() -> None:
    """It is recognized by its writes: the training loop of a textbook, through `.data`."""
    model = compiled_linear()
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = model(X)
        torch.testing.assert_close(output.detach(), by_hand(model))
        output.square().sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    assert "no optimizer step was seen" in str(caught[0].message)


def test_an_optimizer_that_is_seen_no_more_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SILENT_BACKWARDS", 20)
    model = compiled_linear()
    train(model, 1)
    for _ in range(20):
        model(X[:1]).sum().backward()
    model(X)
    an_average(model.weight)
    with pytest.warns(UserWarning, match="no optimizer step was seen"):
        output = model(X)
    torch.testing.assert_close(output.detach(), by_hand(model))


MODES: dict[str, Callable[[nn.Linear], object]] = {
    "at rest": lambda model: model(X),
    "trained": train,
    "frozen": nmcompile.freeze,
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {"tensors": lambda x: x, "parameters": nn.Parameter}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("state", MODES)
def test_other_weights_have_masks_of_their_own(state: str, grad: bool, kind: str) -> None:
    model = compiled_linear(refresh=None)
    MODES[state](model)
    own, before = model(X).detach(), masks_of(model)["weight"].tensor.clone()
    MODES[state](model)
    own = model(X).detach() if state == "trained" else own
    other = {name: KINDS[kind](torch.randn_like(value)) for name, value in model.named_parameters()}
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            found = functional_call(model, other, (X,))
            expected = nn.functional.linear(X, masked_by_hand(other["weight"]), other["bias"])
            torch.testing.assert_close(found, expected)
            an_average(other["weight"])
    assert torch.equal(masks_of(model)["weight"].tensor, before)
    torch.testing.assert_close(model(X).detach(), own)


@pytest.mark.parametrize("read", [lambda p: p, lambda p: p.detach()])
def test_its_own_weights_have_its_own_mask(read: Callable[[Tensor], Tensor]) -> None:
    model = compiled_linear(refresh=None)
    train(model, 20)
    own = {name: read(value) for name, value in model.named_parameters()}
    assert torch.equal(functional_call(model, own, (X,)), model(X))
    expected = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    found = torch.func.grad(lambda p: functional_call(model, p, (X,)).sum())(own)
    torch.testing.assert_close(tuple(found.values()), expected)


def test_a_parameter_that_is_assigned_has_a_new_mask_once() -> None:
    model = compiled_linear()
    train(model)
    model.weight = nn.Parameter(torch.randn(64, 64))
    torch.testing.assert_close(model(X).detach(), by_hand(model))
    assert torch.equal(masks_of(model)["weight"].tensor, masked_by_hand(model.weight) != 0)
