"""Mode `"inference"`: 2:4 weights on SAWB's grid, 4:8 inputs where they are proven non-negative, 4-bit inputs."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Phase, Pruning, presets
from nmcompile.api import calibrate as calibration
from nmcompile.errors import CalibrationError, ConfigError, ExportError, StateError
from nmcompile.export.collect_layers import deployed_layers
from nmcompile.pruning import greedy, greedy_by_value
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training import clips
from nmcompile.training.find_masks import masks_of

FACTORS = calibration.FACTORS
NORM = ("running_mean", "running_var", "weight", "bias")
X = torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A model with a non-negative and a signed input; first and last layers stay in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3)
        self.unsigned = nn.Conv2d(8, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.signed = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.unsigned(torch.relu(self.stem(x))))
        return self.fc(self.signed(x).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def compiled(net: nn.Module, calibrate: bool = True, **options: object) -> nn.Module:
    config = CompileConfig(**options)  # type: ignore[arg-type]
    return nmcompile.compile(net, "inference", args=(X,), config=config, calibration=[X] if calibrate else None)


def clip_of(model: nn.Module, layer: str, operand: str = "input") -> float:
    (step,) = [getattr(t.steps, operand) for t in triples_of(model) if t.layer.name == layer]
    return float(step.clip)


def whole(bias: Tensor, step: Tensor | float) -> Tensor:
    """Round to whole steps."""
    return ((bias.double() / step).round() * step).float()


def sawb(w: Tensor, bits: int = 4) -> Tensor:
    """Compute the step from the formula, in float64: zero-aligned, the clip guarded."""
    c1, c2 = {4: (12.035, 12.03), 8: (31.76, 35.04)}[bits]
    wide = w.double()
    alpha = c1 * wide.square().mean().sqrt() - c2 * wide.abs().mean()
    if not wide.abs().mean() <= alpha <= wide.abs().max():
        alpha = wide.abs().max()
    return alpha / (2 ** (bits - 1) - 1)


def on_grid(x: Tensor, step: Tensor | float, low: int, high: int) -> Tensor:
    return ((x.double() / step).round().clamp(low, high) * step).float()


def reference(model: nn.Module, net: Net, x: Tensor, outputs: str) -> Tensor:
    """Run the quantized network layer by layer, from the definitions."""

    def weight(conv: nn.Conv2d) -> Tensor:
        dense = conv.weight.detach()
        return on_grid(greedy(dense, "2:4", dim=1), sawb(dense), -7, 7)

    y = torch.relu(F.conv2d(x, net.stem.weight, net.stem.bias))
    y = greedy_by_value(on_grid(y, clip_of(model, "unsigned") / 15, 0, 15), "4:8", dim=1)
    y = F.conv2d(y, weight(net.unsigned))
    mean, var, gamma, beta = (getattr(net.norm, name).double() for name in NORM)
    gain = gamma / (var + net.norm.eps).sqrt()
    shift = whole(beta - mean * gain, clip_of(model, "unsigned") / 15 * sawb(net.unsigned.weight) * gain.abs())
    y = y * gain.float().view(-1, 1, 1) + shift.view(-1, 1, 1)
    step = clip_of(model, "signed") / 7
    assert net.signed.bias is not None
    bias = whole(net.signed.bias, step * sawb(net.signed.weight))
    y = F.conv2d(on_grid(y, step, -7, 7), weight(net.signed), bias)
    if outputs == "int8":
        y = on_grid(y, clip_of(model, "signed", "output") / 127, -127, 127)
    return F.linear(y.flatten(1), net.fc.weight, net.fc.bias)


@torch.no_grad()
@pytest.mark.parametrize("outputs", ["int8", "float"])
def test_eval_is_the_definition(net: Net, outputs: str) -> None:
    net.norm.running_mean.normal_()  # type: ignore[union-attr]
    net.norm.weight.normal_()
    model = compiled(net, outputs=outputs).eval()
    torch.testing.assert_close(model(X), reference(model, net, X, outputs))
    assert torch.equal(model(X), model(X))


def test_the_plan_says_which_inputs_are_signed_and_why(net: Net) -> None:
    report = nmcompile.inspect(compiled(net))
    unsigned, signed = report.layer("unsigned").plan, report.layer("signed").plan
    assert str(unsigned.grid_row("input")) == "input u4 mse" and str(signed.grid_row("input")) == "input s4 mse"
    assert unsigned.find(Phase.FORWARD, "input") is not None and signed.find(Phase.FORWARD, "input") is None
    assert any("not proven non-negative" in row.reason for row in signed.rows)
    assert not report.layer("stem").plan.rewritten and not report.layer("fc").plan.rewritten
    assert "X 4:8 greedy_by_value u4 mse" in str(report)


def test_bops_count_the_bits_of_both_operands(net: Net) -> None:
    model = compiled(net)
    model(X)
    summary = nmcompile.inspect(model).summary["phases"]["forward"]
    macs = {"stem": 8 * 16 * 576, "unsigned": 8 * 4 * 1152, "signed": 8 * 4 * 128, "fc": 8 * 128}
    share = {"stem": 1024.0, "unsigned": 16 * 0.25, "signed": 16 * 0.5, "fc": 1024.0}
    assert summary["macs"] == sum(macs.values())
    assert summary["bops"] == pytest.approx(sum(macs[name] * share[name] for name in macs))


class Narrow(nn.Module):
    """A model with a depthwise convolution between its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.depthwise(torch.relu(self.stem(x)))).flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("clip", ["mse", "pact"])
