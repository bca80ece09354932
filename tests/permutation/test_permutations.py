"""Permuted models compute what they computed, whatever ties their channels; refusals come with the reason."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nmcompile.capture import capture_model
from nmcompile.ir.captured import Captured
from nmcompile.permutation.families import Channels, find_families
from nmcompile.permutation.fold import Moves
from nmcompile.permutation.layers import Patterns
from nmcompile.permutation.plan import Permutations, persistent_tensors, plan_permutations
from nmcompile.pruning.pattern import NMPattern
from tests.permutation.nets import Attention, Concatenated, Gated, Language, Residual, Shuffled, SqueezeExcite

TWO_FOUR = NMPattern(2, 4)
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer other values, so that no permutation is hidden by equal ones."""
    model.double().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape) / 2)
    return model


def shuffled(channels: Channels) -> Moves:
    """Return the random permutation of every cell."""
    random = np.random.default_rng(0)
    moves = np.arange(len(channels.classes))
    for family in channels.families:
        for cell in family.cells:
            moves[cell] = random.permutation(cell)
    return moves


def check(model: nn.Module, *args: Tensor, tolerance: float = 1e-12) -> Channels:
    """Permute all that may move at random, and compare outputs in float64."""
    randomize(model)
    expected = model(*args)
    held = persistent_tensors(model)
    channels = find_families(capture_model(model, args), held)
    assert not isinstance(channels, str), channels
    changed = Permutations({}, (), channels, shuffled(channels)).tensors(model)
    assert all(not torch.equal(held[name], tensor) for name, tensor in changed.items())
    for name, tensor in changed.items():
        held[name].data.copy_(tensor)
    torch.testing.assert_close(model(*args), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return channels


def permute(model: nn.Module, captured: Captured, patterns: Patterns) -> Permutations:
    """Permute the channels of a model in place so that the patterns keep more, and return what was done."""
    held = persistent_tensors(model)
    found = plan_permutations(captured, held, patterns)
    for name, tensor in found.tensors(model).items():
        held[name].data.copy_(tensor)
    return found


def sizes(channels: Channels) -> list[int]:
    """Return the sizes of all cells, in ascending order."""
    return sorted(len(cell) for family in channels.families for cell in family.cells)


def conv_net(*body: nn.Module, width: int = 16, into: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, into, 3), *body, nn.ReLU(), nn.Conv2d(width, 5, 1))


CONV_NETS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "plain": (lambda: conv_net(nn.BatchNorm2d(16), nn.MaxPool2d(2)), [16]),
    "residual": (lambda: conv_net(Residual(nn.Sequential(nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)))), [8, 16]),
    "concatenation": (lambda: conv_net(Concatenated(16), width=36), [8, 12, 16]),
    "depthwise": (lambda: conv_net(nn.Conv2d(16, 16, 3, groups=16)), [16]),
    "depthwise, two outputs": (lambda: conv_net(nn.Conv2d(16, 32, 3, groups=16), width=32), [16]),
    "grouped": (lambda: conv_net(nn.Conv2d(16, 24, 3, groups=2), width=24), [8, 8, 12, 12]),
    "group norm": (lambda: conv_net(nn.GroupNorm(4, 16)), [4, 4, 4, 4]),
    "instance norm": (lambda: conv_net(nn.InstanceNorm2d(16, affine=True, track_running_stats=True)), [16]),
    "transposed": (lambda: conv_net(nn.ConvTranspose2d(16, 8, 2), width=8), [8, 16]),
    "shuffled": (lambda: conv_net(Shuffled(16)), [8, 8]),
    "squeeze and excite": (lambda: conv_net(SqueezeExcite(16)), [8, 16]),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)), [8]),
    "upsampled": (lambda: conv_net(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ZeroPad2d(1)), [16]),
    "padded channels": (lambda: conv_net(nn.ConstantPad3d((0, 0, 0, 0, 2, 2), 0.0), width=20), [16]),
    "PReLU": (lambda: conv_net(nn.PReLU(16)), [16]),
    "GLU": (lambda: conv_net(nn.GLU(1), width=8), [8]),
    "channels as positions": (lambda: conv_net(nn.PixelShuffle(2), width=4), []),
}


