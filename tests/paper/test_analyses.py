"""The computed experiments: their formulas against enumeration and draws, and whole commands."""

import json
from collections import Counter
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional as F

from nmcompile.cli import cli
from nmcompile.paper import eq21, eq26, fig1, fig2
from nmcompile.paper.operands import GemmCall
from nmcompile.paper.variance import approximate_variance, optimal_variance
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.references import OPERATORS


def run(name: str, out: Path) -> dict[str, object]:
    result = CliRunner().invoke(cli, ["paper", "run", name, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content: dict[str, object] = json.loads((out / f"{name}.json").read_text())
    return content


def blocks() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(6, 4, dtype=torch.float64) ** 3


@pytest.mark.parametrize(
    ("operator", "pattern"), [("mvue", "1:4"), ("mvue", "2:4"), ("mvue", "3:4"), ("mvue_approx", "2:4")]
)
def test_variances_are_those_of_the_operators(operator: str, pattern: str) -> None:
    a, draws = blocks(), 40_000
    generator = torch.Generator().manual_seed(1)
    sampled = OPERATORS[operator](a.repeat(draws, 1, 1), pattern, generator=generator)
    squares = (sampled - a).square().sum(2)
    approximate = operator == "mvue_approx"
    expected = approximate_variance(a) if approximate else optimal_variance(a, NMPattern.parse(pattern).n_keep)
    error = squares.std(0) / draws**0.5
    assert ((squares.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def test_approximate_variance_by_enumeration() -> None:
    for block, found in zip(blocks().tolist(), approximate_variance(blocks()).tolist(), strict=True):
        probability = Counter[int]()
        for i, j in permutations(range(4), 2):
            pair = block[i] / sum(block) * block[j] / (sum(block) - block[i])
            probability.update({i: pair, j: pair})
        assert found == pytest.approx(sum(a * a / probability[i] - a * a for i, a in enumerate(block)))


def test_blocks_with_few_non_zeros_have_no_variance() -> None:
    a = torch.tensor([[0, 0, 0, 0], [0, 3, 0, 0], [1, 0, 0, 2.0]], dtype=torch.float64)
    assert optimal_variance(a, 2).tolist() == [0, 0, 0]


def test_fig1_measures_what_theory_says() -> None:
    for method in fig1.METHODS:
        found = fig1.sample(method, 4000)
        bias, variance = fig1.theory(method)
        assert (found.mean(0) - fig1.blocks()).norm(dim=1).mean() == pytest.approx(bias, abs=0.02)
        assert found.var(0).sum(1).mean().item() == pytest.approx(variance, abs=0.02)


def test_fig2_is_bounded_by_two(tmp_path: Path) -> None:
    rows = run("fig2", tmp_path)["rows"]
    assert isinstance(rows, list) and [row[1] for row in rows] == [1_373_500, 156_849]
    assert all(1 <= row[2] <= row[4] < 2 and row[5] > 0 for row in rows)
    assert rows[1][4] > 1.99999


def test_fig2_scans_all_sorted_blocks() -> None:
    values = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64)
    found = {tuple(block) for block in fig2.sorted_blocks(values).tolist()}
    every = product(values.tolist(), repeat=3)
    assert found == {(*block, 1.0) for block in every if sorted(block) == list(block) and block[1] > 0}


def test_eq21_holds_for_all_blocks(tmp_path: Path) -> None:
    rows = run("eq21", tmp_path)["rows"]
    assert isinstance(rows, list) and all(row[-1] == 0 and row[3] < 1 for row in rows)


def test_eq21_halves_have_the_variance_of_two_mvue() -> None:
    a = blocks()
    halves = optimal_variance(a[:, :2], 1) + optimal_variance(a[:, 2:], 1)
    torch.testing.assert_close(eq21.halves_variance(a), halves)
    assert eq21.is_clipped(torch.tensor([[1.0, 2, 3, 6], [1, 2, 3, 5.9]])).tolist() == [True, False]


def test_eq26_expects_half_of_n(tmp_path: Path) -> None:
    content = run("eq26", tmp_path)
    rows, left = content["rows"], content["left"]
    assert isinstance(rows, list) and [row[1] for row in rows[:3]] == [0.5, 1.0, 2.0]
    assert isinstance(left, dict) and len(left) == 8
    for weight, activation, both in left.values():
        assert weight == 0.5 and 0.2 < activation <= 0.5 and 0.8 * weight * activation < both < 0.3


def test_eq26_enumerates_masks() -> None:
    assert eq26.mac_distribution(NMPattern(2, 4)) == pytest.approx({0: 1 / 6, 1: 4 / 6, 2: 1 / 6})


def test_macs_are_counted_as_brute_force_counts_them() -> None:
    from nmcompile.config import Phase
    from nmcompile.ir.layers import ConvLayer

    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 5, 5).relu(), torch.randn(6, 4, 3, 3).relu()
    layer = ConvLayer("conv", tuple(w.shape), False, (1, 1), (1, 1), (1, 1), 1)
    counts = [0, 0, 0, 0]
    padded = F.pad(torch.where(x == 0, 2.0, 1.0), (1, 1, 1, 1))  # 0: no MAC at all, 2: a zero
    for sample, out, row, column in product(range(2), range(6), range(5), range(5)):
        patch, kernel = padded[sample, :, row : row + 3, column : column + 3], w[out] != 0
        inside = patch > 0
        counts[0] += int(inside.sum())
        for k, kept in enumerate((inside & kernel, patch == 1, (patch == 1) & kernel)):
            counts[k + 1] += int(kept.sum())
    found = eq26.macs_left(GemmCall(layer, Phase.FORWARD, {"input": x, "weight": w}))
    assert found == pytest.approx([count / counts[0] for count in counts[1:]])


def test_analyses_take_no_data(tmp_path: Path) -> None:
    arguments = ["paper", "run", "fig2", "--data", str(tmp_path), "--out", str(tmp_path)]
    error = CliRunner().invoke(cli, arguments).exception
    assert "leave out --data" in str(error)


def test_unknown_experiments_are_named(tmp_path: Path) -> None:
    error = CliRunner().invoke(cli, ["paper", "run", "tabel2", "--out", str(tmp_path)]).exception
    assert "did you mean 'table2'?" in str(error)


def test_list_shows_every_experiment() -> None:
    shown = CliRunner().invoke(cli, ["paper", "list"], catch_exceptions=False).output
    assert all(name in shown for name in ("fig1", "fig2", "eq21", "eq26", "table2"))