def test_layers_that_nothing_prunes_compute_in_eight_bits(clip: str) -> None:
    """Input and weight have 8 bits, and each out-channel its own step."""
    net = Narrow().eval()
    model = compiled(net, ends="int8", clip=clip).eval()
    x = X
    for name, low in (("stem", -127), ("depthwise", 0), ("fc", 0)):
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
        steps = torch.stack([row.abs().max() / 127 for row in layer.weight])
        input_step = clip_of(model, name) / (127 if low else 255)
        along = (-1, *[1] * (layer.weight.dim() - 1))
        weight = on_grid(layer.weight, steps.view(along), -127, 127)
        x, bias = on_grid(x, input_step, low, 127 if low else 255), whole(layer.bias, steps * input_step)
        if isinstance(layer, nn.Conv2d):
            x = torch.relu(F.conv2d(x, weight, bias, groups=layer.groups))
        else:
            x = F.linear(x.flatten(1), weight, bias)
    torch.testing.assert_close(model(X[:, :, :6, :6]), x)
    assert not clips(model)
    torch.testing.assert_close(x, net(X), rtol=0.02, atol=0.02)
    reasons = {name: str(nmcompile.inspect(model).layer(name).reasons) for name in ("stem", "depthwise", "fc")}
    assert "not pruned" in reasons["stem"] and "not pruned" in reasons["fc"] and "depthwise" in reasons["depthwise"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_finalized_weights_are_sparse_and_on_their_grid(net: Net, granularity: str) -> None:
    plain = nmcompile.finalize(compiled(net, granularity=granularity))
    assert nmcompile.verify(plain).ok
    for name in ("unsigned", "signed"):
        weight, dense = plain.get_submodule(name).weight.detach(), net.get_submodule(name).weight.detach()  # type: ignore[operator]
        rows = dense.unbind() if granularity == "channel" else [dense]
        found = weight.unbind() if granularity == "channel" else [weight]
        for row, ours in zip(rows, found, strict=True):
            integers = ours.double() / sawb(row)
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-5)
            assert integers.abs().max() <= 7.001


def test_gradients_pass_straight_through(net: Net) -> None:
    """dX is zero where X was pruned or clipped, dW is dense, and the clip gets the sum of the clipped gradients."""
    torch.manual_seed(2)
    linear = nn.Linear(16, 8)
    layer = nn.Sequential(nn.ReLU(), linear)
    model = nmcompile.compile(layer, "inference", config=CompileConfig(ends="sparse", clip="pact"))
    nmcompile.calibrate(model, [torch.randn(64, 16)])
    x = (3 * torch.randn(32, 16)).requires_grad_()
    grad_output = torch.randn(32, 8)
    (clip,) = clips(model)
    grad_x, grad_w, grad_clip = torch.autograd.grad(model(x), [x, linear.weight, clip], grad_output)
    step = float(clip.detach()) / 15
    pruned = greedy_by_value(on_grid(x.detach().relu(), step, 0, 15), "4:8")
    weight = on_grid(greedy(linear.weight.detach(), "2:4"), sawb(linear.weight.detach()), -7, 7)
    dense_grad = grad_output @ weight
    above = (pruned > 0) & (x > clip.detach())
    inside = (pruned > 0) & ~above
    rounded_to_zero = (x > 0) & (x < step / 2)  # these share the places that are left in their blocks
    torch.testing.assert_close(grad_x[~rounded_to_zero], torch.where(inside, dense_grad, 0.0)[~rounded_to_zero])
    torch.testing.assert_close(grad_w, grad_output.t() @ pruned)
    torch.testing.assert_close(grad_clip, dense_grad[above].sum())


