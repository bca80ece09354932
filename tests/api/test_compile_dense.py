"""Mode `"dense"` runs every layer as three GEMMs and prunes nothing: results equal eager's bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile

CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 5)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 5)),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3)), (2, 4, 8, 9)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2)), (2, 4, 8, 9)),
    "padding": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1)), (2, 4, 7, 5)),
    "same, uneven": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 5)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 5)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 5)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 7, 5)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 7, 5)),
    "without batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 5)),
    "empty batch": (lambda: nn.Conv2d(4, 6, 3), (0, 4, 7, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, 3, stride=2), (2, 4, 5, 6, 7)),
}
LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix": (lambda: nn.Linear(6, 5), (7, 6)),
    "vector": (lambda: nn.Linear(6, 5), (6,)),
    "tokens": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
}
LAYERS = CONVS | LINEARS


def results(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return outputs and gradients of the inputs and parameters, for a fixed gradient of the first output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = model(*leaves, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seed = torch.Generator().manual_seed(3)
    grad_output = torch.randn(outputs[0].shape, generator=seed, dtype=outputs[0].dtype)
    gradients = torch.autograd.grad(outputs[0], [*leaves, *model.parameters()], grad_output, allow_unused=True)
    return [x for x in (*outputs, *gradients) if x is not None]


def assert_equals_eager(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> None:
    eager = results(copy.deepcopy(model), *inputs, **kwargs)
    rewritten = nmcompile.compile(model, "dense")
    assert any(isinstance(module, nmcompile.ThreeGemm) for module in rewritten.modules())
    ours = results(rewritten, *inputs, **kwargs)
    assert len(ours) == len(eager)
    for mine, theirs in zip(ours, eager, strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.dtype == theirs.dtype


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    assert_equals_eager(factory().to(dtype), torch.randn(shape, dtype=dtype))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [name for name, (_, shape) in CONVS.items() if len(shape) == 4])
def test_channels_last(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = CONVS[name]
    model = factory()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    assert_equals_eager(model, torch.randn(shape).contiguous(memory_format=torch.channels_last))


def test_linear_on_a_strided_input() -> None:
    torch.manual_seed(0)
    assert_equals_eager(nn.Linear(6, 5), torch.randn(7, 12)[:, ::2])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, 3)
    dense.get_parameter(frozen).requires_grad_(False)
    sparse = nmcompile.compile(dense, "dense")
    sparse(torch.randn(2, 4, 5, 5)).sum().backward()
    assert {name for name, p in sparse.named_parameters() if p.grad is not None} == {"weight", "bias"} - {frozen}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=need_weights)

    assert_equals_eager(SelfAttention(), x)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}, {"bias": False}])
def test_cross_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = options.get("kdim", 8), options.get("vdim", 8)
    inputs = torch.randn(3, 5, 8), torch.randn(4, 5, sizes[0]), torch.randn(4, 5, sizes[1])
    assert_equals_eager(nn.MultiheadAttention(8, 2, **options), *inputs)


def test_attention_masks() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 8) for _ in range(3)]
    padding = torch.zeros(5, 3, dtype=torch.bool)
    padding[1, 2] = True
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
    assert_equals_eager(nn.MultiheadAttention(8, 2), *inputs, attn_mask=hidden)
    assert_equals_eager(nn.MultiheadAttention(8, 2), *inputs, key_padding_mask=padding)


def test_a_whole_network_in_train_mode() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(128, 8), nn.LayerNorm(8), nn.Linear(8, 3),
    )  # fmt: skip
    assert_equals_eager(network, torch.randn(4, 3, 6, 6))


class WritesInPlace(nn.Module):
    """A module whose layer reads a value that was written under another name."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.by_data = by_data

    def forward(self, x: Tensor) -> Tensor:
        written = hidden = torch.tanh(x).detach()
        if self.by_data:
            written.data = -written.data
        else:
            written -= 1
        return F.linear(hidden, self.weight)


@pytest.mark.parametrize("by_data", [False, True])
def test_a_traced_forward_writes_in_place_as_its_code_does(by_data: bool) -> None:
    assert_equals_eager(WritesInPlace(by_data), torch.randn(3, 6))
