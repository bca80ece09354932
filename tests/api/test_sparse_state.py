"""Saved and resumed training equals uninterrupted training, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.errors import StateError

STEPS = 10
CONFIG = CompileConfig(refresh=4, ends="sparse")

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01),
    "fused adam": lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=True),
}
Store = tuple[Callable[[dict[str, Tensor], Path], None], Callable[[Path], dict[str, Tensor]]]
STORES: dict[str, Store] = {
    "safetensors": (save_file, load_file),
    "torch": (torch.save, lambda path: torch.load(path, weights_only=True)),
}


def fresh(seed: int = 0, mode: str = "training", config: CompileConfig = CONFIG) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    return nmcompile.compile(model, mode, config=config)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, bound: float | None = None
) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 5, 5, generator=generator)
        y = torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if bound is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-bound, bound)


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask for name, mask in nmcompile.sparse_state_dict(model).items() if name.endswith(".mask")}


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    states = [model.state_dict() | nmcompile.sparse_state_dict(model) for model in (first, second)]
    assert list(states[0]) == list(states[1])
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("kind", "stop"), [("momentum", 3), ("adam", 4), ("fused adam", 6)])
def test_resumed_equals_uninterrupted(stop: int, kind: str, store: str, tmp_path: Path) -> None:
    """Stopped just before a refresh of the masks, right at one, and between two; resumed in a model of another seed."""
    whole = fresh()
    train(whole, OPTIMIZERS[kind](whole), 0, STEPS)

    first = fresh()
    optimizer = OPTIMIZERS[kind](first)
    train(first, optimizer, 0, stop)
    save, load = STORES[store]
    save(first.state_dict(), tmp_path / "model")
    save(nmcompile.sparse_state_dict(first), tmp_path / "sparse")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")

    second = fresh(seed=1)
    optimizer = OPTIMIZERS[kind](second)
    second.load_state_dict(load(tmp_path / "model"))
    nmcompile.load_sparse_state_dict(second, load(tmp_path / "sparse"))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    train(second, optimizer, stop, STEPS)
    assert_equal_states(whole, second)


def test_resumed_equals_uninterrupted_where_weights_are_clamped_after_each_step() -> None:
    """Each clamp makes the masks stale, also the one right before saving, which no forward has seen yet."""
    whole, first, second = fresh(), fresh(), fresh(seed=1)
    train(whole, OPTIMIZERS["momentum"](whole), 0, STEPS, bound=0.1)
    optimizer = OPTIMIZERS["momentum"](first)
    train(first, optimizer, 0, 5, bound=0.1)
    second.load_state_dict(first.state_dict())
    nmcompile.load_sparse_state_dict(second, nmcompile.sparse_state_dict(first))
    resumed = OPTIMIZERS["momentum"](second)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, 5, STEPS, bound=0.1)
    assert_equal_states(whole, second)


RESUMED = "'s state, but no sparse state"


def test_without_the_sparse_state_training_goes_another_way_and_says_so() -> None:
    """So the test above would notice a lost state."""
    whole, first, second = fresh(), fresh(), fresh(seed=1)
    train(whole, OPTIMIZERS["momentum"](whole), 0, STEPS)
    optimizer = OPTIMIZERS["momentum"](first)
    train(first, optimizer, 0, 6)
    second.load_state_dict(first.state_dict())
    resumed = OPTIMIZERS["momentum"](second)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match=RESUMED) as warned:
        train(second, resumed, 6, STEPS)
    assert len(warned) == 1
    assert not torch.equal(whole.state_dict()["0.weight"], second.state_dict()["0.weight"])


class Checkpoint(NamedTuple):
    """The state dicts of a model and its optimizer, with the part of the model's that a file preserves."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]


def checkpoint(steps: int, mode: str, store: str, folder: Path) -> Checkpoint:
    model = fresh(mode=mode)
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 0, steps)
    save, load = STORES[store]
    save(model.state_dict(), folder / "model")
    return Checkpoint(load(folder / "model"), optimizer.state_dict())


