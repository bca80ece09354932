"""Expectation and variance of every operator, against Equation (11) of Chmiel et al. 2023 with its own p."""

import pytest
import torch
from torch import Tensor

from nmcompile.pruning import OPERATORS

DRAWS = 200_000
SIGMAS = 5
BLOCKS = {
    2: {
        "random": [0.3, -1.1],
        "equal": [2.0, 2.0],
        "dominant": [1000.0, 1.0],
        "zero": [0.0, -3.0],
    },
    4: {
        "random": [0.3, -1.1, 0.7, -0.45],
        "case 1": [1.0, -1.1, 1.2, 1.3],
        "case 2": [-0.2, 1.3, 1.0, 0.9],
        "case 3": [0.5, 0.25, -8.0, 1.0],
        "equal": [1.0, 1.0, -1.0, 1.0],
        "dominant": [1.0, 3.0, 2.0, 1000.0],
        "zero": [0.0, 1.0, -2.0, 1.5],
        "two non-zeros": [0.0, 1.0, 0.0, -5.0],
    },
    8: {
        "random": [0.3, -1.1, 0.7, -0.45, 2.2, 0.05, 0.9, -0.6],
        "dominant": [0.1, -0.2, 50.0, 0.3, 0.0, 9.0, 0.4, 0.1],
    },
}
ESTIMATORS = [
    ("mvue", "1:2"),
    ("mvue", "2:4"),
    ("mvue", "1:4"),
    ("mvue", "3:4"),
    ("mvue", "4:8"),
    ("mvue_one_of_two", "1:2"),
    ("mvue_pairs", "2:4"),
    ("mvue_approx", "2:4"),
    ("mvue_approx", "2:8"),
    ("unbiased", "1:2"),
    ("unbiased", "2:4"),
    ("unbiased", "4:8"),
]
CASES = [(name, pattern, kind) for name, pattern in ESTIMATORS for kind in BLOCKS[int(pattern.split(":")[1])]]


def optimal(a: list[float], n_keep: int) -> list[float]:
    """Run water-filling: the largest elements have p = 1 as long as the others' share would exceed 1."""
    order = sorted(range(len(a)), key=lambda i: -a[i])
    p = [0.0] * len(a)
    for rank, i in enumerate(order):
        rest = sum(a[k] for k in order[rank:])
        if rank < n_keep and a[i] * (n_keep - rank) < rest:
            for k in order[rank:]:
                p[k] = a[k] * (n_keep - rank) / rest
            return p
        p[i] = 1.0 if rank < n_keep and a[i] > 0 else 0.0
    return p


def equation_25(a: list[float]) -> list[float]:
    total = sum(a)
    if sum(value > 0 for value in a) <= 2:
        return [float(value > 0) for value in a]
    second = [
        sum(a[k] / total * a[i] / sum(a[:k] + a[k + 1 :]) for k in range(len(a)) if k != i) for i in range(len(a))
    ]
    return [a[i] / total + second[i] for i in range(len(a))]


def probabilities(name: str, a: list[float], n_keep: int) -> list[float]:
    if name == "unbiased":
        return [n_keep / len(a)] * len(a)
    return equation_25(a) if name == "mvue_approx" else optimal(a, n_keep)


def draws(name: str, pattern: str, block: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2023)
    return OPERATORS[name](block.expand(DRAWS, -1), pattern, generator=generator).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "pattern", "kind"), CASES)
def test_expectation_and_variance(name: str, pattern: str, kind: str, dtype: torch.dtype) -> None:
    n_keep, size = (int(number) for number in pattern.split(":"))
    block = torch.tensor(BLOCKS[size][kind], dtype=dtype)
    a = block.double()
    p = torch.tensor(probabilities(name, a.abs().tolist(), n_keep), dtype=torch.float64)
    inverse = torch.where(p > 0, 1 / p, 0.0)
    variance = a**2 * (inverse - 1).clamp(min=0)
    results = draws(name, pattern, block)
    rounding = torch.finfo(dtype).eps * a.abs().sum()
    bias = results.mean(0) - a
    assert (bias.abs() <= SIGMAS * (variance / DRAWS).sqrt() + rounding).all()
    errors = ((results - a) ** 2).sum(1)
    tolerance = SIGMAS * errors.std() / DRAWS**0.5 + 8 * torch.finfo(dtype).eps * a.abs().sum() ** 2
    assert abs(errors.mean() - variance.sum()) <= tolerance
    kept = (results != 0).double().mean(0)
    expected = torch.where(a != 0, p, 0.0)
    assert ((kept - expected).abs() <= SIGMAS * (expected * (1 - expected) / DRAWS).sqrt() + 1e-6).all()


@pytest.mark.parametrize("name", sorted(name for name, operator in OPERATORS.items() if not operator.unbiased))
def test_the_others_are_biased(name: str) -> None:
    block = torch.tensor([0.3, -1.1, 0.7, -0.45])
    bias = draws(name, "2:4", block).mean(0) - block.double()
    assert bias.abs().max() > 0.1


def variance(a: list[float], p: list[float]) -> float:
    return sum(value**2 / q - value**2 for value, q in zip(a, p, strict=True) if value > 0)


def test_approx_is_a_two_approximation() -> None:
    """Figure 2: all blocks [a1, a2, a3, 1]."""
    steps = [k / 20 for k in range(21)] + [1e-3, 1e-2]
    ratios = [
        variance(a, equation_25(a)) / variance(a, optimal(a, 2))
        for a in ([a1, a2, a3, 1.0] for a1 in steps for a2 in steps for a3 in steps)
        if sum(value > 0 for value in a) > 2
    ]
    assert min(ratios) >= 1 - 1e-9
    assert 1.9 < max(ratios) < 2
