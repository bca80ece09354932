"""A layer with a mask stays masked, whatever a later compilation learns about its place in the model."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Pruning
from nmcompile.report.layers import LayerReport

ROW_OF_EIGHT = LayerConfig(weight=Pruning("greedy", NMPattern(4, 8)))


class Loops(nn.Module):
    """Three layers after a loop that fx cannot trace: without args it is unknown which is first or last."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(width, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.dim()):
            x = x * 1.0
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, mode: str, x: Tensor, config: CompileConfig | None = None) -> nn.Module:
    """Compile without args and train for a step that changes the weights and keeps the masks."""
    sparse = nmcompile.compile(model, mode, config=config)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse(x).square().mean().backward()
    optimizer.step()
    return sparse


def statuses(model: nn.Module) -> dict[str, bool]:
    """Return for each layer whether its weight is pruned."""
    return {layer.name: layer.plan.find(nmcompile.Phase.FORWARD, "weight") is not None for layer in layers(model)}


def layers(model: nn.Module) -> list[LayerReport]:
    return list(nmcompile.inspect(model).layers)


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training"])
@pytest.mark.parametrize("again", [1, 2])
def test_deployed_with_args_equals_trained_without(mode: str, again: int, x: Tensor) -> None:
    model = trained(Loops(), mode, x)
    assert statuses(model) == {"a": True, "b": True, "c": True}
    deployed = model
    for _ in range(again):
        deployed = nmcompile.compile(deployed, mode, args=(x,))
    assert torch.equal(deployed(x), model(x))
    assert torch.equal(nmcompile.finalize(deployed)(x), model(x))
    assert not torch.equal(nmcompile.compile(nmcompile.decompile(model), mode, args=(x,))(x), model(x))


def test_the_report_says_why_an_end_is_pruned(x: Tensor) -> None:
    deployed = nmcompile.compile(trained(Loops(), "training", x), "training", args=(x,))
    report = nmcompile.inspect(deployed)
    assert report.layer("a").reasons[0].startswith("first layer, but an earlier compilation gave it a mask")
    assert report.layer("c").reasons[0].startswith("last linear, but an earlier compilation gave it a mask")
    assert not report.layer("b").reasons
    assert "first layer, but an" in str(report)


def test_an_end_keeps_what_it_had_and_gets_nothing_more(x: Tensor) -> None:
    """Trained in "t-weights", deployed in the modes that also prune or quantize other operands."""
    model = trained(Loops(), "t-weights", x)
    inference = nmcompile.compile(model, "inference", args=(x,), calibration=[x])
    operands = {layer.name: {row.operand for row in layer.plan.rows if row.operand} for layer in layers(inference)}
    assert operands == {"a": {"weight"}, "b": {"weight", "input"}, "c": {"weight"}}
    assert nmcompile.inspect(inference).layer("a").plan.grid_row("weight") is None
    training = nmcompile.compile(model, "training", args=(x,))
    assert {row.operand for row in nmcompile.inspect(training).layer("a").plan.rows} == {"weight", None}
    assert any("not pruned" in reason for reason in nmcompile.inspect(training).layer("a").reasons)


def test_quantized_ends_stay_quantized(x: Tensor) -> None:
    model = nmcompile.compile(Loops(), "inference", calibration=[x]).eval()
    deployed = nmcompile.compile(model, "inference", args=(x,), calibration=[x]).eval()
    grids = {layer.name: layer.plan.grid_row("weight") for layer in layers(deployed)}
    assert all(row is not None and row.grid is not None and row.grid.bits == 4 for row in grids.values())
    stored = CompileConfig(ends="int8")
    masked = nmcompile.compile(trained(Loops(), "weights", x), "inference", args=(x,), config=stored)
    row = nmcompile.inspect(masked).layer("a").plan.grid_row("weight")
    assert row is not None and str(row.grid) == "s8" and statuses(masked)["a"]


@pytest.mark.parametrize("mode", ["weights", "training"])
def test_the_config_wins_over_a_mask_and_says_so(mode: str, x: Tensor) -> None:
    model = trained(Loops(), mode, x)
    dropped = nmcompile.compile(model, mode, args=(x,), config=CompileConfig(layers={"a": None}))
    assert statuses(dropped) == {"a": False, "b": True, "c": True}
    (reason,) = nmcompile.inspect(dropped).layer("a").reasons
    assert reason == "left dense by CompileConfig.layers; the mask that an earlier compilation gave it is dropped"
    other = nmcompile.compile(model, mode, args=(x,), config=CompileConfig(layers={"a": ROW_OF_EIGHT}))
    row = nmcompile.inspect(other).layer("a").plan.find(nmcompile.Phase.FORWARD, "weight")
    assert row is not None and str(row.pattern) == "4:8"


