"""Recognition of einsum equations that are linear layers, or stacks of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def linear_einsum(equation: str, weight: int) -> bool | None:
    """Return whether an einsum of two operands is a linear layer, one operand being its weight.

    A linear layer contracts the last dim of its input with one dim of a matrix and replaces it by the other dim.

    Args:
        equation: such as `"...i,oi->...o"`.
        weight: the operand that is the weight, 0 or 1.

    Returns:
        True for a weight stored (out, in), False for (in, out), None if the einsum is not a linear layer.
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if terms.count(",") != 1:
        return None
    operands = terms.split(",")
    x, w = operands[1 - weight], operands[weight]
    letters = x.replace("...", "")
    if len(set(w)) != 2 or len(w) != 2 or len(set(letters)) != len(letters) or x[-1:] not in w or not letters:
        return None
    is_out_in = w[1] == x[-1]
    out = w[0] if is_out_in else w[1]
    is_linear = out not in x and (result if arrow else _implied(terms)) == x[:-1] + out
    return is_out_in if is_linear else None


def _implied(terms: str) -> str:
    """Return the result of an equation without an arrow: the letters that occur once, in alphabetical order."""
    letters = sorted(letter for letter in set(terms) - {",", "."} if terms.count(letter) == 1)
    return ("..." if "..." in terms else "") + "".join(letters)


@dataclass(frozen=True)
class WeightEinsum:
    """An einsum that multiplies by a weight: a matrix, or a stack of matrices.

    Args:
        input: the letters of the input.
        result: the letters of the result.
        stack: the letter of the stack, `""` for one matrix.
        contracted: the letter that the product sums over.
        out: the letter that takes its place.
        is_out_first: whether the matrices are (out, in).
    """

    input: str
    result: str
    stack: str
    contracted: str
    out: str
    is_out_first: bool

    def inputs(self, x: Tensor, size: int) -> Sequence[Tensor]:
        """Return the input of each matrix of a stack of this size, (..., in); of the only matrix if there is none."""
        of_one = self.input.replace(self.stack, "")
        is_split = self.stack and self.stack in self.input
        parts = x.unbind(self.input.index(self.stack)) if is_split else [x] * (size if self.stack else 1)
        return [part.movedim(of_one.index(self.contracted), -1) for part in parts]

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the result of the outputs, (..., out)."""
        kept = self.input.replace(self.stack, "").replace(self.contracted, "") + self.out
        letters, whole = (self.stack + kept, torch.stack(list(outputs))) if self.stack else (kept, outputs[0])
        return whole.permute([letters.index(letter) for letter in self.result])


def weight_einsum(equation: str, weight: int) -> WeightEinsum | None:
    """Return how an einsum of two operands multiplies by one of them, a matrix or a stack; None if it does not.

    Args:
        equation: such as `"beti,eio->beto"`.
        weight: the operand that is the weight, 0 or 1.
    """
    terms, _, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(operands) != 2 or "." in equation or not all(len(set(one)) == len(one) for one in (*operands, result)):
        return None
    x, w = operands[1 - weight], operands[weight]
    stack, matrix = w[:-2], w[-2:]
    contracted = [one for one in matrix if one in x and one not in result]
    out = [one for one in matrix if one not in x]
    if len(w) not in (2, 3) or len(contracted) != 1 or len(out) != 1:
        return None
    is_whole = set(result) == (set(x) | set(w)) - {*contracted}
    return WeightEinsum(x, result, stack, contracted[0], out[0], w[-2] == out[0]) if is_whole else None
