"""Layers of a built engine, read from its JSON document if it can be loaded, else from a listing in the build log.

Both need detailed profiling verbosity; without it they hold names only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nmcompile.checks import described
from nmcompile.errors import FileError
from nmcompile.files.read_files import parse_json

LARGEST = 2**28  # characters; a layer takes kilobytes
SPARSE_WORDS = ("sparse", "sptensor", "spmma", "spgemm")  # in the names of tactics that skip zeros
PLACEHOLDERS = ("", "__myelin_CASK_STUB")  # the tactic is chosen when the plan is loaded
ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)")  # separated by control characters, or by nothing
LISTED = re.compile(r"^Name: (?P<name>.*?), LayerType: .*?Outputs: \[(?P<outputs>|.*?\})\], ")
LISTED_TACTIC = re.compile(r"TacticName: ([^,]*)")
LISTED_TYPE = re.compile(r"Datatype: ([^,}]*)")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's own name.
        nodes: the ONNX nodes that it was made of.
        tactic: the kernel; None if the engine does not say, or if it is chosen only when the plan is loaded.
        output_types: as TensorRT writes them, such as "Half" or "Int8".
    """

    name: str
    nodes: tuple[str, ...]
    tactic: str | None = None
    output_types: tuple[str, ...] = ()

    @property
    def is_sparse(self) -> bool | None:
        """Return whether its kernel uses 2:4 weights; None if the kernel is not known."""
        return None if self.tactic is None else any(word in self.tactic.lower() for word in SPARSE_WORDS)


def layers_from_json(document: str) -> tuple[EngineLayer, ...]:
    """Return the layers in the JSON of `EngineInspector` or `trtexec --exportLayerInfo`.

    Raises:
        FileError: not such a document.
    """
    content = parse_json(document, "TensorRT's layer information", largest=LARGEST)
    layers = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(layers, list):
        raise FileError("not TensorRT's layer information: it has no list 'Layers'")
    return tuple(_from_entry(layer) for layer in layers)


def layers_from_log(lines: Sequence[str]) -> tuple[EngineLayer, ...]:
    """Return the layers listed in the builder's messages, those of the last build in them."""
    listings = [line for line in lines if line.startswith("Layers:\n")]
    if not listings:
        return ()
    listed = [(row, LISTED.match(row)) for row in listings[-1].split("\n")]
    return tuple(_from_row(row, match) for row, match in listed if match is not None)


def _from_entry(layer: object) -> EngineLayer:
    if isinstance(layer, str):
        return EngineLayer(layer, tuple(layer.split(" + ")))
    outputs = layer.get("Outputs", []) if isinstance(layer, dict) else None
    if not (isinstance(layer, dict) and isinstance(outputs, list) and all(isinstance(one, dict) for one in outputs)):
        raise FileError("not TensorRT's layer information: a layer is a name, or an object with a list 'Outputs'")
    types = tuple(_text(output, "Datatype") or _text(output, "Format/Datatype") for output in outputs)
    return _layer(_text(layer, "Name"), _text(layer, "Metadata"), _text(layer, "TacticName"), types)


def _text(entry: dict[str, object], key: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str):
        raise FileError(f"not TensorRT's layer information: {key!r} is {described(value)}, expected text")
    return value


def _from_row(row: str, match: "re.Match[str]") -> EngineLayer:
    tactic = LISTED_TACTIC.search(row)
    types = (kind.strip() for kind in LISTED_TYPE.findall(match["outputs"]))
    return _layer(match["name"], row.partition("Metadata: ")[2], tactic[1] if tactic else "", tuple(types))


def _layer(name: str, metadata: str, tactic: str, types: tuple[str, ...]) -> EngineLayer:
    nodes = ORIGIN.findall(metadata) or name.split(" + ")
    return EngineLayer(name, tuple(nodes), None if tactic in PLACEHOLDERS else tactic, types)
