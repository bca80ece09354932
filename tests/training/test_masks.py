"""Masks follow optimizer steps, and otherwise only writes that no step explains."""

import copy
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training import step as tell_step
from nmcompile.training.find_masks import masks_of

REFRESH = 3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
LOOPS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def compiled_linear(refresh: int | None = REFRESH, mode: str = "t-weights") -> nn.Linear:
    torch.manual_seed(1)
    model = nmcompile.compile(nn.Linear(8, 8), mode, config=CompileConfig(refresh=refresh, ends="sparse"))
    assert isinstance(model, nn.Linear)
    return model


def mask_of(model: nn.Module) -> Tensor:
    (mask,) = masks_of(model).values()
    return mask.tensor.clone()


def valid_tiles() -> Iterator[Tensor]:
    """Return all 4x4 masks with two in every row and column."""
    rows = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    for choice in itertools.product(rows, repeat=4):
        tile = torch.tensor(choice)
        if (tile.sum(0) == 2).all():
            yield tile


def best_mask(weight: Tensor) -> Tensor:
    """Find the transposable 2:4 mask of a matrix by enumeration."""
    tiles = torch.stack(list(valid_tiles()))
    blocks = weight.abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
    scores = torch.einsum("abij,tij->abt", blocks, tiles.to(weight.dtype))
    return tiles[scores.argmax(-1)].transpose(1, 2).flatten(2, 3).flatten(0, 1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """Return the mask that each step's forward used."""
    used = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        used.append(mask_of(model))
        optimizer.step()
    return used


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_are_computed_anew_every_few_steps(name: str, loop: str) -> None:
    model = compiled_linear()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1, **LOOPS[loop])
    weights, used = [], []
    for _ in range(2 * REFRESH + 1):
        weights.append(model.weight.detach().clone())
        used += train(model, optimizer, 1)
    for index, mask in enumerate(used):
        assert torch.equal(mask, best_mask(weights[index - index % REFRESH]))
    assert not torch.equal(used[0], used[REFRESH])


def test_frozen_masks_stay() -> None:
    model = compiled_linear(refresh=None)
    used = train(model, torch.optim.SGD(model.parameters(), 0.5), 50)
    assert all(torch.equal(mask, used[0]) for mask in used)
    assert not torch.equal(used[0], best_mask(model.weight.detach()))


def test_an_optimizer_that_does_not_hold_the_weight_is_no_clock() -> None:
    model, other = compiled_linear(refresh=1), nn.Linear(2, 2)
    model(X)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert next(iter(masks_of(model).values())).steps == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_counts_once(reentrant: bool) -> None:
    model = compiled_linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(REFRESH - 1):
        optimizer.zero_grad()
        x = X.clone().requires_grad_()
        y = checkpoint(model, checkpoint(model, x, use_reentrant=reentrant), use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        optimizer.step()
    (mask,) = masks_of(model).values()
    assert mask.steps == REFRESH - 1
    assert torch.equal(mask.tensor, best_mask(compiled_linear().weight.detach()))


def load_other(model: nn.Linear) -> None:
    model.load_state_dict(nn.Linear(8, 8).state_dict())


def assign_other(model: nn.Linear) -> None:
    model.load_state_dict(nn.Linear(8, 8).state_dict(), assign=True)


def write_in_place(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 8))


def point_elsewhere(model: nn.Linear) -> None:
    """Set `weight.data`, which counts no version."""
    nn.utils.vector_to_parameters(torch.randn(72), model.parameters())


def write_after_an_assignment(model: nn.Linear) -> None:
    assign_other(model)
    model(X)
    write_in_place(model)


def write_after_a_move(model: nn.Linear) -> None:
    model.double().float()
    write_in_place(model)


def write_before_a_move(model: nn.Linear) -> None:
    write_in_place(model)
    model.double().float()


def write_before_a_step(model: nn.Linear) -> None:
    write_in_place(model)
    torch.optim.SGD(model.parameters(), 0.1).step()


WRITES = [
    load_other, assign_other, write_in_place, point_elsewhere,
    write_after_an_assignment, write_after_a_move, write_before_a_move, write_before_a_step,
]  # fmt: skip


@pytest.mark.parametrize("change", WRITES)
@pytest.mark.parametrize("refresh", [REFRESH, None])
def test_other_writes_renew_the_mask(change: Callable[[nn.Linear], None], refresh: int | None) -> None:
    model = compiled_linear(refresh)
    model(X)
    change(model)
    model(X)
    assert torch.equal(mask_of(model), best_mask(model.weight.detach()))


@pytest.mark.parametrize("change", WRITES)
def test_a_copy_renews_the_mask_of_a_weight_written_before(change: Callable[[nn.Linear], None]) -> None:
    model = compiled_linear(refresh=None)
    model(X)
    change(model)
    replica = copy.deepcopy(model)
    replica(X)
    assert torch.equal(mask_of(replica), best_mask(model.weight.detach()))


