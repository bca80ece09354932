"""`export(dynamic_shapes=...)`: the sizes it opens, how they are verified, and what it refuses."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.errors import ConfigError, ExportError
from nmcompile.export import Example
from nmcompile.export.check.other_sizes import other_sizes, resized

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
B, H, W, N = Dim("batch"), Dim("height", min=4, max=64), Dim("width", min=4), Dim("rows")


class Net(nn.Module):
    """Images and rows, whose numbers may differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)
        self.rows = nn.Linear(8, 16)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3))), self.rows(rows).relu()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    return nmcompile.compile(model, "inference", args=(X, ROWS), calibration=[(X, ROWS)]).eval()


def shapes_in(path: Path) -> list[list[Any]]:
    inputs = onnx.load(path).graph.input
    return [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs]


@torch.no_grad()
def test_height_width_and_a_second_batch_are_opened(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = nmcompile.export(net, path, (X[:1], ROWS), dynamic_shapes={"x": {0: B, 2: H, 3: W}, "rows": {0: N}})
    assert shapes_in(path) == [["batch", 8, "height", "width"], ["rows", 8]]
    assert report.verification is not None
    assert report.verification.notes == (
        "compared at batch 1, height 8, width 8, rows 5 and at batch 2, height 9, width 9, rows 6",
    )
    assert report.verification.notes[0] in str(report)
    run = OnnxRuntimeModel(path)
    for x, rows in ((X, ROWS), (X[:1, :, :5, :7], ROWS[:1]), (torch.cat([X, X, X], 3), ROWS[:2])):
        torch.testing.assert_close(tuple(run(x, rows)), net(x, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [({0: Dim.AUTO, 2: 2 * Dim("half", min=2)}, None), [(B, None, 2 * Dim("half", min=2), None), None]]
)
def test_other_forms_of_torch_export(net: nn.Module, form: Any, tmp_path: Path) -> None:
    report = nmcompile.export(net, tmp_path / "m.onnx", (X, ROWS), dynamic_shapes=form)
    (_, channels, height, width), rows = shapes_in(tmp_path / "m.onnx")
    assert (channels, height, width, rows) == (8, "2*half", 8, [5, 8])
    assert report.verification is not None and "half 4 and at" in report.verification.notes[0]
    x = torch.cat([X[:, :, :6], X[:1, :, :6]])
    torch.testing.assert_close(
        tuple(OnnxRuntimeModel(tmp_path / "m.onnx")(x, ROWS)), net(x, ROWS), rtol=1e-4, atol=1e-4
    )


class Sized(nn.Module):
    """A module that computes other results at another width, which its trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if torch.compiler.is_exporting():
            return y
        return y * (2 if x.shape[-1] != 8 else 1)


def test_a_file_that_holds_for_one_size_only_is_refused(tmp_path: Path) -> None:
    x = X[0]
    model = nmcompile.compile(Sized().eval(), "weights", args=(x,)).eval()
    nmcompile.export(model, tmp_path / "m.onnx", (x,))
    with pytest.raises(ExportError, match="ONNX Runtime does not compute the same as torch"):
        nmcompile.export(model, tmp_path / "m.onnx", (x,), dynamic_shapes={"x": {2: Dim("width")}})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no dict": (3, ConfigError, "dynamic_shapes is of type int; give a dict by the names of forward's arguments"),
    "too few": (({0: B},), ConfigError, "dynamic_shapes has 1 entries; give one for each of x, rows"),
    "another name": ({"row": {0: N}}, ConfigError, "dynamic_shapes names 'row', which .* did you mean 'rows'"),
    "no dim": ({"x": {4: H}}, ConfigError, r"dynamic_shapes\['x'\] opens dim 4 of a tensor of 4 dims"),
    "dim by name": ({"x": {"height": H}}, ConfigError, r"dynamic_shapes\['x'\] opens dim 'height' of a tensor"),
    "text": ({"x": {0: "batch"}}, ConfigError, r"dynamic_shapes\['x'\]\[0\] is 'batch'; give .*Dim\('batch'\)"),
    "no dims": ({"x": B}, ConfigError, r"dynamic_shapes\['x'\] is .*; give a dict from dims to sizes"),
    "dims of too few": ({"x": (B, None)}, ConfigError, r"dynamic_shapes\['x'\] has 2 entries for a tensor of 4 dims"),
    "a fixed size": (
        {"x": {1: Dim("channels")}},
        ExportError,
        r"Constraints violated \(channels\).*suggested: channels = 8.*dynamic_shapes",
    ),
    "out of range": ({"x": {2: Dim("tall", min=16)}}, ExportError, "8 not in range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_do_not_fit_are_refused(net: nn.Module, name: str, tmp_path: Path) -> None:
    shapes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        nmcompile.export(net, tmp_path / "m.onnx", (X, ROWS), dynamic_shapes=shapes)
    assert not list(tmp_path.iterdir())


class Least(nn.Module):
    """A module that runs at multiples of a size."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.multiple))


@pytest.mark.parametrize(
    ("multiple", "most", "size"), [(1, 64, 4), (3, 64, 9), (8, 64, 16), (5, 8, None), (8, 8, None), (7, 8, 7)]
)
def test_the_second_size_is_one_at_which_the_model_runs(multiple: int, most: int, size: int | None) -> None:
    found, said = other_sizes(
        [["b", "s"]], {"s": (0, most), "b": (1, 99)}, Example((torch.randn(4, 8),)), Least(multiple)
    )
    assert [x.shape[1] for example in found for x in example.tensors] == ([] if size is None else [size])
    assert said[0].startswith("compared at b 4, s 8 and at b" if size else "compared at the sizes of args only: ")


def test_a_size_that_inputs_share_is_changed_in_all() -> None:
    example = Example((torch.arange(6).reshape(2, 3),), {"y": [torch.arange(3), torch.arange(6)]})
    found = resized(example, [["b", "s"], ["s"], ["2*s"]], {"s": 4, "b": 1})
    assert [x.tolist() for x in found.tensors] == [[[0, 1, 2, 0]], [0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 1]]