@pytest.mark.parametrize("name", CONV_NETS)
def test_convolutional_nets(name: str) -> None:
    make, expected = CONV_NETS[name]
    assert sizes(check(make(), IMAGE)) == expected


POOLS: dict[str, Callable[[int], nn.Module]] = {
    "max": lambda dims: (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](3, 1, 1),
    "max with indices": lambda dims: FirstOf((nn.MaxPool1d, nn.MaxPool2d)[dims - 1](3, 1, 1, return_indices=True)),
    "average": lambda dims: (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](3, 1, 1),
    "power": lambda dims: (nn.LPPool1d, nn.LPPool2d)[dims - 1](2, 1, 1),
    "adaptive average": lambda dims: (nn.AdaptiveAvgPool1d(16), nn.AdaptiveAvgPool2d((6, 16)))[dims - 1],
    "adaptive max": lambda dims: (nn.AdaptiveMaxPool1d(16), nn.AdaptiveMaxPool2d((6, 16)))[dims - 1],
    "reflection": lambda dims: (nn.ReflectionPad1d, nn.ReflectionPad2d)[dims - 1](1),
    "replication": lambda dims: (nn.ReplicationPad1d, nn.ReplicationPad2d)[dims - 1](1),
    "circular": lambda dims: (nn.CircularPad1d, nn.CircularPad2d)[dims - 1](1),
}


class FirstOf(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.body(x)[0]
        return first


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", POOLS)
def test_an_unbatched_pool_mixes_its_last_dims(name: str, dims: int) -> None:
    x = torch.randn((3, 6, 12)[-dims - 1 :], dtype=torch.float64)
    pool = POOLS[name](dims)
    width = pool(torch.randn((3, 6, 16)[-dims - 1 :])).shape[-1]
    assert sizes(check(nn.Sequential(nn.Linear(12, 16), pool, nn.Linear(width, 4)), x)) == []
    # Channels ahead of the pooled dims still move, with a batch and without.
    convolution = (nn.Conv1d, nn.Conv2d)[dims - 1]
    net = nn.Sequential(convolution(3, 8, 1), POOLS[name](dims), convolution(8, 4, 1))
    for batch in ((), (2,)):
        assert sizes(check(net, torch.randn((*batch, 3, 6, 12)[: len(batch) + 1 + dims], dtype=torch.float64))) == [8]


def test_a_pool_of_two_dims_mixes_tokens_beside_positions() -> None:
    net = nn.Sequential(
        nn.Linear(12, 16), Transposed(), nn.AvgPool2d((3, 1), 1, (1, 0)), Transposed(), nn.Linear(16, 4)
    )
    assert sizes(check(net, torch.randn(2, 6, 12, dtype=torch.float64))) == []


def test_tensors_that_share_memory_keep_their_order() -> None:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)]
    model, x = nn.Sequential(*layers).double(), torch.randn(3, 8, dtype=torch.float64)
    model[4].weight = nn.Parameter(model.get_parameter("2.weight").data)
    channels = check(model, x)
    assert not channels.families
    patterns = dict.fromkeys(("2", "4", "5"), (TWO_FOUR, False))
    found = plan_permutations(capture_model(model, (x,)), persistent_tensors(model), patterns)
    assert all("not a parameter of its own" in found.report[name].reason for name in ("2", "4"))
    assert "2.weight, which state_dict does not hold as floats in memory of its own" in found.report["5"].reason


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_language_models(tied: bool, rotary: bool, packed: bool, norm: type[nn.Module]) -> None:
    found = check(Language(tied=tied, rotary=rotary, packed=packed, norm=norm), torch.randint(11, (2, 6)))
    # The stream, the gate, two heads of values; rotary embeddings fix the channels of queries and keys.
    assert sizes(found) == sorted([32, 24, 8, 8] + [8, 8] * (not rotary))
    stream = next(family for family in found.families if len(family.cells[0]) == 32)
    assert ("embed.weight", 1) in stream.axes
    assert (("head.weight", 1) in stream.axes) != tied


def test_multi_head_attention_of_torch() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(5, 32), encoder, nn.Linear(32, 3))
    assert 32 in sizes(check(model, torch.randn(2, 6, 5, dtype=torch.float64)))


