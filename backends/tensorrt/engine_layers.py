"""What a built engine says about its layers: a JSON document where it can be loaded, a listing in the build log
elsewhere. Both need detailed profiling verbosity; without it there are names only.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nmcompile.errors import FileError

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
        name: TensorRT's own.
        nodes: the ONNX nodes that it was made of.
        tactic: the kernel; None if the engine does not say, or it is chosen only when the plan is loaded.
        output_types: as TensorRT writes them, such as "Half" or "Int8".
    """

    name: str
    nodes: tuple[str, ...]
    tactic: str | None = None
    output_types: tuple[str, ...] = ()

    @property
    def is_sparse(self) -> bool | None:
        """Whether its kernel uses 2:4 weights; None if the kernel is not known."""
        return None if self.tactic is None else any(word in self.tactic.lower() for word in SPARSE_WORDS)


def layers_from_json(document: str) -> tuple[EngineLayer, ...]:
    """The layers in `EngineInspector`'s or `trtexec --exportLayerInfo`'s JSON.

    Raises:
        FileError: not such a document.
    """
    try:
        layers = json.loads(document)["Layers"]
        return tuple(_from_entry(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"not TensorRT's layer information ({type(error).__name__}: {error})") from error


def layers_from_log(lines: Sequence[str]) -> tuple[EngineLayer, ...]:
    """The layers listed in the builder's messages, of the last build in them."""
    listings = [line for line in lines if line.startswith("Layers:\n")]
    if not listings:
        return ()
    listed = [(row, LISTED.match(row)) for row in listings[-1].split("\n")]
    return tuple(_from_row(row, match) for row, match in listed if match is not None)


def _from_entry(layer: Any) -> EngineLayer:
    if isinstance(layer, str):
        return EngineLayer(layer, tuple(layer.split(" + ")))
    types = (output.get("Datatype") or output.get("Format/Datatype", "") for output in layer.get("Outputs", ()))
    return _layer(layer["Name"], layer.get("Metadata", ""), layer.get("TacticName", ""), tuple(types))


def _from_row(row: str, match: "re.Match[str]") -> EngineLayer:
    tactic = LISTED_TACTIC.search(row)
    types = (kind.strip() for kind in LISTED_TYPE.findall(match["outputs"]))
    return _layer(match["name"], row.partition("Metadata: ")[2], tactic[1] if tactic else "", tuple(types))


def _layer(name: str, metadata: str, tactic: str, types: tuple[str, ...]) -> EngineLayer:
    nodes = ORIGIN.findall(metadata) or name.split(" + ")
    return EngineLayer(name, tuple(nodes), None if tactic in PLACEHOLDERS else tactic, types)
