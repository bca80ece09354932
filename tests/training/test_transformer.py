"""Attention and encoder layers in eval(): torch's inference kernel must not read the dense weights."""

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

MODES = ["weights", "t-weights", "training"]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def masked_copy(compiled: nn.Module, plain: nn.Module) -> nn.Module:
    """Return `plain` with the parameters of `compiled`, each multiplied by its mask."""
    plain.load_state_dict(compiled.state_dict())
    parameters = dict(plain.named_parameters())
    for name, mask in masks_of(compiled).items():
        parameters[name].data *= mask.tensor
    return plain.eval()


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)  # type: ignore[arg-type]


def packing_encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)  # type: ignore[arg-type]


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    return x, padding


@pytest.mark.parametrize("make", [encoder_layer, encoder, packing_encoder], ids=["layer", "stack", "packing stack"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_eval_is_the_masked_reference(make: type[nn.Module], mode: str, padded: bool) -> None:
    torch.manual_seed(0)
    compiled = nmcompile.compile(make(), mode, config=CompileConfig(ends="sparse"))
    x, padding = inputs()
    mask = padding if padded else None
    compiled(x).sum().backward()
    compiled.eval()
    assert len(masks_of(compiled)) in (4, 8)
    with torch.no_grad():
        ours = compiled(x, src_key_padding_mask=mask)
        expected = masked_copy(compiled, make())(x, src_key_padding_mask=mask)
    real = ~padding if padded else torch.ones_like(padding)
    torch.testing.assert_close(ours[real], expected[real])


@pytest.mark.parametrize("mode", ["dense", "activations", "gradients", "inference"])
def test_padded_batches_in_eval_are_those_of_train(mode: str) -> None:
    torch.manual_seed(0)
    x, padding = inputs()
    compiled = nmcompile.compile(packing_encoder(), mode, calibration=[x])
    with torch.no_grad():
        expected = compiled(x, src_key_padding_mask=padding)
        ours = compiled.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], expected[~padding])


def test_padded_batches_in_eval_are_those_of_the_decompiled_encoder_up_to_its_zeros() -> None:
    torch.manual_seed(0)
    x, padding = inputs()
    compiled = nmcompile.compile(packing_encoder(), "dense").eval()
    with torch.no_grad():
        ours = compiled(x, src_key_padding_mask=padding)
        plain = nmcompile.decompile(compiled)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], plain[~padding])
    assert not plain[padding].any()
    torch.testing.assert_close(ours, compiled.train()(x, src_key_padding_mask=padding))


def test_decompiling_gives_the_nested_tensors_back() -> None:
    compiled = nmcompile.compile(packing_encoder(), "weights")
    again = nmcompile.compile(compiled, "training")
    for plain in (nmcompile.decompile(compiled), nmcompile.finalize(again)):
        assert isinstance(plain, nn.TransformerEncoder) and isinstance(plain.layers[0], nn.TransformerEncoderLayer)
        assert plain.use_nested_tensor and plain.layers[0].activation_relu_or_gelu == 1
        assert "three_gemm_fast_path" not in plain.__dict__
    assert not nmcompile.decompile(nmcompile.compile(encoder(), "weights")).use_nested_tensor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widths", [{}, {"kdim": 8, "vdim": 12}], ids=["packed", "apart"])
def test_attention_is_the_masked_reference(mode: str, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    compiled = nmcompile.compile(nn.MultiheadAttention(16, 4, **widths), mode, config=CompileConfig(ends="sparse"))
    query = torch.randn(5, 2, 16)
    key, value = torch.randn(6, 2, widths.get("kdim", 16)), torch.randn(6, 2, widths.get("vdim", 16))
    ours, weights = compiled(query, key, value)
    expected, expected_weights = masked_copy(compiled, nn.MultiheadAttention(16, 4, **widths))(query, key, value)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert len(masks_of(compiled)) == (4 if widths else 2)
