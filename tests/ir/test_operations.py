"""Gradients of the grid operations that the graphs of a quantized layer call."""

import torch

from nmcompile.ir.operations import beyond_grid, inside_grid, step_gradient

X = torch.tensor([-9.0, -7.0, 0.0, 3.4, 7.0, 7.1])


def test_only_what_lies_outside_the_grid_is_beyond_it() -> None:
    assert beyond_grid(X, torch.tensor(1.0), 4, True).tolist() == [-1, 0, 0, 0, 0, 1]
    assert beyond_grid(X, torch.tensor(0.4), 4, False).tolist() == [-1, -1, 0, 0, 1, 1]
    assert inside_grid(torch.ones(6), beyond_grid(X, torch.tensor(1.0), 4, True)).tolist() == [0, 1, 1, 1, 1, 0]


def test_the_step_gradient_is_that_of_the_clipped_values() -> None:
    """The gradient of clamp(x, -7 step, 7 step): clipped values move with the step, seven times as far."""
    step = torch.tensor(1.0, requires_grad=True)
    weight = torch.arange(1.0, 7.0)
    (expected,) = torch.autograd.grad(
        (torch.maximum(torch.minimum(X, 7 * step), -7 * step) * weight)[[0, 5]].sum(), step
    )
    found = step_gradient(weight, beyond_grid(X, step.detach(), 4, True), step.detach(), 4, True)
    torch.testing.assert_close(found, expected)


def test_step_gradients_of_half_precision_do_not_overflow() -> None:
    gradient, beyond = torch.ones(100_000, dtype=torch.float16), torch.ones(100_000, dtype=torch.int8)
    assert step_gradient(gradient, beyond, torch.tensor(1.0), 4, False) == 1_500_000
