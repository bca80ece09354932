"""Patterns in an ONNX file: those it was written with, and a table of those that its weights obey."""

from collections.abc import Iterable

from nmcompile.errors import ConfigError, FileError
from nmcompile.files.open_onnx import OnnxFile
from nmcompile.files.read_files import fits, parse_json
from nmcompile.files.read_weights import OnnxWeight
from nmcompile.printable import table
from nmcompile.pruning.pattern import NMPattern

PLANNED = "nmcompile.patterns"
"""Key of a file's metadata that maps each node to the pattern it was written with, as JSON."""
LARGEST_METADATA = 2**24  # characters


def planned_patterns(file: OnnxFile) -> dict[str, NMPattern] | None:
    """Return the pattern that each pruned node was written with; None for files of other writers.

    Raises:
        FileError: metadata that our writer cannot have written.
    """
    text = next((entry.value for entry in file.proto.metadata_props if entry.key == PLANNED), None)
    if text is None:
        return None
    where = f"{file.name}: its metadata {PLANNED!r}"
    written = parse_json(text, where, largest=LARGEST_METADATA)
    if not fits(written, dict[str, str]):
        raise FileError(f"{where} is not an object of patterns by node")
    try:
        return {name: NMPattern.parse(pattern) for name, pattern in written.items()}
    except ConfigError as error:
        raise FileError(f"{where} cannot be read ({error})") from error


def weights_table(weights: Iterable[OnnxWeight]) -> str:
    """Return the weights as a text table with one row each."""
    rows = [
        [
            w.node,
            w.op,
            "x".join(map(str, w.shape)),
            w.dtype,
            f"hidden by {w.hidden_by}" if w.hidden_by else ", ".join(map(str, w.patterns)) or "dense",
            f"{w.zeros:.0%}",
        ]
        for w in weights
    ]
    return table(rows, headers=["node", "operator", "weight", "type", "pattern", "zeros"])
