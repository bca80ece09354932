"""Configuration of one layer: an operator and a pattern per operand, and its form in JSON."""

from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Literal, TypeVar, get_args

from nmcompile.checks import check_choice, check_kind
from nmcompile.errors import ConfigError, nearest
from nmcompile.pruning.pattern import NMPattern

T = TypeVar("T")

TRANSPOSABLE = frozenset({"transposable", "transposable_greedy"})
"""The operators whose masks are N:M along both axes of a weight."""
WEIGHT_OPERATORS = TRANSPOSABLE | {"greedy"}
GRADIENT_OPERATORS = frozenset(
    {"greedy", "mvue", "mvue_one_of_two", "mvue_pairs", "mvue_approx", "biased", "uniform", "unbiased", "sdgp"}
)
INPUT_OPERATORS = frozenset({"greedy", "greedy_by_value"})
Group = Literal["auto", "batch", "flat"]
GROUPS: tuple[Group, ...] = get_args(Group)
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Pruning:
    """An operator and its pattern for one operand.

    `group` is the axis along which the update phase groups the gradient: `"batch"` (across the samples at each
    position), `"flat"` (along the flattened contraction index) or `"auto"` (conv: batch if M divides it, else flat;
    linear: flat).
    """

    operator: str
    pattern: NMPattern
    group: Group = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", NMPattern.parse(self.pattern))
        check_choice("Pruning.operator", self.operator, WEIGHT_OPERATORS | GRADIENT_OPERATORS | INPUT_OPERATORS)
        check_choice("group", self.group, GROUPS)

    @property
    def is_transposable(self) -> bool:
        """Return whether the operator finds masks that are N:M along both axes of a weight."""
        return self.operator in TRANSPOSABLE


@dataclass(frozen=True)
class LayerConfig:
    """Pruning and quantization of one layer; `None` leaves the operand dense, or in full precision.

    `weight` acts on the forward GEMM, and on the backward GEMM too if its operator is transposable; `input` on the
    forward GEMM; `backward_gradient` (SDGP) and `update_gradient` (MVUE) on the gradient of those GEMMs. `weight_bits`
    and `input_bits` are 2, 3, 4 or 8. Weights are clipped by SAWB; those of 8 bits have a step for each out-channel, up
    to its largest magnitude. An input that is proven non-negative gets an unsigned grid; it is rounded, then pruned.
    """

    weight: Pruning | None = None
    input: Pruning | None = None
    backward_gradient: Pruning | None = None
    update_gradient: Pruning | None = None
    weight_bits: int | None = None
    input_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "input_bits"):
            bits, expected = getattr(self, name), f"one of the numbers {', '.join(map(str, BITS))}, or None"
            check_kind(f"LayerConfig.{name}", bits, Integral | None, expected)
            if bits is not None and bits not in BITS:
                raise ConfigError(f"LayerConfig.{name} asks for {bits} bits, which have no grid; give {expected}")
        legal = {
            "weight": WEIGHT_OPERATORS,
            "input": INPUT_OPERATORS,
            "backward_gradient": GRADIENT_OPERATORS,
            "update_gradient": GRADIENT_OPERATORS,
        }
        for operand, operators in legal.items():
            pruning = getattr(self, operand)
            expected = "a Pruning, as in Pruning('greedy', '2:4'), or None for dense"
            check_kind(f"LayerConfig.{operand}", pruning, Pruning | None, expected)
            if pruning is not None and pruning.operator not in operators:
                raise ConfigError(
                    f"operator {pruning.operator!r} does not prune a {operand}; {nearest(pruning.operator, operators)}"
                )


def read_layer(data: object) -> LayerConfig | None:
    """Read a layer's entry of a JSON config; null leaves the layer dense."""
    if data is None:
        return None
    operands = json_object(data, "LayerConfig").items()
    return read_fields(LayerConfig, {name: _read_operand(name, value) for name, value in operands})


def read_fields(kind: type[T], data: object) -> T:
    """Make a dataclass from a JSON object; raise for an unknown key, with the nearest name."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    given = json_object(data, kind.__name__)
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} for {kind.__name__}; {nearest(key, known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{data} cannot be read as {kind.__name__}: {error}") from error


def json_object(data: object, name: str) -> dict[str, object]:
    """Return a JSON value if it is an object, else raise."""
    if not isinstance(data, dict):
        raise ConfigError(f"{name} is {data!r}, expected a JSON object")
    return data


def _read_operand(name: str, value: object) -> object:
    return value if value is None or name.endswith("_bits") else read_fields(Pruning, value)


def layer_json(layer: LayerConfig) -> dict[str, object]:
    """Return a layer's entry of a JSON config, which `read_layer` reads back."""
    values = {f.name: getattr(layer, f.name) for f in fields(layer) if getattr(layer, f.name) is not None}
    return {
        name: asdict(value) | {"pattern": str(value.pattern)} if isinstance(value, Pruning) else value
        for name, value in values.items()
    }
