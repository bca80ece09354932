"""Table 1: patterns counted from operands, against brute force, and the paper's marks."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from nmcompile import pruning
from nmcompile.cli import cli
from nmcompile.config import Phase
from nmcompile.paper import table1
from nmcompile.pruning.pattern import NMPattern


def brute_force(x: Tensor, dim: int, pattern: NMPattern) -> bool:
    """Return whether each block along `dim` has at most N non-zeros, element by element."""
    lines = x.movedim(dim, -1).reshape(-1, x.shape[dim]).tolist()
    for line, start in product(lines, range(0, x.shape[dim], pattern.block)):
        if sum(value != 0 for value in line[start : start + pattern.block]) > pattern.n_keep:
            return False
    return x.shape[dim] % pattern.block == 0


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("operator", ["1:2", "2:4", "4:8", "1:4", "dense"])
def test_the_strictest_pattern_is_found(operator: str, dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 3, 3)
    pruned = x if operator == "dense" else pruning.greedy(x, operator, dim=dim)
    found = table1.pattern_along(pruned, dim)
    expected = [pattern for pattern in table1.PATTERNS if brute_force(pruned, dim, pattern)]
    assert found == (expected[0] if expected else None)
    assert str(found) == {"dense": "None", "1:4": "1:2"}.get(operator, operator)


def test_dims_without_whole_blocks_have_no_pattern() -> None:
    assert table1.pattern_along(torch.zeros(3, 5), 1) is None


def test_positions_are_those_of_the_output() -> None:
    calls = table1.step_calls("training")
    by_layer = {call.layer.name: table1.positions(call) for call in calls if call.phase is Phase.UPDATE}
    forward = {call.layer.name: table1.positions(call) for call in calls if call.phase is Phase.FORWARD}
    assert forward == by_layer and len(forward) == 8


def test_every_configuration_prunes_the_phases_that_the_paper_marks(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["paper", "run", "table1", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "table1.json").read_text())
    for name, *cells in content["rows"]:
        for counted, mark in zip(cells[::2], cells[1::2], strict=True):
            # Where a pruned activation is the output of a convolution too, its gradient shares the mask.
            is_pruned = counted.endswith("8 of 8")
            assert is_pruned == (mark == "✓"), (name, counted, mark)
    assert content["MACs left"]["Training: T-weights and gradients"] == [0.5, 0.5, 0.5]
    assert content["MACs left"]["Weights"] == [0.5, 1.0, 1.0]
