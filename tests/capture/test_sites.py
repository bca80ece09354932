"""Modules that are layers, their names, and the modules that are skipped with a reason."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from nmcompile.capture import capture_model
from nmcompile.errors import CaptureError
from nmcompile.ir.captured import Site
from nmcompile.ir.layers import ConvLayer, LinearLayer


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {site.layer.name: site for site in capture_model(model).sites}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (4, 6)),
        (nn.Conv1d(4, 8, 3), (8, 4, 3)),
        (nn.Conv2d(4, 8, (3, 1), groups=2), (8, 2, 3, 1)),
        (nn.Conv3d(4, 8, 2, bias=False), (8, 4, 2, 2, 2)),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), (4, 6)),
        (nn.Linear(6, 4, device="meta"), (4, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_are_layers(module: nn.Module, shape: tuple[int, ...]) -> None:
    site = sites_of(nn.Sequential(module))["0"]
    assert (site.module, site.role, site.weight, site.is_expression) == ("0", "", "0.weight", False)
    assert site.layer.weight_shape == shape
    assert site.layer.has_bias == (module.bias is not None)


def test_conv_geometry() -> None:
    conv = nn.Conv2d(4, 8, 4, stride=1, padding="same", dilation=2, padding_mode="circular")
    layer = sites_of(nn.Sequential(conv))["0"].layer
    assert isinstance(layer, ConvLayer)
    assert (layer.padding, layer.pad_before, layer.padding_mode) == ((0, 0), (3, 3, 3, 3), "circular")


def test_shared_module_appears_once_under_its_first_name() -> None:
    fc = nn.Linear(4, 4)
    captured = capture_model(nn.Sequential(fc, nn.ReLU(), fc))
    assert [site.layer.name for site in captured.sites] == ["0"]
    assert captured.whole is not None
    assert list(captured.whole.layers.values()) == [("0",), ("0",)]
    assert not captured.facts["0"].nonnegative


def test_hugging_face_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    assert sites_of(nn.Sequential(Conv1D(12, 4)))["0"].layer == LinearLayer("0", (4, 12), True, transposed=True)


def test_neither_capture_nor_the_callback_imports_other_libraries() -> None:
    code = "import nmcompile.capture, sys, torch; nmcompile.capture.capture_model(torch.nn.Linear(4, 4)); "
    code += "nmcompile.training.SparseTraining(); "
    code += "assert not {'transformers', 'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized_weights_are_expressions(wrap: object) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), wrap(nn.Linear(4, 8)))  # type: ignore[operator]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture_model(model, (torch.randn(2, 6),))
    site = captured.sites[1]
    assert (site.layer.name, site.weight, site.is_expression) == ("2", "2.weight", True)
    assert site.layer == LinearLayer("2", (8, 4), True)
    assert captured.whole is not None
    assert list(captured.whole.layers.values()) == [("0",), ("2",)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruned_weight_is_an_expression() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5))
    assert sites_of(model)["0"].is_expression


def test_packed_attention() -> None:
    sites = sites_of(nn.TransformerEncoderLayer(8, 2, 16))
    assert list(sites) == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    packed = sites["self_attn.in_proj"]
    assert packed.layer == LinearLayer("self_attn.in_proj", (24, 8), True)
    assert (packed.module, packed.role, packed.weight) == ("self_attn", "in_proj", "self_attn.in_proj_weight")
    out = sites["self_attn.out_proj"]
    assert (out.module, out.role, out.weight) == ("self_attn", "out_proj", "self_attn.out_proj.weight")


@pytest.mark.parametrize("bias", [True, False])
def test_unpacked_attention_with_extra_keys(bias: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=12, bias=bias, add_bias_kv=True, add_zero_attn=True)
    layers = [site.layer for site in sites_of(nn.Sequential(attention)).values()]
    assert [layer.name for layer in layers] == ["0.q_proj", "0.k_proj", "0.v_proj", "0.out_proj"]
    assert [layer.weight_shape for layer in layers] == [(8, 8), (8, 4), (8, 12), (8, 8)]
    assert [layer.has_bias for layer in layers] == [bias] * 4


def test_attention_with_its_own_forward() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (x @ self.in_proj_weight.t()).chunk(3, -1)
            return ((q @ k.transpose(-1, -2)).softmax(-1) @ v) @ self.out_proj.weight.t()

    model = nn.Sequential(Mine(8, 2), nn.Linear(8, 4))
    captured = capture_model(model)
    assert {site.layer.name for site in captured.sites} == {"0.in_proj_weight", "0.out_proj.weight", "0.out_proj", "1"}
    assert not captured.python
    instead = "where it is the layer '0.out_proj.weight'"
    assert captured.bypassed == {"0.out_proj": f"its weight is read by Mine.forward, {instead}"}


def test_attention_whose_own_forward_cannot_be_traced_is_named() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x @ self.in_proj_weight.t() if bool(x.sum() > 0) else x

    captured = capture_model(nn.Sequential(Mine(8, 2), nn.Linear(8, 4)))
    assert captured.python["0"].startswith("TraceError")
    assert captured.uncaptured == {"0": ("0.in_proj_weight",)}


def test_subclass_that_inherits_forward_is_a_layer_and_one_with_conv_forward_is_not() -> None:
    class Plain(nn.Conv2d):
        pass

    class Mine(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight * 2, bias)

    sites = sites_of(nn.Sequential(Plain(4, 4, 1), Mine(4, 4, 1)))
    assert [sites[name].is_expression for name in ("0", "1")] == [False, True]
    assert sites["1"].role != ""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 2, groups=2), "grouped transposed"),
        (nn.Bilinear(4, 4, 4), "two inputs"),
        (
            parametrizations.weight_norm(nn.GRUCell(4, 4), "weight_hh"),
            "recurrent layer with its own forward or computed weights",
        ),
        (nn.LazyLinear(4), "run the model once to initialise lazy layers"),
        (nn.Linear(4, 4, dtype=torch.complex64), "its weight is complex64"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_skipped_modules_have_a_reason(module: nn.Module, reason: str) -> None:
    captured = capture_model(nn.Sequential(nn.Linear(4, 4), module))
    assert reason in captured.skipped["1"]
    assert len(captured.sites) == 1


def test_integer_weight_is_skipped() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert capture_model(nn.Sequential(nn.Linear(4, 4), linear)).skipped == {"1": "its weight is int8"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_skipped() -> None:
    captured = capture_model(nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4)))
    assert captured.skipped == {"0.0": "TorchScript code cannot be rewritten"}
    assert [site.layer.name for site in captured.sites] == ["1"]


def test_weight_tied_to_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    model[1].weight = model[0].weight
    captured = capture_model(model)
    assert captured.tied == {"1": "0"}
    assert captured.sites[0].weight == "1.weight"


def test_a_model_without_layers_is_an_error_that_names_it() -> None:
    with pytest.raises(CaptureError, match="ReLU has no conv or linear layer to compile"):
        capture_model(nn.ReLU())
    with pytest.raises(CaptureError, match="bilinear"):
        capture_model(nn.Bilinear(4, 4, 4))