@pytest.mark.parametrize("store", STORES)
def test_a_lost_sparse_state_is_noticed_in_a_new_process(store: str, tmp_path: Path) -> None:
    saved, model = checkpoint(5, "training", store, tmp_path), fresh(seed=1)
    model.load_state_dict(saved.model)
    optimizer = OPTIMIZERS["adam"](model)
    optimizer.load_state_dict(saved.optimizer)
    with pytest.warns(UserWarning, match=RESUMED):
        train(model, optimizer, 5, 6)


QUIET: dict[str, tuple[int, str, bool, bool]] = {
    "weights alone, to be trained anew": (5, "training", False, False),
    "with the sparse state": (5, "training", True, True),
    "of dense training": (5, "dense", True, False),
    "before the first step": (0, "training", True, False),
}


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_said_where_no_state_is_lost(case: str, tmp_path: Path) -> None:
    steps, mode, resumes, is_whole = QUIET[case]
    saved, model = checkpoint(steps, mode, "torch", tmp_path), fresh(seed=1)
    model.load_state_dict(saved.model)
    optimizer = OPTIMIZERS["adam"](model)
    if resumes:
        optimizer.load_state_dict(saved.optimizer)
    if is_whole:
        nmcompile.load_sparse_state_dict(model, nmcompile.sparse_state_dict(model))
    train(model, optimizer, steps, steps + 2)
    model.load_state_dict(model.state_dict())  # in the middle of a run: its masks are the earlier ones, or newer
    train(model, optimizer, steps + 2, steps + 4)


@pytest.mark.parametrize(("refresh", "frozen"), [(None, True), (STEPS + 1, True), (1, False)])
def test_masks_are_frozen_until_they_are_refreshed(refresh: int | None, frozen: bool) -> None:
    model = fresh(config=CompileConfig(refresh=refresh, ends="sparse"))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    train(model, optimizer, 0, 1)
    first = masks(model)
    train(model, optimizer, 1, STEPS)
    assert all(torch.equal(mask, first[name]) for name, mask in masks(model).items()) == frozen


def test_restored_masks_win_over_the_loaded_weights() -> None:
    model, other = fresh(config=CompileConfig(refresh=None, ends="sparse")), fresh(seed=1)
    train(model, torch.optim.SGD(model.parameters(), 1.0), 0, STEPS)
    other.load_state_dict(model.state_dict())
    nmcompile.load_sparse_state_dict(other, nmcompile.sparse_state_dict(model))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(other).items())


def test_the_state_is_a_snapshot() -> None:
    model = fresh()
    train(model, OPTIMIZERS["adam"](model), 0, 1)
    state = nmcompile.sparse_state_dict(model)
    kept = {name: value.clone() for name, value in state.items()}
    train(model, OPTIMIZERS["adam"](model), 1, STEPS)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())


Edit = Callable[[dict[Any, Any]], object]


def entry(name: str, value: Any) -> Edit:
    return lambda state: state.update({name: value})


def counters(*values: int) -> Tensor:
    return torch.tensor(values)


