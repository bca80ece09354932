"""Recognition of einsum equations that are linear layers."""


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
