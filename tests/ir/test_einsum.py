"""Einsum equations that are linear layers, checked against what they compute."""

import pytest
import torch
import torch.nn.functional as F

from nmcompile.ir.einsum import linear_einsum

LINEAR = {
    "bi,oi->bo": (1, True),
    "bi,io->bo": (1, False),
    "io,bti->bto": (0, False),
    "... i, o i -> ... o": (1, True),
    "...i,io": (1, False),
    "bi,ij": (1, False),
    "i,oi->o": (1, True),
}


@pytest.mark.parametrize("equation", LINEAR)
def test_a_linear_einsum_equals_the_linear_layer(equation: str) -> None:
    weight, is_out_in = LINEAR[equation]
    assert linear_einsum(equation, weight) is is_out_in
    term = equation.replace(" ", "").split("->")[0].split(",")[1 - weight]
    x = torch.randn((2, 3, 4)[3 - len(term) :] if "." not in term else (2, 3, 4), dtype=torch.float64)
    w = torch.randn((5, 4) if is_out_in else (4, 5), dtype=torch.float64)
    operands = (x, w) if weight == 1 else (w, x)
    torch.testing.assert_close(torch.einsum(equation, *operands), F.linear(x, w if is_out_in else w.t()))


@pytest.mark.parametrize(
    "equation",
    [
        "bci,oc->boi",  # contracts a dim that is not the last
        "bi,oi->ob",  # puts the outputs first
        "bi,bi->bi",
        "bi,oi->boi",
        "bii,oi->bo",
        "bi,ii->bi",
        "bi,bio->bo",  # one matrix for each sample
        "bti,hoi->btho",
        "bi,oi,o->bo",
        "bij,oi",  # without an arrow the dims of the result are in alphabetical order
    ],
)
def test_other_einsums_are_not_linear_layers(equation: str) -> None:
    assert linear_einsum(equation, 1) is None
