"""A report as its JSON holds it: what two reports are compared by, whether they come from a model or from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.files.read_files import parse_json
from nmcompile.ir.choice import Choice
from nmcompile.report.layers import OPERANDS
from nmcompile.report.to_json import SCHEMA_VERSION

LARGEST = 2**28  # characters: 100 thousand layers
LETTERS: Mapping[str, str] = {str(operand): letter for operand, letter in OPERANDS.items()}
Json = Mapping[str, object]


@dataclass(frozen=True)
class SavedLayer:
    """A layer of a report. The mappings are by phase.

    Args:
        name, shape: of the layer and its weight.
        status: as in `LayerReport`.
        plans: what is pruned and quantized, `"W 2:4 greedy, X u4 mse"` or `"dense"`.
        reasons: why a phase is as it is; `""` if nothing is to be said.
        backends: the backends of its nodes, `"prune: cpu, gemm: cpu"`.
        choices: the kernels that ran, with their times; only phases that a backend chose for.
        error: the output error of a mask that was found from data, else None.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    plans: Mapping[Phase, str]
    reasons: Mapping[Phase, str]
    backends: Mapping[Phase, str]
    choices: Mapping[Phase, Choice]
    error: float | None


@dataclass(frozen=True)
class SavedReport:
    """A report: the model's name, the mode, the layers by name, and the share of dense MACs left in each phase."""

    model: str
    mode: str
    layers: Mapping[str, SavedLayer]
    macs_left: Mapping[Phase, float | None]

    @property
    def sparse(self) -> int:
        """Return the number of sparse layers."""
        return sum(layer.status == "sparse" for layer in self.layers.values())


def read_report(text: str | bytes) -> SavedReport:
    """Read the JSON of a report.

    Raises:
        ConfigError: text that `Report.to_json` did not write, or that another version wrote.
    """
    data = parse_json(text, "the report", error=ConfigError, largest=LARGEST)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or version != SCHEMA_VERSION:
        raise ConfigError(
            f"the report has schema_version {version!r}, expected {SCHEMA_VERSION}; give the JSON of Report.to_json"
        )
    try:
        layers = [_layer(one) for one in data["layers"]]
        left = {phase: _left(data["summary"]["phases"][phase.value]) for phase in Phase}
        return SavedReport(str(data["model"]), str(data["mode"]), {layer.name: layer for layer in layers}, left)
    except (KeyError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigError(f"the report is damaged ({type(error).__name__}: {error}); write it again") from error


def _left(totals: Json) -> float | None:
    macs, expected = (cast(float | None, totals[key]) for key in ("macs", "expected_macs"))
    return None if not macs or expected is None else float(expected / macs)


def _layer(data: dict[str, object]) -> SavedLayer:
    rows = cast(list[Json], data["rows"])
    by_phase = {phase: [row for row in rows if row["phase"] == phase.value] for phase in Phase}
    mask, choices = cast(Json | None, data["mask"]), cast(dict[str, Json], data["choices"])
    return SavedLayer(
        name=str(data["name"]),
        shape=tuple(int(size) for size in cast(list[int], data["weight_shape"])),
        status=str(data["status"]),
        plans={phase: _plan(found) for phase, found in by_phase.items()},
        reasons={phase: "; ".join(_different(found, "reason")) for phase, found in by_phase.items()},
        backends={phase: ", ".join(_different(found, "kernels")) for phase, found in by_phase.items()},
        choices={Phase(phase): _choice(choice) for phase, choice in choices.items()},
        error=None if mask is None else float(cast(float, mask["error"])),
    )


def _plan(rows: list[Json]) -> str:
    """Return what the rows prune and quantize, in the words of `LayerReport.operands`."""
    cells: dict[str, str] = {}
    for row in rows:
        operand = row["operand"]
        if operand is not None:
            cell = cells.get(str(operand), LETTERS[str(operand)])
            cells[str(operand)] = f"{cell} {row['pattern'] or row['grid']} {row['operator']}"
    return ", ".join(cells.values()) or "dense"


def _different(rows: list[Json], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows if row[key]))


def _choice(data: Json) -> Choice:
    """Return a choice; later versions of the package may add fields."""
    times = ("predicted", "dense_seconds", "sparse_seconds", "integers_seconds")
    return Choice(str(data["kernel"]), str(data["reason"]), *(_number(data[name]) for name in times))


def _number(value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(f"{value!r} is not a number")
