"""The sweep of architectures: its verdicts on models that are right and wrong, its shares, its table and its page."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from benchmarks.sweep import run_modes
from benchmarks.sweep.architecture import Architecture, tensors
from benchmarks.sweep.isolate import Lost, isolated
from benchmarks.sweep.page import PAGE, page_of
from benchmarks.sweep.row import MODES, Row, failed_row, run_row
from benchmarks.sweep.shares import shares_of
from benchmarks.sweep.table import read_table, write_table

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "coverage.csv"
GIGABYTES = 2**30


class Mixed(nn.Module):
    """Parameters of each group, 256 of each but the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sparse = nn.Linear(8, 16), nn.Linear(16, 16)
        self.rows = nn.Linear(16, 15)  # its backward GEMM is dense
        self.back = nn.Linear(15, 16)  # only its update GEMM is sparse
        self.recurrent = nn.RNN(16, 16, bias=False, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.back(self.rows(self.sparse(self.first(x).relu()).relu()))
        result: Tensor = self.last(self.recurrent(h)[0])
        return result


def architecture(make: Callable[[], nn.Module], *shape: int) -> Architecture:
    return Architecture("a net", "by hand", make, tensors(*shape))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_row_of_a_model_that_works() -> None:
    row = run_row(architecture(perceptron, 8))
    assert row.verdicts == dict.fromkeys(MODES, "ok") and row.is_compiled and row.seconds > 0
    assert row.parameters == 8 * 16 + 16 * 16 + 16 * 4
    assert row.shares["sparse"] == pytest.approx(256 / 448)
    assert row.kinds == {
        ("need", "first layer"): pytest.approx(128 / 448),
        ("need", "last linear"): pytest.approx(64 / 448),
    }


def test_shares_count_every_parameter_in_each_gemm() -> None:
    x = torch.randn(2, 4, 8)
    model = nmcompile.compile(Mixed(), "training", args=(x,))
    model(x).sum().backward()
    shares = shares_of(nmcompile.inspect(model))
    total = 128 + 256 + 240 + 240 + 512 + 64
    assert shares.parameters == total
    expected = {
        ("sparse", ""): (256 * 3 + 240 * 2 + 240 * 1) / 3,
        ("need", "first layer"): 128,
        ("need", "last linear"): 64,
        ("need", "indivisible"): (240 * 1 + 240 * 2) / 3,
        ("need", "recurrent"): 512,
    }
    assert shares.shares == {group: pytest.approx(count / total) for group, count in expected.items()}


@pytest.mark.parametrize("mode", ["dense", "training"])
def test_a_difference_is_wrong(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(model: nn.Module, *args: object, **options: object) -> nn.Module:
        result = compiled(model, *args, **options)
        first = next(module for module in result.modules() if isinstance(module, nn.Linear))
        with torch.no_grad():
            first.weight.mul_(1.5)
        return result

    compiled: Callable[..., nn.Module] = nmcompile.compile if mode == "dense" else nmcompile.finalize
    monkeypatch.setattr(nmcompile, "compile" if mode == "dense" else "finalize", differs)
    verdict, _ = run_modes.verdict(MODES[mode], architecture(perceptron, 8))
    assert verdict.startswith("wrong: ")


def test_a_file_that_computes_something_else_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_modes, "run_file", lambda path, inputs: [torch.zeros(3, 4)])
    verdict, _ = run_modes.verdict(MODES["inference"], architecture(perceptron, 8))
    assert verdict == "differs: ONNX Runtime differs by 1.0e+00 at batch size 3"


def test_a_model_without_layers_is_not_compiled() -> None:
    row = run_row(architecture(lambda: nn.Sequential(nn.LayerNorm(8)), 8))
    assert all(verdict.startswith("not compiled: CaptureError") for verdict in row.verdicts.values())
    assert not row.is_compiled and row.parameters == 0


def test_calls_in_a_process_of_their_own_have_limits() -> None:
    assert isolated(divmod, 7, 2, seconds=60, bytes=8 * GIGABYTES) == (3, 1)
    with pytest.raises(Lost, match="ZeroDivisionError"):
        isolated(divmod, 7, 0, seconds=60, bytes=8 * GIGABYTES)
    with pytest.raises(Lost, match="ended with status 3"):
        isolated(os._exit, 3, seconds=60, bytes=8 * GIGABYTES)
    with pytest.raises(Lost, match="MemoryError"):
        isolated(bytearray, 16 * GIGABYTES, seconds=60, bytes=8 * GIGABYTES)
    with pytest.raises(Lost, match=r"ran for more than 0\.5 s"):
        isolated(time.sleep, 60, seconds=0.5, bytes=8 * GIGABYTES)


def test_a_table_gives_back_its_rows(tmp_path: Path) -> None:
    one = architecture(perceptron, 8)
    found = Row(
        "a, net", "timm", {"dense": "ok", "training": 'wrong: "x"', "inference": "refused: a; b"}, 448,
        {"sparse": 0.5, "need": 0.25, "needless": 0.125, "python": 0.125},
        {("need", "first layer"): 0.25, ("needless", "bypassed"): 0.125, ("python", "other"): 0.125}, 3.5,
    )  # fmt: skip
    lost = dataclasses.replace(
        failed_row(one, "its process ended with status 1"), shares=dict.fromkeys(found.shares, 0.0)
    )
    path = tmp_path / "table.csv"
    assert read_table(path) == {}
    write_table(path, [found, lost])
    assert read_table(path) == {"a, net": found, "a net": lost} and not lost.is_compiled


def test_the_page_is_what_the_table_gives() -> None:
    assert PAGE.read_text() == page_of(list(read_table(RESULT).values()))


def test_the_committed_sweep_compiles_everything_and_finds_nothing_wrong() -> None:
    rows = read_table(RESULT).values()
    assert rows and all(row.is_compiled for row in rows)
    assert not [row.name for row in rows for verdict in row.verdicts.values() if verdict.startswith("wrong")]