def test_quantization_aware_training_learns_weights_and_clips(net: Net) -> None:
    model = compiled(net, clip="pact").train()
    before = [clip.detach().clone() for clip in clips(model)]
    optimizer = torch.optim.SGD([*model.parameters(), *clips(model)], 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(new != old for new, old in zip(clips(model), before, strict=True))


@pytest.mark.parametrize("placement", ["operand", "activation"])
@pytest.mark.parametrize("start", [0.0, -1e-3])
def test_a_clip_that_steps_drove_to_zero_is_lifted_again(start: float, placement: str) -> None:
    """Nothing becomes NaN, and a few steps of gradient descent bring the clip to where the outputs need it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    model = compiled(net, clip="pact", ends="sparse", placement=placement)
    x = X[:2]
    wanted = model(x).detach()
    learned = clips(model)
    good = [clip.detach().abs().clone() for clip in learned]
    for clip in learned:
        clip.data.fill_(start)
    optimizer = torch.optim.Adam(learned, 0.2)
    for _ in range(25):
        optimizer.zero_grad()
        output = model(x)
        assert output.isfinite().all()
        (output - wanted).square().mean().backward()
        optimizer.step()
    for clip, before in zip(learned, good, strict=True):
        assert 0.5 * before < clip.detach().abs() < 2 * before


def test_clips_are_no_parameters(net: Net) -> None:
    model = compiled(net, clip="pact")
    assert list(model.state_dict()) == list(net.state_dict())
    assert len(clips(model)) == 2 and not clips(compiled(net))
    net.load_state_dict(model.state_dict())


def test_the_sparse_state_carries_the_clips(net: Net) -> None:
    model = compiled(net).eval()
    other = compiled(net, calibrate=False).eval()
    nmcompile.load_sparse_state_dict(other, nmcompile.sparse_state_dict(model))
    assert torch.equal(other(X), model(X))


def test_copies_and_recompilation_keep_clips(net: Net) -> None:
    model = compiled(net).eval()
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    again = nmcompile.compile(model, "inference", args=(X,), config=CompileConfig(granularity="channel"))
    assert clip_of(again, "signed") == clip_of(model, "signed")


def test_a_trained_transposable_mask_is_kept(net: Net) -> None:
    training = nmcompile.compile(net, "training")
    training(X)
    model = nmcompile.compile(training, "inference", args=(X,), calibration=[X])
    trained, kept = masks_of(training), masks_of(model)
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name].tensor, trained[name].tensor) for name in kept)


def test_uncalibrated_inputs_are_an_error_that_names_the_layer(net: Net) -> None:
    model = compiled(net, calibrate=False)
    with pytest.raises(CalibrationError, match=r"layer 'unsigned'.*calibration=loader"):
        model(X)
    nmcompile.calibrate(model, [X])
    assert model(X).isfinite().all()


BAD: dict[str, Callable[[], list[Tensor]]] = {
    "nothing": list,
    "NaN": lambda: [X.clone().fill_(torch.nan)],
    "zeros": lambda: [torch.full_like(X, -1e6)],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_bad_calibration_data_is_an_error_and_changes_nothing(net: Net, bad: str, inplace: bool) -> None:
    # Large weights of one sign make every unit of the stem dead on the "zeros" data.
    net.stem.weight.data.abs_()
    before = [type(module) for module in net.modules()]
    with pytest.raises(CalibrationError, match="layer 'unsigned'"):
        nmcompile.compile(net, "inference", args=(X,), calibration=BAD[bad](), inplace=inplace)
    assert [type(module) for module in net.modules()] == before


def test_a_plain_model_has_no_clips_to_calibrate(net: Net) -> None:
    with pytest.raises(StateError, match="not compiled"):
        nmcompile.calibrate(net, [X])


def test_loaders_may_yield_labels_and_keywords(net: Net) -> None:
    model = compiled(net)
    for batch in ([X, torch.zeros(8)], ((X,), torch.zeros(8)), {"x": X}):
        other = compiled(net, calibrate=False)
        nmcompile.calibrate(other, [batch])
        assert clip_of(other, "signed") == clip_of(model, "signed")


def test_percentiles_are_an_alternative(net: Net) -> None:
    model = compiled(net, clip="percentile")
    y = greedy_by_value(torch.relu(net.stem(X)).detach(), "4:8", dim=1)
    assert clip_of(model, "unsigned") == pytest.approx(float(y.max()), rel=1e-2)


@pytest.mark.parametrize("clip", ["mse", "pact"])
def test_torch_compile_takes_it_in_one_graph(net: Net, clip: str) -> None:
    model = compiled(net, clip=clip).train()
    run = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    ours, expected = run(X), model(X)
    assert torch.equal(ours, expected)
    ours.sum().backward()


def test_autocast(net: Net) -> None:
    model = compiled(net).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@pytest.mark.parametrize(
    ("options", "nearest"),
    [({"clip": "pct"}, "clip"), ({"granularity": "chanel"}, "'channel'"), ({"ends": "int4"}, "'int8'")],
)
def test_unknown_options_offer_the_nearest(options: dict[str, str], nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        CompileConfig(**options)  # type: ignore[arg-type]


def test_bits_without_a_grid_are_an_error() -> None:
    with pytest.raises(ConfigError, match="5 bits"):
        LayerConfig(weight_bits=5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits(net: Net, bits: int) -> None:
    layer = LayerConfig(weight=presets["inference"].weight, weight_bits=bits, input_bits=bits)
    model = compiled(net, layers={"_default": layer, "stem": None, "fc": None}).eval()
    weight = nmcompile.finalize(model).get_submodule("signed").weight
    assert weight.unique().numel() <= 2**bits - 1  # type: ignore[operator]


@torch.no_grad()
def test_no_common_factor_on_the_clips_serves_the_outputs_better(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle sets each factor by hand, on clips that were found without one."""
    model = compiled(net, outputs="float").eval()
    found = clip_of(model, "unsigned")
    monkeypatch.setattr(calibration, "FACTORS", (1.0,))
    local = clip_of(compiled(net, outputs="float"), "unsigned")
    pruned = greedy_by_value(torch.relu(net.stem(X)), "4:8", dim=1)
    steps = [triple.steps.input for triple in triples_of(model) if triple.steps.input is not None]
    clips = [float(step.clip) * local / found for step in steps]
    errors = {}
    for factor in FACTORS:
        for step, clip in zip(steps, clips, strict=True):
            step.calibrate(factor * clip)
        errors[factor] = float((model(X) - unquantized(model, net, pruned)).square().sum())
    assert found / local == pytest.approx(min(errors, key=errors.__getitem__))


def unquantized(model: nn.Module, net: Net, pruned: Tensor) -> Tensor:
    """Return the outputs with pruned, quantized weights and pruned inputs that are not quantized."""
    plain = nmcompile.finalize(model)
    assert isinstance(plain, Net)
    y = plain.signed(plain.norm(plain.unsigned(pruned)))
    output: Tensor = plain.fc(y.flatten(1))
    return output


class Wrapped(nn.Module):
    """A network whose outputs a wrapper processes further."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


def clips_of(end: Callable[[Tensor], Tensor]) -> list[float]:
    config, x = CompileConfig(ends="sparse"), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    model = nmcompile.compile(Wrapped(end), "inference", args=(x,), config=config, calibration=[x])
    return [float(step.clip) for triple in triples_of(model) for step in triple.steps.activations]


def test_masked_outputs_have_no_say_in_the_clips() -> None:
    masked = clips_of(lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1))
    assert masked == clips_of(lambda y: y)


def test_without_floating_point_outputs_each_clip_is_its_own_best(monkeypatch: pytest.MonkeyPatch) -> None:
    found = clips_of(lambda y: y.argmax(1))
    monkeypatch.setattr(calibration, "FACTORS", (1.0,))
    assert found == clips_of(lambda y: y)


@pytest.mark.parametrize(("layer", "refused"), [("0", True), ("2", False)])
def test_files_prune_by_value_which_magnitudes_are_only_behind_a_relu(layer: str, refused: bool) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(4, 16)
    by_magnitude = LayerConfig(input=Pruning("greedy", NMPattern(4, 8)))
    config = CompileConfig(ends="sparse", layers={layer: by_magnitude})
    compiled = nmcompile.compile(model, "weights", args=(x,), config=config)
    with pytest.raises(ExportError, match="layer '0': its input, which may be") if refused else nullcontext():
        assert deployed_layers(compiled)[layer].input.pattern == NMPattern(4, 8)
