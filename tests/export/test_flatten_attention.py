"""Attention of three and of five dims in files: `export` compares ONNX Runtime with the module, at other sizes too."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import nmcompile

WIDTH = 8


class Attends(nn.Module):
    """Attention over windows, (batch, tokens, width) cut as `shape` says."""

    def __init__(self, dims: int, has_mask: bool) -> None:
        super().__init__()
        self.first, self.last, self.dims = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), dims
        self.has_mask = has_mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._cut(one) for one in self.first(x).chunk(3, -1))
        mask = (q[..., :1] * k[..., :1].mT).sigmoid() if self.has_mask else None
        y = scaled_dot_product_attention(q, k, v, mask, scale=0.5)
        y = y.transpose(2, 3).flatten(1, 2) if self.dims == 5 else y
        result: Tensor = self.last(y.reshape(x.shape))
        return result

    def _cut(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).unflatten(1, (3, -1)).transpose(2, 3) if self.dims == 5 else x


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dims", [3, 5])
def test_attention_of_other_dims(dims: int, has_mask: bool, tmp_path: Path) -> None:
    model, x = Attends(dims, has_mask).eval(), torch.randn(2, 12, WIDTH)
    nmcompile.export(nmcompile.compile(model, "weights", args=(x,)), tmp_path / "model.onnx", args=(x,))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    more = torch.randn(5, 12, WIDTH)
    with torch.no_grad():
        expected = model(more)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