MASK, EXACT = torch.ones(8, 4, 3, 3) > 0, torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1).expand(8, 4, 3, 3)
MISFITS: dict[str, tuple[Edit, str]] = {
    "missing mask": (lambda state: state.pop("0.weight.mask"), "lacks '0.weight.mask'"),
    "stranger": (lambda state: state.update({"5.weight.mask": torch.ones(1)}), "nothing for '5.weight.mask'"),
    "shape": (entry("0.weight.mask", torch.ones(2, 2) > 0), r"\(2, 2\).*\(8, 4, 3, 3\)"),
    "no format": (lambda state: state.pop("format"), "format none"),
    "newer format": (entry("format", torch.tensor(99)), "99"),
    "format 0": (entry("format", torch.tensor(0)), "format 0"),
    "format text": (entry("format", "1"), "'format' of the sparse state is of type str"),
    "format float": (entry("format", torch.tensor(1.0)), "'format'.*float32; the model's is torch.int64"),
    "two formats": (entry("format", counters(1, 1)), r"'format'.*shape \(2,\)"),
    "key": (entry(3, torch.tensor(1)), "type int"),  # type: ignore[arg-type]
    "list for a mask": (entry("0.weight.mask", [True]), "'0.weight.mask'.*type list"),
    "None for a mask": (entry("0.weight.mask", None), "'0.weight.mask'.*type NoneType"),
    "float mask": (entry("0.weight.mask", EXACT.float()), "'0.weight.mask'.*float32; the model's is torch.bool"),
    "meta mask": (entry("0.weight.mask", MASK.to("meta")), "'0.weight.mask'.*meta"),
    "sparse mask": (entry("0.weight.mask", MASK.to_sparse()), "'0.weight.mask'.*torch.sparse_coo"),
    "full mask": (entry("0.weight.mask", MASK), "'0.weight.mask'.*not 2:4 along in"),
    "negative steps": (entry("0.weight.clock", counters(-1, 0)), r"'0.weight.clock'.*\[-1, 0\]"),
    "endless steps": (entry("0.weight.clock", counters(2**63 - 1, 0)), "'0.weight.clock'.*number of steps"),
    "stale flag": (entry("0.weight.clock", counters(1, 3)), "'0.weight.clock'.*0, 1 or 2"),
    "float clock": (entry("0.weight.clock", torch.tensor([torch.nan, 0.0])), "'0.weight.clock'.*float32"),
    "long clock": (entry("0.weight.clock", counters(1, 0, 0)), r"'0.weight.clock'.*\(3,\)"),
    "negative draw": (entry("0.draw", torch.tensor(-5)), "'0.draw' of the sparse state is -5"),
    "endless draw": (entry("0.draw", torch.tensor(2**62)), "'0.draw'.*number of backward calls"),
    "float draw": (entry("0.draw", torch.tensor(1.5)), "'0.draw'.*float32"),
    "number for a draw": (entry("0.draw", 1), "'0.draw'.*type int"),
    "meta draw": (entry("0.draw", torch.tensor(1, device="meta")), "'0.draw'.*meta"),
    "float seed": (entry("seed", torch.tensor(1.0)), "'seed'.*float32"),
    "meta seed": (entry("seed", torch.tensor(1, device="meta")), "'seed'.*meta"),
    "last mask": (entry("4.weight.mask", torch.ones(4, 72)), "'4.weight.mask'.*float32"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_does_not_fit_is_refused_whole(case: str) -> None:
    edit, message = MISFITS[case]
    model, other = fresh(), fresh(seed=1)
    train(other, OPTIMIZERS["adam"](other), 0, 5)
    state, before = nmcompile.sparse_state_dict(other), nmcompile.sparse_state_dict(model)
    edit(state)
    with pytest.raises(StateError, match=message):
        nmcompile.load_sparse_state_dict(model, state)
    assert_same_state(model, before)


@pytest.mark.parametrize("state", [None, [], 3, "state", torch.zeros(3)])
def test_what_is_not_a_state_is_refused(state: Any) -> None:
    model = fresh()
    before = nmcompile.sparse_state_dict(model)
    with pytest.raises(StateError, match="give what sparse_state_dict returned"):
        nmcompile.load_sparse_state_dict(model, state)
    assert_same_state(model, before)


CLIPS: dict[str, tuple[Any, str]] = {
    "infinite": (torch.tensor(torch.inf), "infinite"),
    "integer": (torch.tensor(1), "int64"),
    "double": (torch.tensor(1.0, dtype=torch.float64), "float64"),
    "several": (torch.ones(2), r"\(2,\)"),
    "number": (1.0, "type float"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clips_that_are_none_are_refused_whole(case: str) -> None:
    value, message = CLIPS[case]
    models = [fresh(mode="inference") for _ in range(2)]
    for number, model in enumerate(models, start=1):
        nmcompile.calibrate(model, [number * torch.randn(8, 4, 5, 5).abs()])
    states = [nmcompile.sparse_state_dict(model) for model in models]
    name = next(name for name in reversed(states[0]) if name.endswith("clip"))
    with pytest.raises(StateError, match=f"'{name}' of the sparse state .*{message}"):
        nmcompile.load_sparse_state_dict(models[0], states[1] | {name: value})
    assert_same_state(models[0], states[0])
    nmcompile.load_sparse_state_dict(models[0], states[1])
    assert_same_state(models[0], states[1])


def paying(monkeypatch: pytest.MonkeyPatch, dense: str) -> nn.Module:
    """Return a model that was measured to gain nothing in one of its layers."""
    found = {name: {Phase.FORWARD: "slow"} if name == dense else {} for name in ("0", "2")}
    monkeypatch.setattr("nmcompile.api.compile.find_dense_phases", lambda *_: found)
    monkeypatch.setattr("nmcompile.api.whole_step.step_times", lambda *_: (1.0, 1.0))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = CompileConfig(ends="sparse", where="pays")
    return nmcompile.compile(model, "weights", args=(torch.randn(2, 8),), config=config)


@pytest.mark.parametrize("case", ["0.weight.mask", "0.draw", "seed", "0.dense_phases"])
def test_a_state_that_replans_is_refused_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `where="pays"` the layers themselves are replaced, after everything is checked."""
    model, other = (paying(monkeypatch, dense) for dense in ("0", "2"))
    before, state, graphs = nmcompile.sparse_state_dict(model), nmcompile.sparse_state_dict(other), str(model)
    with pytest.raises(StateError, match=f"'{case}'"):
        nmcompile.load_sparse_state_dict(model, state | {case: torch.ones(1, 2)})
    assert_same_state(model, before)
    assert str(model) == graphs
    nmcompile.load_sparse_state_dict(model, state)
    assert_same_state(model, state)


def test_a_model_without_storage_takes_no_state() -> None:
    state = nmcompile.sparse_state_dict(fresh())
    plain = nmcompile.decompile(fresh()).to("meta")
    with pytest.raises(StateError, match="meta device; load the sparse state once it has storage"):
        nmcompile.load_sparse_state_dict(nmcompile.compile(plain, config=CONFIG), state)


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = nmcompile.sparse_state_dict(model)
    assert list(after) == list(before)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_a_state_of_another_mode_is_refused() -> None:
    with pytest.raises(StateError, match="compile with the mode it was saved in"):
        nmcompile.load_sparse_state_dict(fresh(), nmcompile.sparse_state_dict(fresh(mode="gradients")))


class Tied(nn.Module):
    """A model whose decoder weight is computed from the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t())


def test_a_weight_and_one_computed_from_it_have_masks_of_their_own() -> None:
    config = CompileConfig(ends="sparse", refresh=None)
    model = nmcompile.compile(Tied(), "weights", config=config)
    x = torch.randn(4, 8)
    model(x)
    assert list(masks(model)) == ["linear.mask", "encoder.weight.mask"]
    again = nmcompile.compile(model, "weights", config=config)
    torch.testing.assert_close(again(x), model(x))
    other = nmcompile.compile(Tied(), "weights", config=config)
    other.load_state_dict(model.state_dict())
    nmcompile.load_sparse_state_dict(other, nmcompile.sparse_state_dict(model))
    torch.testing.assert_close(other(x), model(x))


def test_row_wise_masks_are_refused_where_transposable_ones_are_due() -> None:
    row_wise, model = fresh(seed=1, mode="weights"), fresh(mode="t-weights")
    train(row_wise, OPTIMIZERS["momentum"](row_wise), 0, 1)
    before = nmcompile.sparse_state_dict(model)
    with pytest.raises(StateError, match=r"'0.weight.mask'.* not 2:4 along out in \d+ of .*transposable.*mode"):
        nmcompile.load_sparse_state_dict(model, nmcompile.sparse_state_dict(row_wise))
    after = nmcompile.sparse_state_dict(model)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_compiled_model_without_rewritten_layers_has_a_state() -> None:
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 4)), config=CompileConfig(layers={"0": None}))
    state = nmcompile.sparse_state_dict(model)
    assert set(state) == {"format", "seed"}
    nmcompile.load_sparse_state_dict(model, state)


def test_two_compiled_models_in_one_have_no_common_state() -> None:
    """Their layers have the same names, so one state would overwrite the other."""
    with pytest.raises(StateError, match="several compiled models"):
        nmcompile.sparse_state_dict(nn.ModuleList([fresh(), fresh(seed=1)]))
    assert len(nmcompile.sparse_state_dict(nn.ModuleList([fresh()]))) > 2


def test_the_state_of_a_channels_last_model_can_be_written(tmp_path: Path) -> None:
    model = fresh().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, OPTIMIZERS["adam"](model), 0, 1)
    save_file(nmcompile.sparse_state_dict(model), tmp_path / "sparse")
    assert all(
        torch.equal(value, masks(model)[name])
        for name, value in load_file(tmp_path / "sparse").items()
        if "mask" in name
    )
