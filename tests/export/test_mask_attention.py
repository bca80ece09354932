"""Attention rows that may attend to nothing: files compute the same as torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[True] * 5, [False] * 3 + [True] * 2, [False] * 5])
OTHER = torch.tensor([[False] * 5, [True] * 5])


class Attention(nn.Module):
    """Two blocks: a NaN in the first would reach every row in the second."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        allowed = (~padding)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        if self.mask == "infinite":
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
        return self.head(x)


class Torch(nn.Module):
    """torch's own module; if the probabilities are requested, its softmax returns NaN, in the file as in eager."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.first(x)
        attended = self.attention(y, y, y, key_padding_mask=padding, need_weights=self.need_weights)[0]
        return self.head(y + attended)


MODELS: dict[str, Any] = {
    "boolean": lambda: Attention("boolean"),
    "infinite": lambda: Attention("infinite"),
    "module": lambda: Torch(need_weights=False),
    "module with NaN": lambda: Torch(need_weights=True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_may_attend_to_nothing_are_those_of_torch(name: str, tmp_path: Path) -> None:
    model = nmcompile.compile(MODELS[name]().eval(), "weights", args=(X, PADDING)).eval()
    report = nmcompile.export(model, tmp_path / "m.onnx", (X, PADDING))
    assert report.verification is not None and len(report.verification.runtimes) == 2
    assert all(check.relative_l2 < 1e-5 for check in report.verification.runtimes)
    for x, padding in ((X, PADDING), (X[:2], OTHER)):
        expected = model(x, padding)
        assert bool(expected.isnan().any()) == (name == "module with NaN")
        found = OnnxRuntimeModel(tmp_path / "m.onnx")(x, padding)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("empty", [False, True])
def test_constant_masks_cost_nothing_unless_a_row_is_empty(empty: bool, tmp_path: Path) -> None:
    import onnx

    class Fixed(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, self.get_buffer("padding"))

    model = Fixed("infinite")
    model.register_buffer("padding", torch.tensor([[empty] * 3 + [True] * 2]))
    compiled = nmcompile.compile(model.eval(), "weights", args=(X,)).eval()
    nmcompile.export(compiled, tmp_path / "m.onnx", (X,))
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("IsNaN") == (2 if empty else 0)
    torch.testing.assert_close(OnnxRuntimeModel(tmp_path / "m.onnx")(X[:1]), compiled(X[:1]), rtol=1e-4, atol=1e-5)