@pytest.mark.parametrize("change", WRITES)
def test_a_copy_renews_the_mask_of_its_own_weight(change: Callable[[nn.Linear], None]) -> None:
    model = compiled_linear(refresh=None)
    model(X)
    before, replica = mask_of(model), copy.deepcopy(model)
    change(replica)
    replica(X)
    model(X)
    assert torch.equal(mask_of(replica), best_mask(replica.weight.detach())) and torch.equal(mask_of(model), before)


def test_a_frozen_mask_moves_with_its_module() -> None:
    """A move is not a write, though it puts the weight elsewhere."""
    model = compiled_linear(refresh=None)
    train(model, torch.optim.SGD(model.parameters(), 0.5), 50)
    before = mask_of(model)
    moved = copy.deepcopy(model).double()
    moved(X.double())
    model.double().float()(X)
    assert torch.equal(mask_of(model), before) and torch.equal(mask_of(moved), before)
    assert not torch.equal(before, best_mask(model.weight.detach()))


def test_a_weight_made_in_inference_mode_has_a_mask() -> None:
    with torch.inference_mode():
        model = compiled_linear()
        model(X)
        assert torch.equal(mask_of(model), best_mask(model.weight))


def test_copies_have_masks_of_their_own() -> None:
    model = compiled_linear(refresh=1)
    model(X)
    before, replica = mask_of(model), copy.deepcopy(model)
    train(replica, torch.optim.SGD(replica.parameters(), 0.5), 6)
    assert torch.equal(mask_of(model), before) and not torch.equal(mask_of(replica), before)


def plain_update(model: nn.Module) -> None:
    """Update without torch.optim's knowledge."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.5)
            parameter.grad = None


def test_other_optimizers_can_tell_their_steps() -> None:
    model, weights = compiled_linear(), []
    for index in range(2 * REFRESH):
        weights.append(model.weight.detach().clone())
        model(X).square().sum().backward()
        assert torch.equal(mask_of(model), best_mask(weights[index - index % REFRESH]))
        plain_update(model)
        tell_step(model)


def test_steps_that_nobody_told_of_are_noticed() -> None:
    model = compiled_linear()
    model(X).square().sum().backward()
    plain_update(model)
    with pytest.warns(UserWarning, match=r"weight.*no optimizer step was seen.*nmcompile\.training\.step"):
        model(X)
    assert torch.equal(mask_of(model), best_mask(compiled_linear_after_update()))


def compiled_linear_after_update() -> Tensor:
    """Return the weight after one plain update, computed with the masked weight alone."""
    model = compiled_linear()
    dense = model.weight.detach().clone()
    masked = (dense * best_mask(dense)).requires_grad_()
    torch.nn.functional.linear(X, masked, model.bias.detach()).square().sum().backward()
    assert masked.grad is not None
    return dense - 0.5 * masked.grad


def test_a_line_search_keeps_a_frozen_mask() -> None:
    """It calls its closure on weights that it has written itself."""
    model = compiled_linear(None)
    model(X)
    before = mask_of(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(X) - 1).square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        model(X)
    assert losses[1] < losses[0] and torch.equal(mask_of(model), before)


LOADED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.SGD(model.parameters(), 0.5)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(8, 8)).square().sum().backward()
    optimizer.step()
model(torch.ones(8, 8))
torch.save((model.weight.detach(), model.three_gemms[""].mask.tensor, model.three_gemms[""].mask.steps), sys.argv[1])
"""


def test_masks_go_on_in_a_process_that_only_loads_the_model(tmp_path: Path) -> None:
    torch.save(compiled_linear(refresh=1), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADED, tmp_path / "model.pt"], check=True, timeout=300)
    weight, mask, steps = torch.load(tmp_path / "model.pt", weights_only=True)
    assert steps == 3 and torch.equal(mask, best_mask(weight))


def test_another_dtype_leaves_a_mask_a_mask() -> None:
    model = compiled_linear()
    model(X)
    before = mask_of(model)
    model.type(torch.float64)
    model(X.double())
    assert mask_of(model).dtype == torch.bool and torch.equal(mask_of(model), before)


@pytest.mark.parametrize("loads", [True, False])
def test_torch_can_swap_what_it_loads_and_converts(loads: bool) -> None:
    """It refuses tensors that are weakly referenced."""
    model = nmcompile.compile(nn.Linear(8, 8), "inference", config=CompileConfig(ends="sparse"), calibration=[X]).eval()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            model(X)
            if loads:
                model.load_state_dict(nn.Linear(8, 8).state_dict())
            assert model.double()(X.double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
