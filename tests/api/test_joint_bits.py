"""Masks and 4-bit grids found together: the step stands, and every way out of the compiler holds the same values."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig
from nmcompile.errors import PassError, StateError
from nmcompile.three_gemm.effective_weight import effective_weight
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.triple import GemmTriple


def model(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(25 * width, 8),
    ).eval()


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, 5, 5, generator=generator).cumsum(-1) for _ in range(2)]


def compiled(masks: str = "sparsegpt", source: nn.Module | None = None, **options: Any) -> Any:
    config = CompileConfig(masks=masks, ends="sparse", **options)
    source = model() if source is None else source
    return nmcompile.compile(source, "inference", args=(data()[0],), calibration=data(), config=config).eval()


def layers(found: nn.Module) -> dict[str, GemmTriple]:
    return {triple.layer.name: triple for triple in triples_of(found)}


def step_of(triple: GemmTriple) -> Tensor:
    """Return the step that stands."""
    assert triple.steps.weight is not None
    return triple.steps.weight


def integers_of(triple: GemmTriple, weight: Tensor) -> Tensor:
    step = triple.steps.of_weight(weight)
    assert step is not None
    return weight / step


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("masks", "refit"), [("sparsegpt", False), ("sparsegpt", True), ("admm", False)])
def test_weights_are_solved_onto_sawb_grid_of_the_dense_weights(masks: str, refit: bool, granularity: str) -> None:
    found = compiled(masks, refit=refit, granularity=granularity)
    dense = compiled("magnitude", granularity=granularity)
    for name, triple in layers(found).items():
        weight = found.get_parameter(f"{name}.weight").detach()
        levels = integers_of(triple, weight)
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
        assert 1 < levels.abs().max() <= 7 + 1e-5
        of_dense = layers(dense)[name].steps.of_weight(dense.get_parameter(f"{name}.weight").detach())
        assert triple.steps.weight is not None and of_dense is not None
        assert triple.steps.weight.shape == of_dense.shape


def test_finalize_gives_exactly_the_solved_values() -> None:
    found = compiled()
    plain = nmcompile.finalize(found)
    for name in layers(found):
        assert torch.equal(plain.get_parameter(f"{name}.weight"), found.get_parameter(f"{name}.weight"))
    assert nmcompile.verify(plain).ok and nmcompile.verify(found).ok


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_file_holds_the_solved_values_and_runs_like_the_model(tmp_path: Path, granularity: str) -> None:
    import onnx
    from onnx import numpy_helper

    found = compiled(granularity=granularity)
    path = tmp_path / "model.onnx"
    nmcompile.export(found, path, args=(data()[0],))  # compared with ONNX Runtime
    assert nmcompile.verify(path).ok
    stored = {numpy_helper.to_array(one).tobytes() for one in onnx.load(path).graph.initializer}
    triple, weight = layers(found)["3"], found.get_parameter("3.weight").detach()
    assert integers_of(triple, weight).round().to(torch.int8).numpy().tobytes() in stored


def test_the_step_goes_with_copies_and_another_compilation() -> None:
    found = compiled()
    again = nmcompile.compile(copy.deepcopy(found), "inference", args=(data()[0],), config=CompileConfig(ends="sparse"))
    x = data()[0]
    assert torch.equal(again.eval()(x), found(x))
    for name, triple in layers(again).items():
        assert torch.equal(step_of(triple), step_of(layers(found)[name]))


def test_a_grid_of_other_bits_gets_a_step_of_its_own() -> None:
    found = compiled()
    wide = nmcompile.LayerConfig(weight=nmcompile.presets["inference"].weight, weight_bits=8)
    again = nmcompile.compile(found, "inference", config=CompileConfig(layers={"_default": wide}, ends="sparse"))
    assert all(triple.steps.weight is None for triple in layers(again).values())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_step_is_part_of_the_sparse_state(granularity: str) -> None:
    found, other = compiled(granularity=granularity), compiled("magnitude", granularity=granularity)
    state = nmcompile.sparse_state_dict(found)
    assert state["3.weight_step"].dtype == torch.float64 and not state["3.weight_step"].isnan().any()
    assert nmcompile.sparse_state_dict(other)["3.weight_step"].isnan().all()
    x = data()[0]
    before = other(x)
    other.load_state_dict(found.state_dict())
    nmcompile.load_sparse_state_dict(other, state)
    assert torch.equal(other(x), found(x)) and not torch.equal(other(x), before)
    fresh = compiled("magnitude", granularity=granularity)
    found.load_state_dict(fresh.state_dict())
    nmcompile.load_sparse_state_dict(found, nmcompile.sparse_state_dict(fresh))
    assert torch.equal(found(x), fresh(x))


@pytest.mark.parametrize("value", [-1.0, 0.0, torch.inf])
def test_a_step_that_is_none_is_refused(value: float) -> None:
    found = compiled()
    state = nmcompile.sparse_state_dict(found)
    with pytest.raises(StateError, match=r"'3\.weight_step' of the sparse state .*positive steps"):
        nmcompile.load_sparse_state_dict(found, state | {"3.weight_step": torch.full((16,), value).double()})


def test_a_checkpoint_brings_the_step_back(tmp_path: Path) -> None:
    first = compiled()
    options: dict[str, Any] = {"args": (data()[0],), "calibration": data(), "checkpoint": tmp_path}
    config = CompileConfig(masks="sparsegpt", ends="sparse")
    for _ in range(2):  # the second call reads everything
        found = nmcompile.compile(model(), "inference", config=config, **options).eval()
        assert torch.equal(found(data()[0]), first(data()[0]))
        assert torch.equal(step_of(layers(found)["3"]), step_of(layers(first)["3"]))


def test_training_keeps_mask_and_step() -> None:
    found = compiled().train()
    steps = {
        name: triple.steps.weight.clone() for name, triple in layers(found).items() if triple.steps.weight is not None
    }
    optimizer = torch.optim.SGD(found.parameters(), 0.01)
    for x in data():
        optimizer.zero_grad()
        found(x).square().mean().backward()
        optimizer.step()
    found.eval()(data()[0])
    assert len(steps) == 3
    for name, triple in layers(found).items():
        assert torch.equal(step_of(triple), steps[name])
    assert nmcompile.verify(nmcompile.finalize(found)).ok


def test_a_weight_that_keeps_its_values_has_sawb_step() -> None:
    assert all(triple.steps.weight is None for triple in layers(compiled("wanda")).values())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x).relu())
        return result


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [(8, 4), (4, 8), (8, None), (4, 4)])
def test_a_step_stands_only_where_the_grid_holds_the_values(bits: tuple[int, int | None], granularity: Any) -> None:
    """The first layer that is called rounds a weight of both; a step of 8 bits would clip all of the weight to 4."""
    preset = nmcompile.presets["inference"].weight
    rules = {name: nmcompile.LayerConfig(weight=preset, weight_bits=b) for name, b in zip("ab", bits, strict=True)}
    config = CompileConfig(masks="sparsegpt", layers=rules, granularity=granularity)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    found = nmcompile.compile(Tied(), "inference", args=(x,), config=config, calibration=[x]).eval()
    steps = {name: triple.steps for name, triple in layers(found).items()}
    assert steps["a"].weight is not None
    assert (steps["b"].weight is not None) == (bits in [(4, 8), (4, 4)])
    weight = found.get_parameter("a.weight").detach()
    for one in steps.values():
        step = one.of_weight(weight)
        if step is not None and one.weight_grid is not None and one.weight is not None:
            integers = weight / step
            assert torch.allclose(integers, integers.round(), atol=1e-4)
            assert integers.round().abs().max() <= one.weight_grid.high


def test_packed_projections_have_a_step_each_or_one_a_row() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x.flip(-1), x.sin(), need_weights=False)[0]
            return y

    torch.manual_seed(0)
    source, batches = Attention().eval(), [torch.randn(4, 5, 16) for _ in range(2)]
    for granularity, count in (("tensor", 3), ("channel", 48)):
        config = CompileConfig(masks="sparsegpt", ends="sparse", granularity=granularity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = nmcompile.compile(source, "inference", calibration=batches, config=config).eval()
        triple = next(one for one in triples_of(found) if one.site.weight.endswith("in_proj_weight"))
        assert triple.steps.weight is not None and len(triple.steps.weight.unique()) == count
        weight = found.attention.in_proj_weight.detach()
        torch.testing.assert_close(integers_of(triple, weight), integers_of(triple, weight).round(), rtol=0, atol=1e-5)
        assert torch.equal(nmcompile.finalize(found).get_parameter("attention.in_proj_weight"), weight)


def inference_of(source: nn.Module, **options: Any) -> Any:
    return nmcompile.compile(
        source, "inference", args=(data()[0],), config=CompileConfig(ends="sparse"), **options
    ).eval()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("mode", ["weights", "training"])
def test_the_step_outlasts_modes_that_do_not_quantize(mode: str, granularity: str) -> None:
    found = compiled(granularity=granularity)
    steps = {name: step_of(triple) for name, triple in layers(found).items()}
    between = nmcompile.compile(found, mode, args=(data()[0],), config=CompileConfig(ends="sparse"))
    assert all(triple.steps.weight_grid is None for triple in layers(between).values())
    again = inference_of(between, calibration=data())
    for name in layers(found):
        assert torch.equal(step_of(layers(again)[name]), steps[name])
        assert torch.equal(effective(again, name), effective(found, name))


def effective(found: nn.Module, name: str) -> Tensor:
    weight = effective_weight(found, layers(found)[name])
    assert weight is not None
    return weight


@pytest.mark.parametrize("masks", ["magnitude", "sparsegpt"])
def test_a_finalized_model_is_on_its_grid_again(masks: str) -> None:
    found = compiled(masks)
    plain = nmcompile.finalize(found)
    again = inference_of(copy.deepcopy(plain), calibration=data())
    for name in layers(found):
        assert torch.equal(effective(again, name), effective(found, name))
    with torch.no_grad():
        plain.get_parameter("3.weight").mul_(torch.linspace(0.5, 1.5, 16).view(-1, 1, 1, 1))
    trained = inference_of(plain, calibration=data())
    assert layers(trained)["3"].steps.weight is None  # its values are on no such grid any more
    assert layers(trained)["0"].steps.weight is not None


def test_a_state_without_steps_is_loaded_with_a_warning() -> None:
    found, other = compiled("magnitude"), compiled()
    old = {key: value for key, value in nmcompile.sparse_state_dict(found).items() if not key.endswith("weight_step")}
    other.load_state_dict(found.state_dict())
    with pytest.warns(UserWarning, match="saved before steps of 4-bit weights were a part of it"):
        nmcompile.load_sparse_state_dict(other, old)
    assert torch.equal(other(data()[0]), found(data()[0]))
    del old["3.weight.mask"]
    with pytest.warns(UserWarning, match="saved before"), pytest.raises(StateError, match=r"lacks '3\.weight\.mask'"):
        nmcompile.load_sparse_state_dict(other, old)
    partly = nmcompile.sparse_state_dict(found)
    del partly["3.weight_step"]
    with pytest.raises(StateError, match=r"lacks '3\.weight_step'"):
        nmcompile.load_sparse_state_dict(other, partly)


@pytest.mark.parametrize("bits", [None, 8])
def test_layers_that_share_a_weight_with_other_bits_are_named(bits: int | None, tmp_path: Path) -> None:
    x, preset = torch.randn(64, 32), nmcompile.presets["inference"].weight
    rules = {name: nmcompile.LayerConfig(weight=preset, weight_bits=b) for name, b in (("a", 4), ("b", bits))}
    options: dict[str, Any] = {"args": (x,), "calibration": [x]}
    found = nmcompile.compile(Tied(), "inference", config=CompileConfig(layers=rules), **options).eval()
    message = "layers 'a' and 'b' share the weight 'a.weight', .*give them the same weight_bits"
    with pytest.raises(PassError, match=message):
        nmcompile.finalize(found)
    with pytest.raises(PassError, match=message):
        nmcompile.export(found, tmp_path / "model.onnx", args=(x,))
    joint = nmcompile.compile(Tied(), "inference", config=CompileConfig(layers=rules, masks="sparsegpt"), **options)
    if bits is None:  # its values are on the grid of the other layer, so both read the same
        nmcompile.export(joint.eval(), tmp_path / "model.onnx", args=(x,))


def test_a_finalized_model_that_lost_a_layer_compiles() -> None:
    layer = LayerConfig(weight_bits=4)
    config = CompileConfig(layers={"0": layer}, ends="sparse")
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    final = nmcompile.finalize(nmcompile.compile(model, "weights", config=replace(config, layers={"_default": layer})))
    assert isinstance(final, nn.Sequential)
    del final[1]
    x = torch.randn(4, 16)
    assert torch.equal(nmcompile.compile(final, "weights", config=config)(x), final(x))