class Weighted(nn.Module):
    """Channels are multiplied by numbers that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).cumsum(-1))


class Auxiliary(nn.Module):
    """A second head that only training reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + self.aux(y).sum() if self.training else self.b(y)


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8))), "1.branch", "the model returns them"),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "0", "an input of the model"),
        (Weighted(), "b", "scale, which state_dict does not hold"),
        (Sorted(), "b", "the result of cumsum, which is not known to treat channels alike"),
        (Auxiliary(), "b", "does not reach aux.weight, aux.bias"),
    ],
)
def test_a_refusal_has_its_reason(model: nn.Module, layer: str, reason: str) -> None:
    model.eval()
    captured = capture_model(model, (torch.randn(4, 8),))
    found = plan_permutations(captured, persistent_tensors(model), {layer: (TWO_FOUR, False)})
    assert reason in found.report[layer].reason
    assert found.report[layer].after == found.report[layer].before
    assert not found.tensors(model)


def test_without_an_example_nothing_moves() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found = plan_permutations(capture_model(model), persistent_tensors(model), {"1": (TWO_FOUR, False)})
    assert "args" in found.report["1"].reason
    assert found.tensors(model) == {}


def patterns_of(captured: Captured, pattern: NMPattern, is_transposable: bool) -> dict[str, tuple[NMPattern, bool]]:
    layers = [site.layer for site in captured.sites]
    fitting = [
        one for one in layers if one.fits_forward(pattern) and (not is_transposable or one.fits_backward(pattern))
    ]
    return {one.name: (pattern, is_transposable) for one in fitting}


@pytest.mark.parametrize("is_transposable", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("name", ["residual", "concatenation", "grouped", "flattened", "shuffled"])
def test_more_is_kept_and_outputs_stay(name: str, pattern: str, is_transposable: bool) -> None:
    model = randomize(CONV_NETS[name][0]())
    expected = model(IMAGE)
    captured = capture_model(model, (IMAGE,))
    patterns = patterns_of(captured, NMPattern.parse(pattern), is_transposable)
    found = permute(model, captured, patterns)
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    gains = [one.after - one.before for one in found.report.values()]
    assert sum(gains) >= 0
    again = plan_permutations(captured, persistent_tensors(model), patterns)
    kept = sum(one.before for one in again.report.values())
    assert kept == pytest.approx(sum(one.after for one in found.report.values()))
    if name != "flattened" and (name, pattern) not in (("grouped", "4:8"), ("shuffled", "4:8")):
        assert sum(gains) > 0


@given(seed=st.integers(0, 1 << 20))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_random_nets(seed: int) -> None:
    random = np.random.default_rng(seed)
    width, body = 16, list[nn.Module]()
    for kind in random.integers(0, 8, 4):
        if kind == 0:
            body.append(Residual(nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1))))
        elif kind == 1 and width < 64:
            body.append(Concatenated(width))
            width += 20
        elif kind == 2:
            body.append(nn.Conv2d(width, width, 3, padding=1, groups=int(random.choice([2, 4, width]))))
        elif kind == 3:
            body.append(SqueezeExcite(width))
        elif kind == 4:
            body.append(Shuffled(width))
        elif kind == 5:
            body.append(nn.BatchNorm2d(width))
        elif kind == 6:
            body.append(nn.Conv2d(width, 24, 3, padding=1))
            width = 24
        else:
            body.append(nn.Sequential(nn.GroupNorm(2, width), nn.GELU()))
    check(conv_net(*body, width=width), IMAGE)


def test_values_and_gates_alone() -> None:
    tokens = torch.randn(2, 6, 32, dtype=torch.float64)
    assert sizes(check(Gated(32, 24, True), tokens)) == [24]
    assert sizes(check(Attention(32, 4, 1, False), tokens)) == [8, 8]


def test_float32_within_rounding() -> None:
    model = randomize(CONV_NETS["concatenation"][0]()).float()
    expected = model(IMAGE.float())
    captured = capture_model(model, (IMAGE.float(),))
    permute(model, captured, patterns_of(captured, TWO_FOUR, False))
    torch.testing.assert_close(model(IMAGE.float()), expected, rtol=1e-4, atol=1e-4)