def test_a_mask_that_does_not_fit_the_new_pattern_is_dropped_with_a_word(x: Tensor) -> None:
    narrow = CompileConfig(layers={"a": LayerConfig(weight=Pruning("greedy", NMPattern(1, 2)))})
    model = trained(Loops(6), "weights", x[:, :6], narrow)
    again = nmcompile.compile(model, "weights", args=(x[:, :6],))
    assert statuses(again) == {"a": False, "b": True, "c": True}
    reason = nmcompile.inspect(again).layer("a").reasons[0]
    assert reason == ("6 in-features are not a multiple of 4; the mask that an earlier compilation gave it is dropped")


def test_modes_without_weights_drop_masks_as_before(x: Tensor) -> None:
    model = nmcompile.compile(trained(Loops(), "training", x), "gradients", args=(x,))
    assert not any(statuses(model).values())
    assert not any("earlier compilation" in reason for layer in layers(model) for reason in layer.reasons)


def test_a_weight_that_was_tied_later_keeps_its_mask(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model = trained(Tied(), "weights", x, CompileConfig(ends="sparse"))
    model.get_submodule("embedding").weight = model.get_parameter("head.weight")
    again = nmcompile.compile(model, "weights", config=CompileConfig(ends="sparse"))
    assert torch.equal(again(x), model(x)) and statuses(again) == {"head": True}
    assert "its weight is tied to the embedding" in nmcompile.inspect(again).layer("head").reasons[0]


def test_a_finalized_model_carries_its_masks_while_its_weights_obey_them(x: Tensor) -> None:
    model = trained(Loops(), "training", x)
    final = nmcompile.finalize(model)
    again = nmcompile.compile(final, "training", args=(x,))
    assert statuses(again) == {"a": True, "b": True, "c": True}
    assert torch.equal(again(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(masks(again), masks(model), strict=True))
    with torch.no_grad():
        final.get_parameter("a.weight").fill_(1.0)
    assert statuses(nmcompile.compile(final, "training", args=(x,))) == {"a": False, "b": True, "c": True}


def masks(model: nn.Module) -> list[Tensor]:
    return [tensor for name, tensor in nmcompile.sparse_state_dict(model).items() if name.endswith(".mask")]


def test_where_pays_drops_no_mask_that_was_trained(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here: the same weights without their mask compute something else."""
    model = trained(Loops(), "training", x)

    def never(*_: object) -> dict[nmcompile.Phase, str]:
        return dict.fromkeys(nmcompile.Phase, "slow")

    monkeypatch.setattr("nmcompile.api.measure_phases.decide", never)
    pays = nmcompile.compile(model, "training", args=(x,), config=CompileConfig(where="pays"))
    assert torch.equal(pays(x), model(x))
    assert all(layer.plan.find(nmcompile.Phase.UPDATE, "grad_output") is None for layer in layers(pays))
    fresh = nmcompile.compile(Loops(), "training", args=(x,), config=CompileConfig(where="pays"))
    assert not any(statuses(fresh).values())


def test_analyze_says_what_compile_does(x: Tensor) -> None:
    model = trained(Loops(), "training", x)
    told = nmcompile.analyze(model, "training", args=(x,))
    done = nmcompile.inspect(nmcompile.compile(model, "training", args=(x,)))
    assert [layer.plan for layer in told.layers] == [layer.plan for layer in done.layers]


def test_a_saved_and_resumed_model_deploys_what_was_trained(x: Tensor) -> None:
    model = trained(Loops(), "training", x)
    resumed = nmcompile.compile(Loops(), "training")
    resumed.load_state_dict(model.state_dict())
    nmcompile.load_sparse_state_dict(resumed, nmcompile.sparse_state_dict(model))
    assert torch.equal(nmcompile.compile(resumed, "weights", args=(x,))(x), model(x))


def test_a_functional_layer_keeps_its_mask(x: Tensor) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    class Net(Loops):
        def __init__(self) -> None:
            super().__init__()
            self.a = Functional()  # type: ignore[assignment]

    model = trained(Net(), "training", x)
    assert torch.equal(nmcompile.compile(model, "training", args=(x,))(x), model(x))


def test_clip_with_its_two_projections_and_first_convolution() -> None:
    """Trained with masks everywhere, and deployed by the default rules."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = tower | {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=16)
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    example = {"input_ids": torch.randint(3, 30, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}
    model = nmcompile.compile(clip, "weights", config=CompileConfig(ends="sparse")).eval()
    with torch.no_grad():
        expected = model(**example)
        deployed = nmcompile.compile(model, "weights", kwargs=example).eval()
        assert torch.equal(deployed(**example).logits_per_image, expected.logits_per_image)
    assert statuses(deployed)["text_projection"] and statuses(deployed)["visual_projection"]
